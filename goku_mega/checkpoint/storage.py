"""Places that hold checkpoints: a folder on a file system, or under an fsspec URL (s3://, gs://, memory://, ...).

Both keep two promises. A file that `write` returned from is durable: synced with the folders that lead to it, or
acknowledged by the store. And a name appears only once the file has all its bytes: a write that fails or is killed
leaves no file with that name, or the one that was there before.

A store's driver repeats what it holds to be a passing failure, in silence. Measured with s3fs 2026.9.0: answers 500
and 503 five times in 7 to 9 s, "SlowDown" 25 times in 40 s, a connection that breaks 25 times in 37 s, one that is
refused five times in 6 s, a body cut off in the middle five times in 2 s. For a server that takes the connection and
then says nothing it waits without end. So every call here ends after `limit_s`, and one that failed is repeated for
`retry_s`, with a warning. The parts of a long file are left to the driver: they are gone once they are sent, so
whoever saves starts the save anew.

fsspec and its drivers are imported only when a URL asks for them. Nothing here needs torch.
"""

import errno
import fcntl
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from goku_mega.errors import CheckpointError
from goku_mega.places import check_driver, local_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

DIRECT_BYTES = 2**20
"""Files whose first piece has this many bytes go to the disk past the page cache, which they would only fill: faster,
and without the processor's work of a copy. It needs whole pages; where that cannot be, it is written as usual. Reads
go through the cache: its reading ahead is worth more than the copy costs."""

PART_BYTES = 32 * 2**20
"""What one call to a store carries. S3 takes 10,000 parts, so a file may have 320 GB; two parts are in memory."""

READS_AT_ONCE = 8
"""Parts of one long read that are asked of a store side by side: a single connection does not fill a network."""

FIRST_PAUSE_S = 0.5
"""Before a failed call is repeated; each pause is twice as long as the one before, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 8.0

_WHOLE_AT_CLOSE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
"""Stores that show an object only once its upload is complete; on any other a file gets its name by a move."""

_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Folder(Protocol):
    """A place with files and folders. Every fault of the place is an OSError that names the file."""

    @property
    def name(self) -> str:
        """The last part of the path."""

    def child(self, name: str) -> "Folder":
        """The folder `name` inside, whether it exists or not."""

    def names(self) -> list[str]:
        """The files and folders directly inside, sorted; none if the folder does not exist."""

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from byte `start`, fewer where the file ends; None reads to its end."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start`. Raises EOFError if the file ends before."""

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        """Write a file, or replace it; returns its bytes. Once it returns, the file is durable.

        Raises:
            OSError: nothing was written; the name shows what it showed before.
        """

    def remove_file(self, name: str) -> None:
        """Remove a file; no error if it does not exist."""

    def free_bytes(self) -> int | None:
        """Bytes that this process may still write there; None where nobody knows."""

    def remove(self) -> None:
        """Remove the folder and all in it; no error if it does not exist."""


def open_folder(place: str | Path) -> Folder:
    """The folder at a path or an fsspec URL.

    Raises:
        CheckpointError: fsspec has no driver for the URL, or the driver is not installed.
    """
    local = local_path(place)
    if local is not None:
        return LocalFolder(local)
    check_driver(str(place), CheckpointError)
    return FsspecFolder(str(place))


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a file system that this machine has mounted."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def child(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / _one_part(name))

    def names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path) if not _is_unfinished(name))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        return os.stat(self.path / _one_part(name)).st_size

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with _opened(self.path / _one_part(name), os.O_RDONLY) as file:
            length = max(0, os.fstat(file).st_size - start) if length is None else length
            pieces = []
            while length and (piece := os.pread(file, length, start)):
                pieces.append(piece)
                start += len(piece)
                length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        rest = buffer.cast("B")
        with _opened(self.path / _one_part(name), os.O_RDONLY) as file:
            while rest:
                count = os.preadv(file, [rest], start)
                if count == 0:
                    raise EOFError(f"{self.path / name} ends at byte {start}, {len(rest)} bytes early")
                start += count
                rest = rest[count:]

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        path = self.path / _one_part(name)
        self._make()
        unfinished = self.path / _unfinished(name)
        written = 0
        try:
            with _opened(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                for piece in pieces:
                    rest = memoryview(piece).cast("B")
                    if written == 0 and len(rest) >= DIRECT_BYTES:
                        _set_direct(file, True)
                    written += len(rest)
                    while rest:
                        rest = rest[_at_once(file, partial(os.write, file, rest)) :]
                os.fsync(file)
            os.rename(unfinished, path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
        self.sync()
        return written

    def remove_file(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path / _one_part(name))
            self.sync()

    def free_bytes(self) -> int | None:
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def remove(self) -> None:
        while self.path.exists():
            with suppress(FileNotFoundError):  # somebody else removes it, too; what is left is still ours to remove
                shutil.rmtree(self.path)

    def rename_to(self, final: Path) -> "LocalFolder":
        """Give the folder the path `final` on the same file system, durably; returns it there.

        Raises:
            OSError: `final` is a folder with something in it, or of another file system.
        """
        os.rename(self.path, final)
        for parent in {self.path.parent, final.parent}:
            LocalFolder(parent).sync()
        return LocalFolder(final)

    def sync(self) -> None:
        """Wait until the names in the folder are on the disk."""
        with _opened(self.path, os.O_RDONLY | os.O_DIRECTORY) as folder:
            os.fsync(folder)

    def _make(self) -> None:
        """Make the folder and those above it; a name that is not synced may vanish with all that is below it."""
        if not self.path.is_dir():
            above = LocalFolder(self.path.parent)
            above._make()
            self.path.mkdir(exist_ok=True)
            above.sync()


@dataclass(frozen=True)
class FsspecFolder:
    """A folder under an fsspec URL. Settings and keys are the driver's: environment, or fsspec's own configuration.

    Attributes:
        limit_s: longest time for one call, of at most PART_BYTES.
        retry_s: a call that failed is repeated until this much time has passed since it was first made.
    """

    url: str
    limit_s: float = 120.0
    retry_s: float = 60.0

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def child(self, name: str) -> "FsspecFolder":
        return replace(self, url=self._file(name))

    def names(self) -> list[str]:
        def ask() -> list[str]:
            store, path = self._store(self.url)
            store.invalidate_cache()  # drivers keep listings for ever; other processes write here
            return [str(found).rstrip("/") for found in store.ls(path, detail=False) if found.rstrip("/") != path]

        try:
            found = [name.rpartition("/")[2] for name in self._ask("list", self.url, ask)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if not _is_unfinished(name))

    def size(self, name: str) -> int:
        url = self._file(name)

        def ask() -> int:
            store, path = self._store(url)
            store.invalidate_cache()
            found = store.info(path)
            if found["type"] != "file":
                raise FileNotFoundError(url)
            return int(found["size"])

        return self._ask("find", url, ask)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        first = self._read_part(name, start, PART_BYTES if length is None else min(length, PART_BYTES))
        if len(first) < PART_BYTES or len(first) == length:
            return first
        end = self.size(name) if length is None else min(self.size(name), start + length)
        content = bytearray(end - start)
        content[: len(first)] = first
        self.read_into(name, start + len(first), memoryview(content)[len(first) :])
        return bytes(content)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        whole = buffer.cast("B")

        def fill(offset: int) -> None:
            target = whole[offset : offset + PART_BYTES]
            part = self._read_part(name, start + offset, len(target))
            if len(part) != len(target):
                raise EOFError(f"{self._file(name)} ends {len(target) - len(part)} bytes early")
            target[:] = part

        offsets = range(0, len(whole), PART_BYTES)
        if len(offsets) < 2:
            list(map(fill, offsets))
        else:
            with ThreadPoolExecutor(min(READS_AT_ONCE, len(offsets))) as readers:
                list(readers.map(fill, offsets))

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        url = self._file(name)
        by_move = self.url.partition("://")[0] not in _WHOLE_AT_CLOSE
        target = self._file(_unfinished(name)) if by_move else url
        parts = _regroup(pieces, PART_BYTES)
        first = next(parts, b"")
        second = next(parts, None)
        try:
            if second is None:
                self._ask("write", target, lambda: self._put(target, first))
                written = len(first)
            else:
                written = self._upload(target, chain((first, second), parts), hidden=not by_move)
            if by_move:
                self._ask("write", url, lambda: self._move(target, url))
        except BaseException:
            if by_move:
                self._abandon(target, lambda: self._delete(target))
            raise
        return written

    def remove_file(self, name: str) -> None:
        url = self._file(name)

        with suppress(FileNotFoundError):
            self._ask("remove", url, lambda: self._delete(url))

    def free_bytes(self) -> int | None:
        return None

    def remove(self) -> None:
        def ask() -> None:
            store, path = self._store(self.url)
            store.invalidate_cache()
            try:
                store.rm(path, recursive=True)
            except FileNotFoundError:
                return
            store.invalidate_cache()
            left = store.find(path)  # s3fs takes no notice of objects that the server did not delete
            if left:
                raise OSError(f"the store kept {len(left)} of its files, {left[0]} for one")

        self._ask("remove", self.url, ask)

    def _file(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{_one_part(name)}"

    def _store(self, url: str) -> "tuple[AbstractFileSystem, str]":
        """The driver, which fsspec keeps for us and makes anew in a forked process, and the path in its words."""
        from fsspec.core import url_to_fs

        store, path = url_to_fs(url)
        return store, path

    def _read_part(self, name: str, start: int, length: int) -> bytes:
        """At most PART_BYTES; fewer than `length` where the file ends."""
        url = self._file(name)

        def ask() -> bytes:
            store, path = self._store(url)
            return bytes(store.cat_file(path, start=start, end=start + length))

        if length == 0:
            return b""
        try:
            return self._ask("read", url, ask)
        except FileNotFoundError:
            raise
        except OSError:
            if start >= self.size(name):  # S3 answers an error to a range beyond the end, and to any of an empty file
                return b""
            raise

    def _put(self, url: str, content: bytes) -> None:
        store, path = self._store(url)
        store.pipe_file(path, content)

    def _move(self, source: str, target: str) -> None:
        store, path = self._store(source)
        store.mv(path, self._store(target)[1])

    def _delete(self, url: str) -> None:
        store, path = self._store(url)
        store.rm_file(path)

    def _upload(self, url: str, parts: Iterator[bytes], *, hidden: bool) -> int:
        """Send a long file part by part; returns its bytes. `hidden`: the store shows it only once all are there."""

        def start() -> Any:
            store, path = self._store(url)
            return store.open(path, "wb", block_size=PART_BYTES, autocommit=not hidden)

        file = self._ask("write", url, start)
        written = 0
        try:
            for part in parts:
                self._ask("write", url, partial(file.write, part), repeat=False)
                written += len(part)
            self._ask("write", url, file.close, repeat=False)
            if hidden:
                self._ask("write", url, file.commit, repeat=False)
        except BaseException:
            self._abandon(url, file.discard if hidden else file.close)
            if hidden:
                file.closed = True  # or the driver would send what is left of it when it is collected
            raise
        return written

    def _abandon(self, url: str, call: Callable[[], Any]) -> None:
        """Take back what a failed write left; no other error may hide the one that made it fail."""
        try:
            _within(self.limit_s, call)
        except FileNotFoundError:
            pass
        except Exception as error:
            logger.warning("cannot remove what was sent of %s (%s)", url, _reason(error))

    def _ask(self, doing: str, url: str, call: Callable[[], T], *, repeat: bool = True) -> T:
        """What `call` returns, within the limits. Raises an OSError that says what failed where."""
        give_up = time.monotonic() + self.retry_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                return _within(self.limit_s, call)
            except Exception as error:
                wait = pause * random.uniform(0.5, 1)  # many ranks fail together; they shall not come back together
                if not (repeat and _passing(error)) or time.monotonic() + wait > give_up:
                    raise _failure(doing, url, error) from error
                logger.warning("cannot %s %s (%s); trying again in %.1f s", doing, url, _reason(error), wait)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """What `call` returns, if it does so in time. If not, it is left to itself: no driver can be made to stop."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, name="storage call", daemon=True).start()
    try:
        return answer.result(limit_s)
    except TimeoutError:
        if answer.done():
            raise
        raise TimeoutError(f"no answer within {limit_s:g} s") from None


def _passing(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL) and error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSPC)
    # drivers have exceptions of their own; those for keys that are missing or wrong are named alike
    return not isinstance(error, (TypeError, ValueError, AttributeError)) and "Credentials" not in type(error).__name__


def _failure(doing: str, url: str, error: Exception) -> OSError:
    """The error of any driver as the OSError of the same kind."""
    kinds = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}
    number = next((number for kind, number in kinds.items() if isinstance(error, kind)), None)
    if number is None:
        number = getattr(error, "errno", None) or errno.EIO
    reason = os.strerror(number) if number == errno.ENOENT else f"cannot {doing} it: {_reason(error)}"
    return OSError(number, reason, url)


def _reason(error: Exception) -> str:
    """One line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _regroup(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of exactly `size`, the last one shorter. One piece is in memory, not the file."""
    group = bytearray()
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while rest:
            taken = rest[: size - len(group)]
            group += taken
            rest = rest[len(taken) :]
            if len(group) == size:
                yield bytes(group)
                group.clear()
    if group:
        yield bytes(group)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of `path`; an error of the system while it is open names the file, which the system does not."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def _at_once(file: int, call: Callable[[], int]) -> int:
    """What a system call returns, past the page cache if `file` is open for that and it can be."""
    try:
        return call()
    except OSError as error:
        if error.errno != errno.EINVAL or not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise
        _set_direct(file, False)  # not whole pages, or a file system that cannot do it
        return call()


def _set_direct(file: int, direct: bool) -> None:
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    # A file system that cannot do it says so.
    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)


def _one_part(name: str) -> str:
    """Names come out of files that others wrote: none may lead out of its folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise CheckpointError(f"{name!r} is not the name of a file in a checkpoint")
    return name


def _unfinished(name: str) -> str:
    """A name for the file while it is written; `names` does not show it, `remove` takes it along."""
    return f".{name}.{os.urandom(6).hex()}.part"


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")
