"""Scores on disk: what a stage found out about a source or a clip under its settings, so that it is found out once.

`scores/STAGE/SETTINGS.parquet` holds a row a key, sorted. A command first appends what it learns to a journal of its
own, which a killed command leaves whole but for its last line; journals are taken into the tables when no other
command is at work in the folder.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
import time
import typing
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import compute, parquet

from goku_mega.data.whole_files import TEMPORARY, appearing
from goku_mega.errors import DataError

Fields = dict[str, Any]
"""A score as plain values."""

LOCK = ".lock"
JOURNALS = "journal"
TABLES = "scores"
SYNC_EVERY_S = 1.0
"""A loss of power takes no more than this much of a journal."""

_TYPES = {int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_(), str: arrow.string()}


def schema_of(score: type) -> arrow.Schema:
    """Columns of a score's dataclass after its key."""
    hints = typing.get_type_hints(score)
    columns = [arrow.field("key", arrow.string())]
    for field in fields(score):
        arguments = typing.get_args(hints[field.name])
        kind = arrow.list_(_TYPES[arguments[0]]) if arguments else _TYPES[hints[field.name]]
        columns.append(arrow.field(field.name, kind))
    return arrow.schema(columns)


class ScoreStore:
    """The scores of one output folder: tables as they were when it was opened, and a journal to add to."""

    def __init__(self, folder: Path, schemas: Mapping[str, arrow.Schema]) -> None:
        """
        Args:
            schemas: columns of every stage's rows.

        Raises:
            DataError: the folder cannot be written.
        """
        self.folder = folder
        self.schemas = dict(schemas)
        try:
            for name in (JOURNALS, TABLES):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("a")
        except OSError as error:
            raise DataError(f"{folder}: cannot write scores there ({error.strerror}); give another output") from error
        self._share()
        self._tables: dict[tuple[str, str], _Table] = {}
        self._journalled = self._read_journals()
        self._journal: io.TextIOWrapper | None = None
        self._synced_s = time.monotonic()

    def __enter__(self) -> "ScoreStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.close()

    def of_source(self, stage: str, settings: str, source_key: str) -> dict[str, Fields]:
        """All rows of a stage whose keys begin with a source's."""
        return self._table(stage, settings).with_prefix(source_key)

    def table(self, stage: str, settings: str, columns: Sequence[str] | None = None) -> arrow.Table:
        """All rows of a stage under its settings, by key, each key once: all columns, or the key and these."""
        schema = self.schemas[stage]
        if columns is not None:
            schema = arrow.schema([schema.field(name) for name in ("key", *columns)])
        return _merged(self._path(stage, settings), self._journalled.get((stage, settings), {}), schema)

    def add(self, stage: str, settings: str, key: str, score: Fields) -> None:
        """Append a score; it is in the tables of stores that are opened later."""
        if self._journal is None:
            name = f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}.jsonl"
            self._journal = (self.folder / JOURNALS / name).open("w", encoding="utf-8")
        row = {"stage": stage, "settings": settings, "key": key, "score": score}
        self._journal.write(json.dumps(row) + "\n")
        self._journal.flush()
        if time.monotonic() - self._synced_s > SYNC_EVERY_S:
            os.fsync(self._journal.fileno())
            self._synced_s = time.monotonic()

    def _table(self, stage: str, settings: str) -> "_Table":
        if (stage, settings) not in self._tables:
            rows = self._journalled.get((stage, settings), {})
            self._tables[stage, settings] = _Table(_merged(self._path(stage, settings), rows, self.schemas[stage]))
        return self._tables[stage, settings]

    def _path(self, stage: str, settings: str) -> Path:
        return self.folder / TABLES / stage / f"{settings}.parquet"

    def _share(self) -> None:
        """Work beside other commands, after taking in the journals if this one is alone."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            self._take_in()
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _take_in(self) -> None:
        """Journals into tables; a journal goes after all tables are whole, so a kill in between loses nothing."""
        journals = list((self.folder / JOURNALS).glob("*.jsonl"))
        for (stage, settings), rows in self._read_journals().items():
            path = self._path(stage, settings)
            path.parent.mkdir(exist_ok=True)
            with appearing(path) as file:
                parquet.write_table(_merged(path, rows, self.schemas[stage]), file)
        for journal in journals:
            journal.unlink()
        if journals:  # a command that left none was killed before it wrote anything else
            for left in self.folder.rglob(f".*{TEMPORARY}"):
                left.unlink()

    def _read_journals(self) -> dict[tuple[str, str], dict[str, Fields]]:
        found: dict[tuple[str, str], dict[str, Fields]] = {}
        for path in sorted((self.folder / JOURNALS).glob("*.jsonl")):
            for row in _whole_lines(path):
                if row["stage"] in self.schemas:
                    found.setdefault((row["stage"], row["settings"]), {})[row["key"]] = row["score"]
        return found


class _Table:
    """Rows sorted by key, and where to find a key among them."""

    def __init__(self, rows: arrow.Table) -> None:
        self.rows = rows
        self._keys: list[str] | None = None

    def with_prefix(self, prefix: str) -> dict[str, Fields]:
        """The rows whose keys begin with `prefix`, without their keys."""
        if self._keys is None:
            self._keys = self.rows["key"].to_pylist()
        first = bisect_left(self._keys, prefix)
        last = bisect_left(self._keys, prefix + chr(0x10FFFF), lo=first)
        rows = self.rows.slice(first, last - first).to_pylist()
        return {row.pop("key"): row for row in rows}


def _merged(path: Path, added: dict[str, Fields], schema: arrow.Schema) -> arrow.Table:
    """The table of a file and further rows, by key, each key once."""
    parts = []
    if path.exists():
        try:
            parts.append(parquet.ParquetFile(path).read(columns=schema.names).cast(schema))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it, and its scores are made again") from error
    if added:
        names = schema.names[1:]
        rows = [{"key": key, **{name: score[name] for name in names}} for key, score in sorted(added.items())]
        parts.append(arrow.Table.from_pylist(rows, schema))
    if not parts:
        return schema.empty_table()
    if len(parts) == 1:
        return parts[0].combine_chunks()
    both = arrow.concat_tables(parts).combine_chunks().sort_by("key")
    # The sort is stable, so the last of equal keys is what was learnt last.
    replaced = compute.equal(both["key"].slice(1), both["key"].slice(0, len(both) - 1)).combine_chunks()
    return both.filter(arrow.concat_arrays([compute.invert(replaced), arrow.array([True])]))


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A journal's rows; the last line of a command that was killed may be torn."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
