"""What a corpus says of its files is checked before any work begins."""

import json
from pathlib import Path

import pytest

from goku_mega.data.captions import corpus_key, read_captions
from goku_mega.errors import DataError

ROWS = [
    {"key": "b", "file": "b.mp4", "caption": "a red circle", "kind": "video"},
    {"key": "a", "file": "a.png", "caption": "un carré bleu"},
]


def write(folder: Path, rows: list) -> Path:
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_come_by_key_with_what_encoding_needs(tmp_path):
    assert read_captions(write(tmp_path, ROWS)) == [
        {"key": "a", "file": "a.png", "caption": "un carré bleu"},
        {"key": "b", "file": "b.mp4", "caption": "a red circle"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"key": "c", "file": "c.mp4"}, "line 3: 'caption'; each line needs key, file and caption"),
        ({"key": "c", "file": "c.mp4", "caption": None}, "line 3: caption is None, not a string"),
        ({"key": "a", "file": "c.mp4", "caption": ""}, "line 3: the key a is used twice"),
        ({"key": "c.1", "file": "c.mp4", "caption": ""}, r"line 3: the key 'c\.1' is not 1 to 80 letters"),
        ({"key": "x" * 81, "file": "c.mp4", "caption": ""}, "is not 1 to 80 letters"),
        ({"key": "c", "file": "c.mp4", "caption": "", "first_frame": -1}, "first_frame is -1, not a number from 0 on"),
        ({"key": "c", "file": "c.mp4", "caption": "", "frames": 0}, "frames is 0, not a number from 1 on"),
        ({"key": "c", "file": "c.mp4", "caption": "", "frames": "9"}, "frames is '9', not a number"),
        ({"key": "c", "file": "c.mp4", "caption": "", "first_frame": True}, "first_frame is True, not a number"),
        (7, "line 3: "),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_captions(write(tmp_path, [*ROWS, row]))


def test_bytes_that_are_no_text_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "captions.jsonl").write_bytes(b'\xff\xfe{"key"')
    with pytest.raises(DataError, match="line 1"):
        read_captions(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        read_captions(write(tmp_path, []))
    with pytest.raises(DataError, match="captions.jsonl is missing; write a corpus with"):
        read_captions(tmp_path / "nowhere")


def test_another_caption_or_file_makes_another_corpus(tmp_path):
    rows = read_captions(write(tmp_path, ROWS))
    key = corpus_key(tmp_path, rows)
    assert corpus_key(tmp_path, read_captions(write(tmp_path, ROWS[::-1]))) == key
    assert corpus_key(tmp_path, [rows[0], {**rows[1], "caption": "a blue circle"}]) != key
    (tmp_path / "a.png").write_bytes(b"pixels")
    assert corpus_key(tmp_path, rows) != key


def test_a_range_of_a_file_is_kept_and_makes_another_corpus(tmp_path):
    ranged = [ROWS[1], {**ROWS[0], "first_frame": 0, "frames": 9}]
    rows = read_captions(write(tmp_path, ranged))
    assert rows[1] == {"key": "b", "file": "b.mp4", "caption": "a red circle", "first_frame": 0, "frames": 9}
    keys = {corpus_key(tmp_path, rows), corpus_key(tmp_path, read_captions(write(tmp_path, ROWS)))}
    for name, value in (("first_frame", 1), ("frames", 8), ("frames", None)):
        keys.add(corpus_key(tmp_path, read_captions(write(tmp_path, [ROWS[1], {**ranged[1], name: value}]))))
    assert len(keys) == 5
