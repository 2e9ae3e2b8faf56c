"""Defects of torch.distributed.checkpoint, each shown at work in torch, and the same scenario without it here."""

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_cases import differences, find_latest, names_in, open_checkpoint, state
from strace import READING, bytes_read, traced, unavailable
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Split

from goku_mega.checkpoint.commit import OWNER
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.load import load_info, load_into
from goku_mega.checkpoint.save import Saver, save_checkpoint
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Copies, Shard
from launch import RankFailed, run_ranks, start_ranks

pytestmark = pytest.mark.slow

LIMIT_S = 60


# --- An error in one of the threads that write -----------------------------------------------------------------------


def limit_file_size(limit_bytes: int) -> None:
    """The disk takes files up to this size, and refuses more with an OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


def torch_saves_with_two_threads(rank: int, root: Path) -> list[str]:
    """How each of ten saves ended of which one file is too large for the disk."""
    limit_file_size(64 * 1024)
    ended = []
    for number in range(10):
        tensors = {"large": torch.ones(1_000_000), "small": torch.ones(10)}
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(root / f"{number}", thread_count=2))
            ended.append("saved")
        except CheckpointException:
            ended.append("raised")
    return ended


def test_torch_publishes_a_checkpoint_though_a_thread_could_not_write_its_part(tmp_path: Path) -> None:
    [ended] = run_ranks(torch_saves_with_two_threads, 1, tmp_path)
    assert "saved" in ended  # whenever the helper thread, and not the main one, came to the large file first
    path = tmp_path / str(ended.index("saved"))
    assert (path / ".metadata").exists()
    target = {"large": torch.zeros(1_000_000), "small": torch.zeros(10)}
    with warnings.catch_warnings(), pytest.raises(CheckpointException):
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=path)


def we_save_on_the_same_disk(rank: int, folder: Path) -> str:
    save_checkpoint(folder, 1, {"model": {"small": ones(10)}}, {}, keep=2)
    limit_file_size(64 * 1024)
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(folder, 2, {"model": {"large": ones(1_000_000), "small": ones(10)}}, {}, keep=2)
    return str(error.value)


def ones(length: int) -> Shard:
    return Shard(torch.ones(length), (length,), (0,))


def test_we_raise_and_publish_nothing_if_a_part_could_not_be_written(tmp_path: Path) -> None:
    [said] = run_ranks(we_save_on_the_same_disk, 1, tmp_path)
    assert "step 2" in said
    assert "File too large" in said
    assert "\n" not in said
    assert sorted(os.listdir(tmp_path)) == [OWNER, "step_00000001"]


# --- A flipped bit ---------------------------------------------------------------------------------------------------


def flip_a_bit(file: Path, of: bytes) -> None:
    """Flip one bit of these bytes where they lie in the file."""
    content = bytearray(file.read_bytes())
    position = content.index(of)
    content[position + len(of) // 2] ^= 1
    file.write_bytes(content)


def test_torch_loads_a_flipped_bit_in_silence(tmp_path: Path) -> None:
    saved = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"weight": saved}, checkpoint_id=tmp_path)
        flip_a_bit(tmp_path / "__0_0.distcp", saved.numpy().tobytes())
        target = {"weight": torch.zeros(1000)}
        dcp.load(target, checkpoint_id=tmp_path)
    assert (target["weight"] != saved).sum() == 1


def test_we_refuse_a_flipped_bit(tmp_path: Path) -> None:
    saved = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights = {"model": {"weight": Shard(saved, (1000,), (0,))}}
    path = save_checkpoint(tmp_path, 1, weights, {}, keep=1)
    flip_a_bit(path / "__0_0.distcp", saved.numpy().tobytes())
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        find_latest(tmp_path)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        open_checkpoint(path)


# --- Saving over the last checkpoint ---------------------------------------------------------------------------------


def torch_saves_over_and_one_rank_dies(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for value in (1.0, 2.0):
        weight = distribute_tensor(torch.full((8,), value), mesh, [Split(0)])
        if rank == 1 and value == 2.0:
            sys.addaudithook(die_before_writing(folder / "__1_0.distcp", after=folder / "__0_0.distcp"))
        dcp.save({"weight": weight}, checkpoint_id=folder)
        dist.barrier()


def die_before_writing(file: Path, after: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """A kill at the moment that one file has been written anew, and the other not yet."""
    before, die = after.stat(), die_before_opening(str(file))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(file) and "w" in str(arguments[1]):
            deadline = time.monotonic() + LIMIT_S
            while time.monotonic() < deadline:
                now = after.stat()
                if now.st_size == before.st_size and now.st_mtime_ns > before.st_mtime_ns:
                    break
                time.sleep(0.01)
            die(event, arguments)

    return hook


def test_torch_loads_a_mixture_of_two_steps(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="exit code -9"):
        run_ranks(torch_saves_over_and_one_rank_dies, 2, tmp_path)
    target = {"weight": torch.zeros(8)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=tmp_path)
    assert target["weight"].tolist() == [2.0] * 4 + [1.0] * 4


def we_save_and_one_rank_dies(rank: int, folder: Path) -> None:
    save_checkpoint(folder, 1, state("rows", rank, 2, step=1), {}, keep=1)
    if rank == 1:
        sys.addaudithook(die_before_opening("__1_0.distcp"))
    save_checkpoint(folder, 2, state("rows", rank, 2, step=2), {}, keep=1)


def die_before_opening(name: str) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and name in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_we_keep_the_older_step_whole(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="exit code -9"):
        run_ranks(we_save_and_one_rank_dies, 2, tmp_path)
    path = find_latest(tmp_path)
    assert path is not None
    assert load_info(path)["step"] == 1
    mine = state("columns", step=None)
    load_into(path, mine)
    assert differences(mine, 1) == []


# --- What each rank says under the same name -------------------------------------------------------------------------


def torch_saves_objects_of_each_rank(rank: int, folder: Path) -> dict[str, int]:
    dcp.save({"loader": {"position": 100 + rank, "seed": rank}}, checkpoint_id=folder)
    target = {"loader": {"position": -1, "seed": -1}}
    dcp.load(target, checkpoint_id=folder)
    return target["loader"]


def test_torch_mixes_the_objects_of_the_ranks(tmp_path: Path) -> None:
    loaded = run_ranks(torch_saves_objects_of_each_rank, 2, tmp_path)
    saved = [{"position": 100 + rank, "seed": rank} for rank in (0, 1)]
    assert loaded[0] == loaded[1]
    assert loaded[0] not in saved


def we_save_info_of_each_rank(rank: int, folder: Path) -> dict[str, int]:
    info = {"loader": {"position": 100 + rank, "seed": rank}}
    return load_info(save_checkpoint(folder, 1, state("rows", rank, 2), info, keep=1))["loader"]


def we_save_a_tensor_of_each_rank(rank: int, folder: Path) -> str:
    with pytest.raises((CheckpointError, RuntimeError)) as error:
        save_checkpoint(folder, 1, {"model": {"generator": ones(4)}}, {}, keep=1)
    return str(error.value)


def test_we_keep_what_one_rank_says_and_never_a_mixture(tmp_path: Path) -> None:
    assert run_ranks(we_save_info_of_each_rank, 2, tmp_path / "objects") == [{"position": 100, "seed": 0}] * 2
    said = run_ranks(we_save_a_tensor_of_each_rank, 2, tmp_path / "tensors")
    assert "model/generator" in said[0]
    assert find_latest(tmp_path / "tensors") is None


# --- A killed process that saves in the background -------------------------------------------------------------------


def torch_loses_its_daemon(rank: int, root: Path) -> list[str]:
    """How three saves in the background ended, of which the second one met a killed daemon."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # it may have children
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    ended, before = [], children()
    for step in range(3):
        future = dcp.async_save(
            {"weight": torch.ones(8)},
            checkpoint_id=root / f"{step}",
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        try:
            future.result(timeout=LIMIT_S)  # type: ignore[union-attr]
            ended.append("saved")
        except Exception:
            ended.append("failed")
        if step == 0:
            [daemon] = [
                pid for pid in children() - before if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            os.kill(daemon, signal.SIGKILL)
    return ended


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


@pytest.mark.slow
def test_torch_never_saves_again_once_its_daemon_was_killed(tmp_path: Path) -> None:
    assert run_ranks(torch_loses_its_daemon, 1, tmp_path) == [["saved", "failed", "failed"]]


def we_lose_our_writer(rank: int, folder: Path) -> list[str]:
    """The faults of three saves in the background; the writer is killed before the second and during the third."""
    faults = []
    with Saver(folder, state("rows", step=1), keep=9) as saver:
        for step in range(3):
            if step == 1:
                os.kill(saver.writer_pid, signal.SIGKILL)
            saver.save(step, {})
            if step == 2:
                os.kill(saver.writer_pid, signal.SIGKILL)
            outcome = saver.wait()
            faults.append(outcome.fault if outcome else "nothing was saved")
    return faults


def test_we_start_a_killed_writer_again(tmp_path: Path) -> None:
    assert run_ranks(we_lose_our_writer, 1, tmp_path) == [["", "", ""]]
    assert sorted(os.listdir(tmp_path)) == [OWNER, "step_00000000", "step_00000001", "step_00000002"]


# --- The coordinator's plan ------------------------------------------------------------------------------------------


class Gathered:
    """Counts what this rank sends as Python objects to the other ranks."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextlib.contextmanager
    def count(self) -> Any:
        """Only inside."""
        convert = distributed_c10d._object_to_tensor

        def counting(obj: Any, *more: Any) -> Any:
            self.bytes += len(pickle.dumps(obj))
            return convert(obj, *more)

        distributed_c10d._object_to_tensor = counting
        try:
            yield
        finally:
            distributed_c10d._object_to_tensor = convert


class CountingPlanner(DefaultSavePlanner):
    """Counts the entries that the coordinator looks through."""

    entries = 0

    def create_global_plan(self, all_plans: Any) -> Any:
        type(self).entries = sum(len(plan.items) for plan in all_plans)
        return super().create_global_plan(all_plans)


TENSORS = 200


def torch_plans(rank: int, root: Path) -> tuple[int, list[int]]:
    """Entries that this rank planned as the coordinator, and bytes sent, at each of two saves."""
    tensors = {f"layer.{number}": torch.ones(4) for number in range(TENSORS)}
    sent = []
    for step in (1, 2):
        gathered = Gathered()
        with gathered.count():
            dcp.save(tensors, checkpoint_id=root / f"{step}", planner=CountingPlanner())
        sent.append(gathered.bytes)
    return CountingPlanner.entries, sent


@pytest.mark.parametrize("world", [2, 4])
def test_torch_gathers_every_tensor_of_every_rank_at_every_save(tmp_path: Path, world: int) -> None:
    planned = run_ranks(torch_plans, world, tmp_path)
    assert planned[0][0] == world * TENSORS
    for _, sent in planned:
        assert sent[1] > 100 * TENSORS  # bytes, and not fewer at the second save
        assert sent[1] == pytest.approx(sent[0], rel=0.01)


def we_plan(rank: int, folder: Path) -> list[int]:
    """Bytes sent as objects at the start of a saver, and at each of two saves."""
    world = dist.get_world_size()
    whole = {f"layer.{number}": Shard(torch.ones(4), (4,), (0,), Copies(rank, world, ("replicate",)))
             for number in range(TENSORS)}  # fmt: skip
    sent = []
    gathered = Gathered()
    with gathered.count(), Saver(folder, {"model": whole}, keep=9) as saver:
        sent.append(gathered.bytes)
        for step in (1, 2):
            saver.save(step, {})
            saver.wait()
            sent.append(gathered.bytes)
    return sent


@pytest.mark.parametrize("world", [2, 4])
def test_we_plan_each_tensor_once_and_gather_none_at_a_save(tmp_path: Path, world: int) -> None:
    for start, first_save, second_save in run_ranks(we_plan, world, tmp_path):
        assert start < 10 * TENSORS  # bytes: what does not depend on the tensors
        assert second_save == first_save == start
    for step in (1, 2):
        path = tmp_path / f"step_{step:08d}"
        index = Index.from_bytes((path / "index.safetensors").read_bytes())
        assert TENSORS <= len(index.chunks) < TENSORS + world


# --- Bytes read to load under another layout -------------------------------------------------------------------------

ROWS, COLUMNS = 4096, 1024
WEIGHT_BYTES = 4 * ROWS * COLUMNS


def cut(dim: int, rank: int, world: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Offsets and sizes of a rank's even share."""
    sizes = [ROWS, COLUMNS]
    sizes[dim] //= world
    offsets = [0, 0]
    offsets[dim] = rank * sizes[dim]
    return (offsets[0], offsets[1]), (sizes[0], sizes[1])


def torch_saves_rows(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    dcp.save({"weight": distribute_tensor(torch.ones(ROWS, COLUMNS), mesh, [Split(0)])}, checkpoint_id=folder)


def torch_loads(rank: int, world: int, folder: Path, dim: int, go: Path) -> bool:
    mesh = init_device_mesh("cpu", (world,))
    weight = distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, [Split(dim)])
    wait_for(go)
    dcp.load({"weight": weight}, checkpoint_id=folder)
    assert isinstance(weight, DTensor)
    return bool((weight.to_local() == 1).all())


def we_save_rows(rank: int, world: int, folder: Path) -> None:
    save_checkpoint(folder, 1, part_of_weight(0, rank, world, 1.0), {}, keep=1)


def part_of_weight(dim: int, rank: int, world: int, value: float) -> dict[str, dict[str, Shard]]:
    offsets, sizes = cut(dim, rank, world)
    return {"model": {"weight": Shard(torch.full(sizes, value), (ROWS, COLUMNS), offsets)}}


def we_load(rank: int, world: int, folder: Path, dim: int, go: Path) -> bool:
    mine = part_of_weight(dim, rank, world, 0.0)
    wait_for(go)
    load_into(folder / "step_00000001", mine)
    return bool((mine["model"]["weight"].tensor == 1).all())


def wait_for(go: Path) -> None:
    go.with_name(f"ready {os.environ['RANK']}").touch()
    deadline = time.monotonic() + LIMIT_S
    while not go.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def bytes_read_by_all(load: Callable[..., bool], world: int, folder: Path, dim: int, scratch: Path) -> int:
    """What the kernel gave the ranks from the files in `folder` while they loaded."""
    scratch.mkdir()
    go = scratch / "go"
    ranks = start_ranks(load, world, world, folder, dim, go)
    try:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and len(names_in(scratch)) < world:
            time.sleep(0.01)
        with contextlib.ExitStack() as tracers:
            logs = [scratch / f"log {rank}" for rank in range(world)]
            for process, log in zip(ranks.processes, logs, strict=True):
                tracers.enter_context(traced(process.pid or 0, log, calls=READING))
            go.touch()
            assert ranks.results() == [True] * world
    finally:
        ranks.stop()
    return sum(bytes_read(log, folder) for log in logs)


@pytest.mark.parametrize(("world", "dim", "most"), [(4, 0, 1.5), (4, 1, 3.0)], ids=["rows", "columns"])
def test_torch_reads_more_than_there_is_to_load_under_another_layout(
    tmp_path: Path, world: int, dim: int, most: float
) -> None:
    if unavailable():
        pytest.skip(unavailable())
    run_ranks(torch_saves_rows, 2, 2, tmp_path / "saved")
    read = bytes_read_by_all(torch_loads, world, tmp_path / "saved", dim, tmp_path / "scratch")
    assert read > most * WEIGHT_BYTES


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_we_read_every_byte_once_under_any_layout(tmp_path: Path, world: int, dim: int) -> None:
    if unavailable():
        pytest.skip(unavailable())
    run_ranks(we_save_rows, 2, 2, tmp_path / "saved")
    read = bytes_read_by_all(we_load, world, tmp_path / "saved", dim, tmp_path / "scratch")
    assert WEIGHT_BYTES <= read < 1.01 * WEIGHT_BYTES


# --- Code in a checkpoint --------------------------------------------------------------------------------------------


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_torch_runs_code_from_the_metadata(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with contextlib.suppress(AttributeError, CheckpointException):
        dcp.FileSystemReader(tmp_path / "saved").read_metadata()
    assert (tmp_path / "harm").exists()


def test_torch_runs_code_from_an_object_that_was_saved(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"loader": Harmful(tmp_path / "harm")}, checkpoint_id=tmp_path / "saved")
        assert not (tmp_path / "harm").exists()
        dcp.load({"loader": None}, checkpoint_id=tmp_path / "saved")
    assert (tmp_path / "harm").exists()


def test_we_run_no_code_from_a_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "saved", 1, state("rows"), {}, keep=1)
    for name in names_in(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
        with contextlib.suppress(CheckpointError):
            load_info(path)
            load_into(path, state("rows", step=None))
        assert not (tmp_path / "harm").exists(), name
        (path / name).write_bytes(content)
