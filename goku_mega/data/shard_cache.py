"""Ranges of remote shards on the node's own disk, up to a limit of bytes; a full cache keeps what it has.

An epoch uses every sample of its data set once, in an order of its own, so no sample is worth the place of another: a
cache of half the data set answers half of the reads. If what was used longest ago made room, it would answer an eighth.
Only what other data sets left here makes room, and what is over a limit that has been lowered.

Any number of processes share a folder and its limit, and may be killed at any moment. A file is served only if its
checksum is right. What goes wrong here costs time, never a run: a cache that fails is done without.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from goku_mega.errors import DataError

USAGE = "usage"
"""The file with the number of bytes in the folder. Whoever adds to the folder holds its lock."""
USAGE_DIGITS = 20
CHECKSUM_BYTES = 8
"""Before the content of every file: its xxh3."""
KEPT_SHARE = 0.9
"""Other data sets' files go until this share of the limit is used: finding out what is old means looking at all."""
ABANDONED_S = 600.0
"""An unfinished file that has not changed for so long is of a process that was killed."""
_UNFINISHED = ".part"

logger = logging.getLogger(__name__)


class RangeCache:
    """The cached ranges of one data set; several threads may use it."""

    def __init__(self, folder: Path, limit_bytes: int, *, identity: str) -> None:
        """
        Args:
            limit_bytes: for all data sets in the folder together.
            identity: a name that tells this data set from any other, and from itself encoded anew.

        Raises:
            DataError: the folder cannot be made or written to.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._mine = folder / identity
        self._opened_s = time.time()
        self._is_full = False
        self._has_warned = False
        try:
            self._mine.mkdir(parents=True, exist_ok=True)
            with self._locked() as usage:
                _record(usage, self._trimmed(limit_bytes, spare_mine=False))
        except OSError as error:
            raise DataError(
                f"data.cache_folder={folder} cannot be used ({error.strerror}); give a folder on the node's own disk"
            ) from error

    def get(self, file: str, start: int, length: int) -> memoryview | None:
        """The bytes, if they are here and intact; writable."""
        path = self._path(file, start, length)
        buffer = bytearray(CHECKSUM_BYTES + length)
        try:
            with open(path, "rb", buffering=0) as stored:
                whole = stored.readinto(buffer) == len(buffer) and not stored.read(1)
            content = memoryview(buffer)[CHECKSUM_BYTES:]
            if not whole or xxhash.xxh3_64_digest(content) != buffer[:CHECKSUM_BYTES]:
                logger.warning("%s is damaged; it is read from the store again", path)
                os.unlink(path)
                return None
            os.utime(path)  # its last use; file systems do not keep it by themselves
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        return content

    def put(self, file: str, start: int, content: memoryview) -> None:
        """Keep the bytes, if there is room, or if there is something of another data set that no one uses now."""
        size = CHECKSUM_BYTES + len(content)
        if self._is_full or size > KEPT_SHARE * self.limit_bytes:
            return
        path = self._path(file, start, len(content))
        unfinished = f"{path}.{os.getpid()}.{threading.get_ident()}{_UNFINISHED}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(unfinished, "wb") as target:
                target.write(xxhash.xxh3_64_digest(content))
                target.write(content)
            with self._locked() as usage:
                used = _recorded(usage)
                if used is None or used + size > self.limit_bytes:
                    used = self._trimmed(int(KEPT_SHARE * self.limit_bytes) - size, spare_mine=True)
                self._is_full = used + size > self.limit_bytes
                if self._is_full:
                    _record(usage, used)
                    os.unlink(unfinished)
                    return
                _record(usage, used + size)  # first: whoever is killed here has said too much, not too little
                os.replace(unfinished, path)
        except OSError as error:
            self._warn(error)
            with suppress(OSError):
                os.unlink(unfinished)

    def _path(self, file: str, start: int, length: int) -> str:
        """Not a `Path`: Python would note the parts of every one in a table that grows by that."""
        return f"{self._mine}/{file.replace('/', '~')}/{start}-{length}"

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The usage file, locked against other processes and, since each opens it anew, other threads."""
        usage = os.open(self.folder / USAGE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(usage, fcntl.LOCK_EX)
            yield usage
        finally:
            os.close(usage)

    def _trimmed(self, limit_bytes: int, *, spare_mine: bool) -> int:
        """Bytes of all finished files, after the removal of those used longest ago that do not fit into the limit.

        Other data sets' go first. `spare_mine`: those of this one stay, and what others have used meanwhile.
        """
        finished: list[tuple[bool, float, int, str]] = []
        for folder, _, names in os.walk(self.folder):
            is_mine = folder.startswith(f"{self._mine}/")
            for name in names:
                path = os.path.join(folder, name)
                with suppress(FileNotFoundError):
                    about = os.stat(path)
                    if not name.endswith(_UNFINISHED):
                        finished.append((is_mine, about.st_mtime, about.st_size, path))
                    elif time.time() - about.st_mtime > ABANDONED_S:
                        os.unlink(path)
        finished = [file for file in finished if file[3] != str(self.folder / USAGE)]
        used = sum(size for _, _, size, _ in finished)
        for is_mine, last_use_s, size, path in sorted(finished):
            if used <= limit_bytes or (spare_mine and (is_mine or last_use_s >= self._opened_s)):
                break  # sorted: what comes after is newer, or mine
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("data.cache_folder=%s fails (%s); what it does not hold is read again", self.folder, error)


def _recorded(usage: int) -> int | None:
    """The number in the usage file; None where there is none."""
    digits = os.pread(usage, USAGE_DIGITS, 0)
    return int(digits) if len(digits) == USAGE_DIGITS and digits.isdigit() else None


def _record(usage: int, used: int) -> None:
    os.pwrite(usage, b"%0*d" % (USAGE_DIGITS, used), 0)
