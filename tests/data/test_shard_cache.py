"""The cache on a node's disk: right bytes or none, never more than its limit, whoever else uses it or dies."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from goku_mega.data.shard_cache import USAGE, RangeCache
from goku_mega.errors import DataError

PIECES = {(f"{shard}.tar", start): np.random.default_rng(start).bytes(1000 + start % 700) for shard in "ab"
          for start in range(0, 64 * 512, 512)}  # fmt: skip
LIMIT = 20_000


def bytes_in(folder: Path) -> int:
    """Of all files that are finished, except the count itself."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.name != USAGE and path.suffix != ".part":
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue  # removed by another process just now
    return total


def keep(cache: RangeCache, piece: tuple[str, int]) -> None:
    cache.put(*piece, memoryview(PIECES[piece]))


def kept(cache: RangeCache, piece: tuple[str, int]) -> bool:
    content = cache.get(*piece, len(PIECES[piece]))
    assert content is None or bytes(content) == PIECES[piece]
    return content is not None


def use(folder: Path, seed: int, rounds: int) -> None:
    """A process that puts and gets at random, and fails at any wrong byte."""
    cache, rng = RangeCache(folder, LIMIT, identity="d"), random.Random(seed)
    for _ in range(rounds):
        piece = rng.choice(list(PIECES))
        if not kept(cache, piece):
            keep(cache, piece)


def start(folder: Path, seed: int, rounds: int) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=use, args=(folder, seed, rounds))
    process.start()
    return process


def test_what_was_kept_is_there_after_a_restart_and_is_this_data_sets_own(tmp_path):
    piece = ("a.tar", 512)
    keep(RangeCache(tmp_path, LIMIT, identity="one"), piece)
    assert kept(RangeCache(tmp_path, LIMIT, identity="one"), piece)
    assert not kept(RangeCache(tmp_path, LIMIT, identity="another"), piece)


def paths(cache: Path, name: str) -> list[Path]:
    return sorted((cache / name).rglob("*-*"))


def test_a_full_cache_keeps_what_it_has(tmp_path):
    """Of every epoch, whatever its order, it answers the share that fits."""
    limit = sum(map(len, PIECES.values())) // 2
    order, hits = random.Random(0), []
    for _ in range(4):
        cache = RangeCache(tmp_path, limit, identity="d")  # of a command that was started anew
        for _ in range(2):
            hits.append(0)
            for piece in order.sample(list(PIECES), len(PIECES)):
                hits[-1] += kept(cache, piece)
                keep(cache, piece)
    assert hits[0] == 0 and min(hits[1:]) > 0.45 * len(PIECES)
    assert bytes_in(tmp_path) <= limit


def test_what_another_data_set_left_longest_ago_makes_room(tmp_path):
    old = RangeCache(tmp_path, LIMIT, identity="old")
    for piece in PIECES:
        keep(old, piece)
    for age, path in enumerate(paths(tmp_path, "old")):
        os.utime(path, (0, 1000 + age))
    before = paths(tmp_path, "old")
    new, pieces = RangeCache(tmp_path, LIMIT, identity="new"), list(PIECES)
    keep(new, pieces[0])
    gone = len(before) - len(paths(tmp_path, "old"))
    assert gone and paths(tmp_path, "old") == before[gone:], "no more than needed, the oldest"
    for piece in pieces:
        keep(new, piece)
    assert not paths(tmp_path, "old") and kept(new, pieces[0]) and LIMIT / 2 < bytes_in(tmp_path) <= LIMIT


def test_two_data_sets_in_use_leave_each_others_files(tmp_path):
    pieces = list(PIECES)
    one, two = (RangeCache(tmp_path, LIMIT, identity=name) for name in ("one", "two"))
    for piece in pieces[:8]:
        keep(one, piece)
    for piece in pieces:
        keep(two, piece)
    assert all(kept(one, piece) for piece in pieces[:8]) and kept(two, pieces[0])


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:50] + b"!" + data[51:],
                                    lambda data: data + b"more"])  # fmt: skip
def test_a_damaged_file_is_not_served_and_goes(tmp_path, damage):
    cache, piece = RangeCache(tmp_path, LIMIT, identity="d"), ("a.tar", 1024)
    keep(cache, piece)
    (path,) = (tmp_path / "d").rglob("1024-*")
    path.write_bytes(damage(path.read_bytes()))
    assert not kept(cache, piece) and not path.exists()
    keep(cache, piece)
    assert kept(cache, piece)


def test_processes_that_share_the_folder_share_its_limit(tmp_path):
    processes = [start(tmp_path, seed, 400) for seed in range(3)]
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, bytes_in(tmp_path))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    # Files are counted one after the other, so some are seen that went before others came.
    assert most <= 1.5 * LIMIT and LIMIT / 2 < bytes_in(tmp_path) <= LIMIT


def test_processes_that_are_killed_leave_nothing_wrong(tmp_path):
    for seed in range(4):
        process = start(tmp_path, seed, 10**9)
        time.sleep(0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        use(tmp_path, seed, 100)
        assert bytes_in(tmp_path) <= LIMIT


def test_what_a_killed_process_left_unfinished_goes(tmp_path):
    RangeCache(tmp_path, LIMIT, identity="d")
    old, new = tmp_path / "d" / "old.part", tmp_path / "d" / "new.part"
    for path in (old, new):
        path.write_bytes(bytes(30_000))
    os.utime(old, (0, 0))
    RangeCache(tmp_path, LIMIT, identity="d")
    assert not old.exists() and new.exists()


def test_a_smaller_limit_and_a_lost_count_are_heeded(tmp_path):
    cache = RangeCache(tmp_path, LIMIT, identity="d")
    for piece in list(PIECES)[:12]:
        keep(cache, piece)
    RangeCache(tmp_path, 5000, identity="d")
    assert 0 < bytes_in(tmp_path) <= 5000
    (tmp_path / USAGE).write_bytes(b"nonsense")
    for piece in PIECES:
        keep(cache, piece)
    assert LIMIT / 2 < bytes_in(tmp_path) <= LIMIT


def test_a_cache_that_cannot_be_is_refused_and_one_that_fails_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="data.cache_folder=.*file cannot be used"):
        RangeCache(tmp_path / "file", LIMIT, identity="d")
    cache, piece = RangeCache(tmp_path / "cache", LIMIT, identity="d"), ("a.tar", 512)
    (tmp_path / "cache" / "d" / "a.tar").write_bytes(b"in the way of the folder")
    keep(cache, piece)
    keep(cache, piece)
    assert not kept(cache, piece)
    assert caplog.text.count("what it does not hold is read again") == 1
