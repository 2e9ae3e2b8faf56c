"""Bytes of shards from any storage: the right ones, or one line; what storage did wrong is borne and counted."""

import os
import threading
import time
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_store import reads_meet, upload
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import Fault, faulty_front, make_bucket, s3_server, s3_settings

from goku_mega.data import insisting
from goku_mega.data.insisting import ReadRules
from goku_mega.data.shard_cache import RangeCache
from goku_mega.data.shard_store import ByteRange, LocalStore, RemoteStore, checksum_of, open_store
from goku_mega.errors import DataError

FILES = {f"shards/{number:05d}.tar": np.random.default_rng(number).bytes(200_000) for number in range(3)}
QUICK = ReadRules(retries=4, slow_s=0.2)
RANGES = st.lists(
    st.tuples(st.sampled_from(sorted(FILES)), st.integers(0, 199_000), st.integers(1, 1000)), min_size=1, max_size=30
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("store")
    (place / "shards").mkdir()
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    return place


@pytest.fixture(scope="module")
def url(folder) -> str:
    return upload(folder, "faulty://bucket/data")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(insisting, "FIRST_PAUSE_S", 0.001)


def content_of(wanted: ByteRange) -> bytes:
    return FILES[wanted.file][wanted.start : wanted.end]


@settings(max_examples=30, deadline=None)
@given(ranges=RANGES, threads=st.integers(1, 4), is_local=st.booleans(), has_cache=st.booleans())
def test_every_range_has_its_bytes_whatever_the_store_reads_together(
    folder, url, tmp_path_factory, ranges, threads, is_local, has_cache
):
    wanted = list(dict.fromkeys(ByteRange(*one) for one in ranges))
    cache = RangeCache(tmp_path_factory.mktemp("cache"), 10**6, identity="a") if has_cache else None
    store = open_store(folder if is_local else url, threads=threads, cache=cache)
    for _ in range(2):
        fetch = store.start(wanted)
        assert [bytes(fetch(one)) for one in wanted] == [content_of(one) for one in wanted]
    if has_cache and not is_local:
        assert store.counts.cache_hits >= len(wanted)
    store.close()


def test_neighbours_are_one_request_and_strangers_are_not(url):
    store = RemoteStore(url)
    name = "shards/00000.tar"
    near = [ByteRange(name, start, 500) for start in (1000, 0, 2048)]
    far = [ByteRange(name, 150_000, 10), ByteRange("shards/00001.tar", 10, 10)]
    with reads_meet(lambda path, number: None) as reads:
        fetch = store.start(near + far)
        assert [bytes(fetch(one)) for one in near + far] == [content_of(one) for one in near + far]
    store.close()
    assert len(reads) == store.counts.requests == 3
    assert store.counts.bytes == 2548 + 20


def test_failed_and_short_reads_are_repeated_and_counted(url):
    def rule(path: str, number: int) -> bytes | None:
        if number == 1:
            raise ConnectionResetError("the store hung up")
        if number == 2:
            raise RuntimeError("a driver's own error")
        return b"short" if number == 3 else None

    store, wanted = RemoteStore(url, QUICK), ByteRange("shards/00001.tar", 70, 900)
    with reads_meet(rule):
        assert bytes(store.start([wanted])(wanted)) == content_of(wanted)
    assert (store.counts.failures, store.counts.slow, store.counts.requests) == (3, 0, 1)
    store.close()


def with_checksum(wanted: ByteRange) -> ByteRange:
    return wanted._replace(checksum=checksum_of(content_of(wanted)))


def test_other_bytes_than_were_written_are_asked_for_again(url):
    """One flipped bit in one of two ranges that come in one answer."""
    near = [with_checksum(ByteRange("shards/00001.tar", start, 500)) for start in (70, 700)]
    whole = bytearray(content_of(ByteRange("shards/00001.tar", 70, 1130)))
    whole[900] ^= 4
    store = RemoteStore(url, QUICK)
    with reads_meet(lambda path, number: bytes(whole) if number < 3 else None):
        fetch = store.start(near)
        assert [bytes(fetch(wanted)) for wanted in near] == [content_of(wanted) for wanted in near]
    assert (store.counts.failures, store.counts.requests) == (2, 1)
    store.close()


def test_bytes_that_stay_wrong_are_named(url, folder):
    wanted = ByteRange("shards/00001.tar", 70, 900, checksum=5)
    store = RemoteStore(url, QUICK)
    with reads_meet(lambda path, number: None) as reads, pytest.raises(DataError, match="not the bytes that were wr"):
        store.start([wanted])(wanted)
    assert len(reads) == 5
    store.close()
    with pytest.raises(DataError, match=r"at byte 70 \(they are not the bytes.*\); encode the data set again"):
        LocalStore(folder).read(wanted)


def test_what_a_cache_keeps_of_another_data_set_in_the_same_place_is_not_served(url, tmp_path):
    cache = RangeCache(tmp_path, 10**6, identity="a")
    wanted = with_checksum(ByteRange("shards/00001.tar", 70, 900))
    cache.put(wanted.file, wanted.start, memoryview(bytes(wanted.length)))
    store = RemoteStore(url, QUICK, cache=cache)
    assert bytes(store.start([wanted])(wanted)) == content_of(wanted) and store.counts.cache_hits == 0
    assert bytes(store.start([wanted])(wanted)) == content_of(wanted) and store.counts.cache_hits == 1
    store.close()


def test_a_slow_read_is_asked_for_again_beside_the_first(url):
    over = threading.Event()

    def rule(path: str, number: int) -> None:
        if number == 1:
            over.wait(60)

    store, wanted = RemoteStore(url, QUICK), ByteRange("shards/00001.tar", 70, 900)
    with reads_meet(rule):
        assert bytes(store.start([wanted])(wanted)) == content_of(wanted)
    over.set()
    assert (store.counts.failures, store.counts.slow) == (0, 1)
    store.close()


def test_a_store_that_stays_away_is_one_line_with_the_place(url):
    def away(path: str, number: int) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    store, wanted = RemoteStore(url, QUICK), ByteRange("shards/00001.tar", 70, 900)
    with reads_meet(away) as reads:
        fetch = store.start([wanted])
        with pytest.raises(DataError, match=r"faulty://bucket/data/shards/00001.tar cannot be read at byte 70 "
                           r"\(.*[Rr]efused\), 5 times over; .*data.read_retries") as caught:  # fmt: skip
            fetch(wanted)
    assert len(reads) == 5 and "\n" not in str(caught.value)
    store.close()


def test_what_cannot_get_better_is_said_at_once(url, folder):
    def refused(path: str, number: int) -> None:
        raise PermissionError(13, "Permission denied")

    store, wanted = RemoteStore(url, QUICK), ByteRange("shards/00001.tar", 70, 900)
    with reads_meet(refused) as reads:
        with pytest.raises(DataError, match="Permission denied.*; see to the place and the right"):
            store.start([wanted])(wanted)
        with pytest.raises(FileNotFoundError), reads_meet(lambda path, number: None):
            store.content("nothing")
    assert len(reads) == 1
    store.close()
    beyond = ByteRange("shards/00001.tar", 199_990, 900)
    with pytest.raises(DataError, match=r"ends at byte 200000, before byte 200890\); encode the data set again"):
        LocalStore(folder).read(beyond)


def test_a_local_file_that_was_away_is_opened_again(folder, tmp_path):
    """As on a file server that went down: the next try has the file again."""
    name, shard = "shards/00000.tar", tmp_path / "shards" / "00000.tar"
    (tmp_path / "shards").mkdir()
    shard.symlink_to("/proc/self/mem")  # reading its first bytes is an input/output error
    store = LocalStore(tmp_path, ReadRules(retries=100))
    timer = threading.Timer(0.1, lambda: os.replace(link, shard))
    link = tmp_path / "link"
    link.symlink_to(folder / name)
    timer.start()
    wanted = ByteRange(name, 0, 100)
    assert bytes(store.read(wanted)) == content_of(wanted)
    assert store.counts.failures >= 1
    store.close()


def test_closing_a_store_that_hangs_ends_its_threads(url):
    over = threading.Event()
    before = threading.active_count()
    store = RemoteStore(url, ReadRules(slow_s=60), threads=2)
    wanted = [ByteRange(name, 0, 10) for name in FILES]
    with reads_meet(lambda path, number: over.wait(60) and None) as reads:
        fetch = store.start(wanted)
        while len(reads) < 2:
            time.sleep(0.001)
        store.close()
        with pytest.raises(DataError, match="the reading was stopped"):
            fetch(wanted[0])
    over.set()
    while threading.active_count() > before:  # the calls themselves, which nothing can stop
        time.sleep(0.001)


@pytest.mark.slow
def test_an_object_store_that_fails_is_read_all_the_same(folder):
    """A real S3 driver and server, with a front between them that fails in every way a store does."""
    with s3_server() as server, faulty_front(server) as front, s3_settings(front.endpoint, AWS_MAX_ATTEMPTS="1"):
        place = upload(folder, f"{make_bucket(uuid.uuid4().hex)}/data")
        fsspec.filesystem("s3").retries = 1  # the driver's own repeating would hide ours
        wanted = [ByteRange(name, start, 777) for name in FILES for start in (5, 100_000, 199_000)]
        # A connection that was dropped is tried again by the driver itself, once.
        faults = ((Fault(status=503), 3), (Fault(drop=True), 8), (Fault(cut=True), 3), (Fault(deaf=True), 3))
        for fault, times in faults:
            store = open_store(place, ReadRules(retries=100, slow_s=0.3), threads=4)
            front.fail(fault, times=times, method="GET")
            fetch = store.start(wanted)
            assert [bytes(fetch(one)) for one in wanted] == [content_of(one) for one in wanted]
            assert store.counts.failures + store.counts.slow >= 1, fault
            store.close()
