"""Files in every kind of folder: what was written is what is read, and a name shows a whole file or none."""

import errno
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import Fault, Front, faulty_front, make_bucket, s3_settings, without_kept_clients

from goku_mega.checkpoint import storage
from goku_mega.checkpoint.storage import Folder, FsspecFolder, LocalFolder, open_folder
from goku_mega.errors import CheckpointError

MIN_PART = 5 * 2**20  # S3 takes no smaller one, but for the last
LONG = bytes(range(251)) * (2 * MIN_PART // 251 + 5000)  # three parts on S3
FAULTS = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def front(shared_front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """The front without a fault, and short pauses before a call is repeated."""
    shared_front.mend()
    monkeypatch.setattr(storage, "PART_BYTES", MIN_PART)
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.02)
    return shared_front


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Folder:
    """A folder of each kind that does not exist yet."""
    match request.param:
        case "local":
            return open_folder(tmp_path / "run" / "checkpoints")
        case "memory":
            monkeypatch.setattr(storage, "PART_BYTES", 1000)
            return open_folder(f"memory://{uuid.uuid4().hex}/checkpoints")
        case _:
            request.getfixturevalue("front")
            return bucket_folder()


def long_content() -> bytes:
    """More than two parts of a store, as the fixture has set them."""
    return LONG[: 2 * storage.PART_BYTES + 7000]


def bucket_folder(limit_s: float = 20.0, retry_s: float = 20.0) -> FsspecFolder:
    return FsspecFolder(make_bucket(uuid.uuid4().hex) + "/run", limit_s, retry_s)


class TestEveryFolder:
    @FAULTS
    @given(
        pieces=st.lists(st.binary(max_size=2500), max_size=5),
        start=st.integers(0, 8000),
        length=st.none() | st.integers(0, 8000),
    )
    def test_any_range_reads_what_was_written(
        self, folder: Folder, pieces: list[bytes], start: int, length: int | None
    ) -> None:
        content = b"".join(pieces)
        views = [memoryview(piece) if number % 2 else piece for number, piece in enumerate(pieces)]
        assert folder.write("a", iter(views)) == folder.size("a") == len(content)
        wanted = content[start:] if length is None else content[start : start + length]
        assert folder.read("a", start, length) == wanted
        buffer = bytearray(len(wanted))
        folder.read_into("a", start, memoryview(buffer))
        assert buffer == wanted
        with pytest.raises(EOFError):
            folder.read_into("a", start, memoryview(bytearray(max(0, len(content) - start) + 1)))

    def test_a_long_file(self, folder: Folder) -> None:
        content = long_content()
        assert folder.write("long", [content[:10], memoryview(content)[10:]]) == len(content)
        assert folder.read("long") == content
        third = len(content) // 3
        assert folder.read("long", third, 2 * third) == content[third : 3 * third]
        numbers = memoryview(bytearray(8 * (len(content) // 8 - 1))).cast("d")  # any format, not only bytes
        folder.read_into("long", 5, numbers)
        assert numbers.cast("B") == content[5 : 5 + numbers.nbytes]

    def test_pieces_of_numbers_are_written_as_their_bytes(self, folder: Folder) -> None:
        numbers = memoryview(bytes(range(64))).cast("d", (4, 2))
        assert folder.write("numbers", [numbers]) == 64
        assert folder.read("numbers") == bytes(range(64))

    def test_names_show_files_and_folders_directly_inside(self, folder: Folder) -> None:
        assert folder.names() == []
        folder.write("b", [b"1"])
        folder.child("step_5").write("manifest.json", [b"2"])
        folder.child("step_50").child("deep").write("c", [])
        assert folder.names() == ["b", "step_5", "step_50"]
        assert folder.child("step_50").names() == ["deep"]
        assert folder.child("step_50").child("deep").size("c") == 0
        assert folder.child("step_5").name == "step_5"
        assert str(folder.child("step_5")) == f"{folder}/step_5"

    def test_names_show_what_others_wrote_and_removed_since(self, folder: Folder) -> None:
        folder.write("a", [b"1"])
        assert folder.names() == ["a"]
        other = "import sys; from goku_mega.checkpoint.storage import open_folder; f = open_folder(sys.argv[1])\n"
        other += "f.write('a', [b'22']); f.write('b', [b'1'])"
        if isinstance(folder, FsspecFolder) and folder.url.startswith("memory"):
            folder.write("a", [b"22"])
            folder.write("b", [b"1"])
        else:
            subprocess.run([sys.executable, "-c", other, str(folder)], check=True)
        assert folder.names() == ["a", "b"]
        assert folder.size("a") == 2

    def test_remove_takes_all_of_it_and_nothing_else(self, folder: Folder) -> None:
        for name in ("step_5", "step_50"):
            folder.child(name).write("a", [b"1"])
            folder.child(name).child("inner").write("b", [b"2"])
        folder.child("step_5").remove()
        assert folder.names() == ["step_50"]
        assert folder.child("step_5").names() == []
        assert folder.child("step_50").child("inner").read("b") == b"2"
        folder.child("step_5").remove()
        folder.child("never").remove()

    def test_remove_file_takes_only_that_file(self, folder: Folder) -> None:
        for name in ("a", "ab"):
            folder.write(name, [b"1"])
        folder.remove_file("a")
        assert folder.names() == ["ab"]
        folder.remove_file("a")
        folder.child("never").remove_file("a")
        assert folder.names() == ["ab"]

    def test_a_missing_file(self, folder: Folder) -> None:
        folder.child("inner").write("a", [b"1"])
        for ask in (
            lambda: folder.size("no"),
            lambda: folder.read("no"),
            lambda: folder.read("no", 3, 5),
            lambda: folder.read_into("no", 0, memoryview(bytearray(4))),
            lambda: folder.child("nowhere").size("no"),
        ):
            with pytest.raises(FileNotFoundError, match="no"):
                ask()

    @pytest.mark.parametrize("parts", [0, 1, 3])
    def test_a_write_that_fails_shows_nothing_new(self, folder: Folder, parts: int) -> None:
        piece = long_content()[: storage.PART_BYTES - 1]

        def pieces() -> Iterator[bytes]:
            for _ in range(parts):
                yield piece
                assert folder.names() == seen  # nor is it to be seen before it is whole
            raise RuntimeError("the copy was lost")

        seen: list[str] = []
        with pytest.raises(RuntimeError, match="the copy was lost"):
            folder.write("a", pieces())
        assert folder.names() == []
        folder.write("a", [b"before"])
        seen = ["a"]
        with pytest.raises(RuntimeError, match="the copy was lost"):
            folder.write("a", pieces())
        assert folder.names() == ["a"]
        assert folder.read("a") == b"before"
        folder.remove()
        assert folder.names() == []

    def test_no_name_leads_out_of_its_folder(self, folder: Folder) -> None:
        for name in ("", ".", "..", "../a", "a/b", "/etc/passwd", "a\0b"):
            for ask in (folder.child, folder.size, folder.read, lambda name: folder.write(name, [b"1"])):
                with pytest.raises(CheckpointError, match="is not the name of a file"):
                    ask(name)

    def test_free_bytes(self, folder: Folder) -> None:
        free = folder.free_bytes()
        assert free is None if isinstance(folder, FsspecFolder) else free is not None and free > 0


class TestLocal:
    def test_a_kill_in_the_middle_shows_no_file(self, tmp_path: Path) -> None:
        child = textwrap.dedent("""
            import sys, time
            from pathlib import Path
            from goku_mega.checkpoint.storage import LocalFolder
            def pieces():
                yield bytes(3_000_000)
                print("half", flush=True)
                time.sleep(60)
            LocalFolder(Path(sys.argv[1])).write("a", pieces())
        """)
        with subprocess.Popen([sys.executable, "-c", child, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"half\n"
            process.send_signal(signal.SIGKILL)
        folder = LocalFolder(tmp_path / "run")
        assert folder.names() == []
        assert [path.stat().st_size for path in folder.path.iterdir()] == [3_000_000]  # it was in the middle
        with pytest.raises(FileNotFoundError):
            folder.size("a")
        folder.remove()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("room", ["tmpfs", "limit"])
    def test_a_full_disk(self, tmp_path: Path, room: str) -> None:
        folder = LocalFolder(tmp_path / "run")
        with small_tmpfs(folder.path) if room == "tmpfs" else file_size_limit(1_000_000):
            folder.write("small", [b"1"])
            with pytest.raises(OSError, match="run/.*large") as caught:
                folder.write("large", [bytes(600_000), memoryview(bytes(600_000))])
            assert caught.value.errno == (errno.ENOSPC if room == "tmpfs" else errno.EFBIG)
            assert folder.names() == ["small"]
            assert len(list(folder.path.iterdir())) == 1  # and what it took is given back
            folder.write("fits", [bytes(600_000)])

    def test_what_is_written_is_on_the_disk_in_the_right_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[tuple[str, str]] = []
        for call in ("fsync", "rename", "write"):
            monkeypatch.setattr(os, call, record(call, getattr(os, call), done))
        LocalFolder(tmp_path / "run" / "inner").write("a", [b"1", b"2"])
        run, inner = str(tmp_path / "run"), str(tmp_path / "run" / "inner")
        assert done == [
            ("fsync", str(tmp_path)),
            ("fsync", run),
            ("write", "unfinished"),
            ("write", "unfinished"),
            ("fsync", "unfinished"),
            ("rename", "unfinished"),
            ("fsync", inner),
        ]
        done.clear()
        moved = LocalFolder(tmp_path / "run" / "inner").rename_to(tmp_path / "step")
        assert done[0] == ("rename", inner)
        assert set(done[1:]) == {("fsync", run), ("fsync", str(tmp_path))}
        assert moved.read("a") == b"12"
        moved.child("b").write("c", [b""])
        with pytest.raises(OSError):
            LocalFolder(moved.path / "b").rename_to(tmp_path)
        assert moved.child("b").names() == ["c"]

    def test_a_system_that_writes_and_reads_little_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, preadv, pread = os.write, os.preadv, os.pread
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
        monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:5]], at))
        monkeypatch.setattr(os, "pread", lambda file, count, at: pread(file, min(count, 3), at))
        folder, content = LocalFolder(tmp_path), bytes(range(100))
        assert folder.write("a", [content]) == 100
        assert folder.read("a", 1) == content[1:]
        buffer = bytearray(90)
        folder.read_into("a", 4, memoryview(buffer))
        assert buffer == content[4:94]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        sizes=st.lists(st.sampled_from([1, 4095, 4096, 4097, 3 * 4096, 5 * 4096 + 512]), min_size=1, max_size=4),
        shifts=st.lists(st.sampled_from([0, 0, 0, 1, 512]), min_size=4, max_size=4),
        start=st.sampled_from([0, 1, 511, 512, 4096, 8192]),
        shift=st.sampled_from([0, 0, 8]),
    )
    def test_past_the_page_cache_and_through_it_the_bytes_are_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], shifts: list[int], start: int,
        shift: int,
    ) -> None:  # fmt: skip
        """Whole pages of memory and parts of them: the system takes only whole ones to the disk itself."""
        monkeypatch.setattr(storage, "DIRECT_BYTES", 4096)
        pieces = []
        for size, off in zip(sizes, shifts, strict=False):
            memory = memoryview(mmap.mmap(-1, 2 * 4096 + 6 * 4096))[off : off + size]  # starts a page, but for `off`
            memory[:] = random.randbytes(size)
            pieces.append(memory)
        content = b"".join(pieces)
        folder = LocalFolder(tmp_path)
        assert folder.write("a", pieces) == len(content)
        assert (tmp_path / "a").read_bytes() == content
        wanted = content[start:]
        buffer = memoryview(mmap.mmap(-1, len(wanted) + 4096))[shift : shift + len(wanted)]
        folder.read_into("a", min(start, len(content)), buffer)
        assert buffer == wanted

    def test_free_bytes_of_a_folder_that_is_still_to_be_made(self, tmp_path: Path) -> None:
        with small_tmpfs(tmp_path / "small"):
            free = LocalFolder(tmp_path / "small" / "run" / "checkpoints").free_bytes()
            assert free is not None and 0 < free <= 2**20


class TestOpen:
    def test_paths_and_urls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for place in (tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a", "a"):
            folder = open_folder(place)
            assert isinstance(folder, LocalFolder)
            folder.write("x", [str(place).encode()])
            assert (tmp_path / "a" / "x").read_text() == str(place)
        assert str(open_folder("memory://bucket/run/")) == "memory://bucket/run/"
        assert open_folder("memory://bucket/run/").name == "run"
        assert str(open_folder("memory://bucket/run/").child("x")) == "memory://bucket/run/x"

    def test_a_missing_driver_is_named_with_its_command_and_nothing_is_imported_early(self, tmp_path: Path) -> None:
        child = textwrap.dedent("""
            import sys
            sys.modules["s3fs"] = None
            from goku_mega.checkpoint.storage import open_folder
            open_folder(sys.argv[1]).write("a", [b"1"])
            assert not {"torch", "numpy", "fsspec", "aiohttp"} & set(sys.modules), "imported early"
            try:
                open_folder("s3://bucket/run")
            except Exception as error:
                print(type(error).__name__, error)
        """)
        result = subprocess.run([sys.executable, "-c", child, tmp_path], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines() == [
            "CheckpointError s3://bucket/run: the driver of s3:// is not installed; pip install s3fs"
        ]


class TestFailingStore:
    """Every fault ends in success or in one clear error, in time, and no name shows half a file."""

    @pytest.mark.parametrize(
        "fault",
        [Fault(status=500), Fault(status=503), Fault(drop=True), Fault(drop_after=True), Fault(delay_s=0.1)],
        ids=["500", "503", "drop", "drop-after", "slow"],
    )
    def test_a_fault_that_passes(self, front: Front, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
        folder = bucket_folder()
        content = LONG[: MIN_PART // 5]
        for work in (
            lambda: folder.write("a", [content]),
            lambda: folder.size("a"),
            lambda: folder.read("a"),
            lambda: folder.names(),
            lambda: folder.remove_file("b"),
            lambda: folder.write("a", [content, b"more"]),
        ):
            front.fail(fault, times=2)
            work()
        front.fail(fault, times=2)
        assert folder.read("a") == content + b"more"
        front.fail(fault, times=2)
        folder.remove()
        assert folder.names() == []
        if fault.status:  # the driver repeats other faults itself, and says nothing
            assert any("trying again" in record.message and folder.url in record.message for record in caplog.records)

    def test_an_answer_cut_off_in_the_middle(self, front: Front) -> None:
        folder = bucket_folder()
        folder.write("a", [LONG])
        front.fail(Fault(cut=True), times=3, method="GET")
        assert folder.read("a") == LONG

    @pytest.mark.parametrize("work", ["put", "start", "part", "complete", "read", "names", "size", "remove"])
    def test_a_fault_that_stays(self, front: Front, work: str) -> None:
        check_fault_that_stays(front, Fault(status=503), work)

    @pytest.mark.parametrize("work", ["put", "part", "complete", "read", "names"])
    def test_a_server_that_says_nothing(self, server: str, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "PART_BYTES", MIN_PART)
        # of its own: connections that hang are not free for other tests
        with faulty_front(server) as front, s3_settings(front.endpoint):
            check_fault_that_stays(front, Fault(deaf=True), work)

    def test_an_upload_that_fails_leaves_no_parts_behind(self, front: Front) -> None:
        import fsspec

        folder = bucket_folder()
        front.fail(Fault(status=403), method="PUT", path="partNumber=2")
        with pytest.raises(PermissionError, match=folder.url):
            folder.write("a", [LONG])
        bucket = folder.url.split("/")[2]
        assert not fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")
        assert folder.names() == []

    def test_the_driver_repeats_a_part_by_itself(self, front: Front) -> None:
        folder = bucket_folder()
        with s3_settings(front.endpoint, AWS_MAX_ATTEMPTS="3"):
            front.fail(Fault(status=503), times=2, method="PUT", path="partNumber=2")
            folder.write("a", [LONG])
            assert [path.partition("?")[2][:12] for method, path in front.seen if "partNumber=2" in path] != []
        assert folder.read("a") == LONG

    def test_an_object_that_the_store_does_not_delete(self, front: Front) -> None:
        folder = bucket_folder(retry_s=0)
        folder.write("a", [b"1"])
        refusal = b"<DeleteResult><Error><Key>run/a</Key><Code>AccessDenied</Code></Error></DeleteResult>"
        front.fail(Fault(status=200, body=refusal), method="POST", path="delete")
        with pytest.raises(OSError, match="the store kept 1 of its files"):
            folder.remove()
        assert folder.names() == ["a"]

    def test_nobody_there(self, server: str) -> None:
        folder = FsspecFolder("s3://bucket/run", limit_s=20, retry_s=0)
        nobody = s3_settings("http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
        with nobody, pytest.raises(OSError, match="cannot list it: .*127.0.0.1:9.*s3://bucket/run"):
            folder.names()

    def test_no_keys(self, front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("HOME", "/nonexistent")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with without_kept_clients(), pytest.raises(OSError, match="[Cc]redentials"):
            FsspecFolder("s3://bucket/run").names()
        assert "trying again" not in caplog.text


def check_fault_that_stays(front: Front, fault: Fault, work: str) -> None:
    folder = bucket_folder()
    folder.write("old", [LONG[:100_000]])
    method, path, call = works(replace(folder, limit_s=0.7, retry_s=0.3))[work]
    front.fail(fault, method=method, path=path)
    started = time.monotonic()
    with pytest.raises(OSError, match=f"cannot .*{folder.url}") as caught:
        call()
    assert time.monotonic() - started < 60
    assert not isinstance(caught.value, FileNotFoundError)
    assert "\n" not in str(caught.value)
    front.mend()
    assert folder.names() == ["old"]
    assert folder.read("old") == LONG[:100_000]


def works(folder: FsspecFolder) -> dict[str, tuple[str, str, Callable[[], object]]]:
    """Method and path of the request that a fault is to meet, and the work that makes the request."""

    def long() -> object:
        return folder.write("long", [LONG])

    return {
        "put": ("PUT", "short", lambda: folder.write("short", [b"1"])),
        "start": ("POST", "uploads", long),
        "part": ("PUT", "partNumber=2", long),
        "complete": ("POST", "uploadId", long),
        "read": ("GET", "old", lambda: folder.read("old")),
        "names": ("GET", "list-type", folder.names),
        "size": ("HEAD", "old", lambda: folder.size("old")),
        "remove": ("POST", "delete", folder.remove),
    }


@contextmanager
def small_tmpfs(path: Path) -> Iterator[None]:
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def record(name: str, call: Callable, done: list[tuple[str, str]]) -> Callable:
    """`call`, which also writes down its name and the path it works on."""

    def recorded(target: int | Path, *rest: object) -> object:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        done.append((name, "unfinished" if path.endswith(".part") else path))
        return call(target, *rest)

    return recorded
