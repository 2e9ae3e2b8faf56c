"""What a corpus says of its files: the rows of captions.jsonl, checked. No pixels."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from goku_mega.errors import DataError

Row = dict[str, Any]

KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""Names of samples: WebDataset ends a name at its first dot, and a tar takes 100 characters with the suffix."""


NUMBERS = {"first_frame": 0, "frames": 1, "repeat": 1}
"""Numbers that a row may carry, and the least of each: a clip as a range of a longer file, and how often an epoch of
training takes it."""


def read_captions(corpus: Path) -> list[Row]:
    """The rows of captions.jsonl by key, with what encoding needs: key, file, caption, and the `NUMBERS` that it has.

    Raises:
        DataError: the file is missing, a row lacks `key`, `file` or `caption` or has a number that is none, or its
            key is used twice.
    """
    path = corpus / "captions.jsonl"
    if not path.exists():
        raise DataError(f"{path} is missing; write a corpus with `goku-mega corpus shapes --output {corpus}`")
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = _caption_row(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number}: {error}; each line needs key, file and caption") from error
        if row["key"] in rows:
            raise DataError(f"{path} line {number}: the key {row['key']} is used twice; give every file its own")
        rows[row["key"]] = row
    if not rows:
        raise DataError(f"{path} is empty; write the corpus again")
    return [rows[key] for key in sorted(rows)]


def _caption_row(content: Any) -> Row:
    row = {name: content[name] for name in ("key", "file", "caption")}
    wrong = [name for name, value in row.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {row[wrong[0]]!r}, not a string")
    if not KEY.fullmatch(row["key"]):
        raise ValueError(f"the key {row['key']!r} is not 1 to 80 letters, digits, - or _")
    for name, least in NUMBERS.items():
        value = content.get(name)
        if value is not None:
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}, not a number from {least} on")
            row[name] = value
    return row


def corpus_key(corpus: Path, rows: list[Row]) -> str:
    """A short hash of the captions, the files' names and sizes, and the numbers."""
    digest = hashlib.sha256()
    for row in rows:
        path = corpus / row["file"]
        size = path.stat().st_size if path.exists() else -1
        numbers = [row.get(name) for name in NUMBERS]
        digest.update(json.dumps([row["key"], row["file"], row["caption"], size, *numbers]).encode())
    return digest.hexdigest()[:16]
