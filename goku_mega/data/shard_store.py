"""Bytes of a data set's files at offsets, from a local folder or under an fsspec URL, read ahead of their use.

A read that fails, answers with too few or other bytes or takes too long is asked for again, and counted. What the bytes
mean is `shards`' business, what is kept of them on the node's disk `shard_cache`'s.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import xxhash

from goku_mega.data.insisting import USUAL_RULES, Insistence, ReadCounts, ReadRules
from goku_mega.data.shard_cache import RangeCache
from goku_mega.errors import DataError
from goku_mega.places import check_driver, local_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Buffer = bytes | bytearray | memoryview

OTHER_BYTES = "they are not the bytes that were written"
MAX_OPEN_SHARDS = 256
"""Fewer than the open files that systems allow a process by default."""
JOINED_GAP_BYTES = 64 * 2**10
"""Ranges of one file with no more than this between them are one request to a store: sooner sent than asked for."""
JOINED_BYTES = 8 * 2**20
"""A request grows no longer by joining: requests that are under way side by side fill a network better."""


class ByteRange(NamedTuple):
    """Some bytes of a file of the data set."""

    file: str
    start: int
    length: int
    checksum: int | None = None
    """Of the bytes that were written there, by `checksum_of`; None: it is not known."""

    @property
    def end(self) -> int:
        return self.start + self.length


def checksum_of(content: Buffer) -> int:
    """64 bits with a sign, which Parquet holds as they are."""
    return int.from_bytes(xxhash.xxh3_64_digest(content), "little", signed=True)


def _is_as_written(wanted: ByteRange, content: Buffer) -> bool:
    return wanted.checksum is None or checksum_of(content) == wanted.checksum


Fetch = Callable[[ByteRange], memoryview]
"""Waits for one of the ranges that were asked for; each may be had once. The memory is writable."""


class ShardStore(Protocol):
    """Where the files of a data set are. For one thread; a store may use more of its own."""

    @property
    def counts(self) -> ReadCounts:
        """What was read so far."""

    def content(self, file: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: there is none.
            DataError: it cannot be read.
        """

    def start(self, ranges: Sequence[ByteRange]) -> Fetch:
        """Begin to read ranges that will be wanted soon.

        What it returns raises DataError where a range cannot be read.
        """

    def stop(self) -> None:
        """Give up what is under way: whoever waits for it gets an error. Any thread may ask for this."""

    def close(self) -> None:
        """Stop, end the store's threads and close its files."""


def open_store(
    place: str | Path, rules: ReadRules = USUAL_RULES, *, threads: int = 1, cache: RangeCache | None = None
) -> ShardStore:
    """The data set at a path or an fsspec URL.

    Args:
        threads: requests to a store that are under way at once; a local folder needs none.
        cache: keeps what comes from a store; what is local already is not kept again.

    Raises:
        DataError: fsspec has no driver for the URL, or it is not installed.
    """
    local = local_path(place)
    if local is not None:
        return LocalStore(local, rules)
    check_driver(str(place), DataError)
    return RemoteStore(str(place), rules, threads=threads, cache=cache)


def fetch_folder(place: str, name: str, target: Path) -> Path | None:
    """A folder of a data set that is behind a URL, copied into `target`; None where there is no such folder.

    Raises:
        DataError: the URL cannot be used, or its storage fails.
    """
    check_driver(place, DataError)
    store = RemoteStore(place)
    try:
        files = store.files_in(name)
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).write_bytes(store.content(file))
    finally:
        store.close()
    return target / name if files else None


class LocalStore:
    """A folder on a file system that this machine has mounted; the files read from stay open.

    The system reads ahead by itself when it is told what will be wanted, without a thread of ours.
    """

    def __init__(self, folder: Path, rules: ReadRules = USUAL_RULES) -> None:
        self.folder = folder
        self._insistence = Insistence(rules)
        self._files: dict[str, int] = {}

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def counts(self) -> ReadCounts:
        return self._insistence.counts

    def content(self, file: str) -> bytes:
        return self._insistence.until_done(f"{self.folder / file} cannot be read", (self.folder / file).read_bytes)

    def start(self, ranges: Sequence[ByteRange]) -> Fetch:
        for wanted in ranges:
            # A file that cannot be opened is told of when it is read.
            with suppress(OSError):
                os.posix_fadvise(self._opened(wanted.file), wanted.start, wanted.length, os.POSIX_FADV_WILLNEED)
        return self.read

    def read(self, wanted: ByteRange) -> memoryview:
        """Read a range now."""
        began = time.monotonic()
        # Not by a path of its own for every read: Python would note its parts in a table that grows by that.
        what = f"{self.folder}/{wanted.file} cannot be read at byte {wanted.start}"
        buffer = self._insistence.until_done(what, partial(self._read, wanted))
        self._insistence.count(requests=1, bytes=wanted.length, wait_s=time.monotonic() - began)
        return memoryview(buffer)

    def stop(self) -> None:
        self._insistence.stop()

    def close(self) -> None:
        self.stop()
        while self._files:
            os.close(self._files.popitem()[1])

    def _read(self, wanted: ByteRange) -> bytearray:
        buffer = bytearray(wanted.length)
        try:
            count = os.preadv(self._opened(wanted.file), [buffer], wanted.start)
            if count < wanted.length:
                self._check_length(wanted)
                raise EOFError(f"{count} of {wanted.length} bytes came")
        except OSError:
            with suppress(KeyError):
                os.close(self._files.pop(wanted.file))  # a file of a server that was away has to be opened again
            raise
        if not _is_as_written(wanted, buffer):
            raise ValueError(OTHER_BYTES)  # the file system has checked what the disk gave
        return buffer

    def _check_length(self, wanted: ByteRange) -> None:
        size = os.fstat(self._files[wanted.file]).st_size
        if size < wanted.end:
            raise ValueError(f"the file ends at byte {size}, before byte {wanted.end}")

    def _opened(self, file: str) -> int:
        if file not in self._files:
            if len(self._files) == MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[file] = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[file]


@dataclass(frozen=True)
class _Request:
    """Neighbouring ranges that are read together, by their starts."""

    ranges: tuple[ByteRange, ...]

    @property
    def whole(self) -> ByteRange:
        first = self.ranges[0]
        return ByteRange(first.file, first.start, max(wanted.end for wanted in self.ranges) - first.start)


class RemoteStore:
    """A folder under an fsspec URL. Settings and keys are the driver's: environment, or fsspec's own configuration."""

    def __init__(
        self, url: str, rules: ReadRules = USUAL_RULES, *, threads: int = 1, cache: RangeCache | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.cache = cache
        self._insistence = Insistence(rules)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read shards")

    def __str__(self) -> str:
        return self.url

    @property
    def counts(self) -> ReadCounts:
        return self._insistence.counts

    def content(self, file: str) -> bytes:
        url = f"{self.url}/{file}"

        def ask() -> bytes:
            store, path = _driver(url)
            return bytes(store.cat_file(path))

        content = self._insistence.until_done_in_time(f"{url} cannot be read", ask)
        self._insistence.count(requests=1, bytes=len(content))
        return content

    def files_in(self, folder: str) -> list[str]:
        """All files of a folder of the data set, by their names in it; none where there is no such folder.

        Raises:
            DataError: the folder cannot be read.
        """
        url = f"{self.url}/{folder}"

        def ask() -> list[str]:
            store, path = _driver(url)
            return [f"{folder}{found.removeprefix(path)}" for found in store.find(path) if found != path]

        try:
            return self._insistence.until_done_in_time(f"{url} cannot be listed", ask)
        except FileNotFoundError:
            return []

    def start(self, ranges: Sequence[ByteRange]) -> Fetch:
        answers: dict[ByteRange, Future[dict[ByteRange, memoryview]]] = {}
        for request in _joined(ranges):
            answer = self._pool.submit(self._read, request)
            answers.update(dict.fromkeys(request.ranges, answer))
        return partial(self._wait, answers)

    def stop(self) -> None:
        self._insistence.stop()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, answers: dict[ByteRange, Future[dict[ByteRange, memoryview]]], wanted: ByteRange) -> memoryview:
        began = time.monotonic()
        found = answers.pop(wanted).result().pop(wanted)
        self._insistence.count(wait_s=time.monotonic() - began)
        return found

    def _read(self, request: _Request) -> dict[ByteRange, memoryview]:
        found = {wanted: content for wanted in request.ranges if (content := self._kept(wanted)) is not None}
        missing = tuple(wanted for wanted in request.ranges if wanted not in found)
        for part in _joined(missing):
            whole = part.whole
            url = f"{self.url}/{whole.file}"
            what = f"{url} cannot be read at byte {whole.start}"
            contents = self._insistence.until_done_in_time(what, partial(_contents, url, part))
            self._insistence.count(requests=1, bytes=whole.length)
            for wanted, content in contents.items():
                found[wanted] = content
                if self.cache is not None:
                    self.cache.put(wanted.file, wanted.start, content)
        return found

    def _kept(self, wanted: ByteRange) -> memoryview | None:
        if self.cache is None:
            return None
        content = self.cache.get(wanted.file, wanted.start, wanted.length)
        if content is None or not _is_as_written(wanted, content):
            return None
        self._insistence.count(cache_hits=1)
        return content


def _joined(ranges: Sequence[ByteRange]) -> list[_Request]:
    """The ranges in requests, in the order of their first ones: neighbours together."""
    order = {wanted: number for number, wanted in reversed(list(enumerate(ranges)))}
    groups: list[list[ByteRange]] = []
    for wanted in sorted(order):
        group = groups[-1] if groups else []
        near = group and group[-1].file == wanted.file and wanted.start - group[-1].end <= JOINED_GAP_BYTES
        if near and wanted.end - group[0].start <= JOINED_BYTES:
            group.append(wanted)
        else:
            groups.append([wanted])
    groups.sort(key=lambda group: min(order[wanted] for wanted in group))
    return [_Request(tuple(group)) for group in groups]


def _contents(url: str, request: _Request) -> dict[ByteRange, memoryview]:
    """Every range of a request with its bytes, writable."""
    whole = request.whole
    store, path = _driver(url)
    content = memoryview(bytearray(store.cat_file(path, start=whole.start, end=whole.end)))
    if len(content) != whole.length:
        raise EOFError(f"{len(content)} of {whole.length} bytes came")
    contents = {wanted: content[wanted.start - whole.start : wanted.end - whole.start] for wanted in request.ranges}
    if not all(_is_as_written(wanted, part) for wanted, part in contents.items()):
        raise OSError(OTHER_BYTES)
    return contents


def _driver(url: str) -> "tuple[AbstractFileSystem, str]":
    """The driver, which fsspec keeps for us and makes anew in a forked process, and the path in its words."""
    from fsspec.core import url_to_fs

    store, path = url_to_fs(url)
    return store, path
