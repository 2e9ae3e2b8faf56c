"""The score store: nothing is lost, nothing is there twice, whatever was killed when, and the tables are the same."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.curate.scores import ScoreStore, schema_of
from goku_mega.errors import DataError


@dataclass(frozen=True)
class Score:
    count: int
    value: float
    good: bool
    name: str
    values: tuple[float, ...]
    names: tuple[str, ...]


SCHEMAS = {"stage": schema_of(Score), "other": schema_of(Score)}


def score(number: int) -> dict:
    return {
        "count": number, "value": number / 3, "good": number % 2 == 0, "name": f"n{number}",
        "values": [number / 7] * (number % 4), "names": ["\u00e9"] * (number % 3),
    }  # fmt: skip


def write(folder: Path, *rows: tuple[str, str, str, int]) -> None:
    with ScoreStore(folder, SCHEMAS) as store:
        for stage, settings_key, key, number in rows:
            store.add(stage, settings_key, key, score(number))


def read(folder: Path, stage: str = "stage", settings_key: str = "s") -> dict[str, dict]:
    with ScoreStore(folder, SCHEMAS) as store:
        return {row.pop("key"): row for row in store.table(stage, settings_key).to_pylist()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_scores_come_back_as_they_were_under_their_stage_and_settings(tmp_path):
    write(tmp_path, ("stage", "s", "b", 2), ("stage", "s", "a", 1), ("stage", "t", "a", 3), ("other", "s", "a", 4))
    assert read(tmp_path) == {"a": score(1), "b": score(2)}
    assert read(tmp_path, settings_key="t") == {"a": score(3)}
    assert read(tmp_path, stage="other") == {"a": score(4)}
    assert read(tmp_path, settings_key="never") == {}


def test_what_is_learnt_later_replaces_what_was_known(tmp_path):
    for number in (5, 6, 7):
        write(tmp_path, ("stage", "s", "a", number), ("stage", "s", "b", 1))
    assert read(tmp_path) == {"a": score(7), "b": score(1)}


def test_the_rows_of_a_source_are_those_whose_keys_begin_with_its_own(tmp_path):
    write(tmp_path, *[("stage", "s", key, 1) for key in ("ab", "ab-1", "ab-2", "aa-9", "ac", "b")])
    with ScoreStore(tmp_path, SCHEMAS) as store:
        assert list(store.of_source("stage", "s", "ab")) == ["ab", "ab-1", "ab-2"]
        assert store.of_source("stage", "s", "zz") == {}


@given(cut=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_a_journal_torn_anywhere_keeps_every_whole_line(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("scores")
    write(folder, *[("stage", "s", f"k{number}", number) for number in range(3)])
    (journal,) = (folder / "journal").iterdir()
    content = journal.read_bytes()
    torn = content[: max(0, len(content) - cut)]
    journal.write_bytes(torn)
    assert read(folder) == {f"k{number}": score(number) for number in range(torn.count(b"\n"))}


def test_the_tables_do_not_depend_on_how_the_scores_came(tmp_path):
    rows = [("stage", "s", f"k{number}", number) for number in range(12)]
    write(tmp_path / "one", *rows)
    for first in (8, 0, 4):
        write(tmp_path / "three", *rows[first : first + 4], ("stage", "s", "k0", 0))
    assert read(tmp_path / "one") == read(tmp_path / "three")
    assert files(tmp_path / "one") == files(tmp_path / "three") != {}


def test_two_commands_at_once_lose_nothing_and_the_next_one_alone_takes_it_all_in(tmp_path):
    with ScoreStore(tmp_path, SCHEMAS) as one:
        one.add("stage", "s", "a", score(1))
        with ScoreStore(tmp_path, SCHEMAS) as two:
            two.add("stage", "s", "b", score(2))
        with ScoreStore(tmp_path, SCHEMAS) as three:  # beside `one`, so nothing is taken into tables yet
            assert set(three.of_source("stage", "s", "")) == {"a", "b"}
        assert files(tmp_path) == {}
    assert read(tmp_path) == {"a": score(1), "b": score(2)}
    assert len(files(tmp_path)) == 1 and list((tmp_path / "journal").iterdir()) == []


def test_a_kill_between_table_and_journal_leaves_each_score_once(tmp_path):
    write(tmp_path, ("stage", "s", "a", 1))
    (journal,) = (tmp_path / "journal").iterdir()
    content = journal.read_bytes()
    read(tmp_path)
    journal.write_bytes(content)  # as if it had not been removed
    (tmp_path / "scores" / "stage" / ".s.parquet.1.tmp").write_bytes(b"half a table")
    assert read(tmp_path) == {"a": score(1)}
    assert [path.name for path in (tmp_path / "scores" / "stage").iterdir()] == ["s.parquet"]


def test_a_damaged_table_is_one_line_that_names_it(tmp_path):
    write(tmp_path, ("stage", "s", "a", 1))
    read(tmp_path)
    (tmp_path / "scores" / "stage" / "s.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"s\.parquet is damaged"):
        read(tmp_path)


def test_a_stage_that_is_no_more_is_passed_over(tmp_path):
    write(tmp_path, ("stage", "s", "a", 1))
    (journal,) = (tmp_path / "journal").iterdir()
    gone = json.dumps({"stage": "gone", "settings": "s", "key": "a", "score": {}}) + "\n"
    journal.write_text(gone + journal.read_text())
    assert read(tmp_path) == {"a": score(1)}


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write scores there"):
        ScoreStore(tmp_path / "file", SCHEMAS)
