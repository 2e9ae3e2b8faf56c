"""Causes from real ends of real processes, and from lines that only a cluster can produce."""

import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from goku_infra.causes import CAUSES
from goku_infra.diagnosis.logs import classify, fault_record, is_symptom
from launch import start_ranks


def end_of(code: str, **options) -> tuple[int, list[str]]:
    """Exit code and log of a Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize(
    ("code", "cause", "words"),
    [
        ("raise ValueError('no such layer')", "exception", "ValueError: no such layer"),
        ("raise KeyError", "exception", "KeyError"),
        ("class Odd(Exception): pass\nraise Odd('its own')", "exception", "Odd: its own"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
        ("import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)", "crashed", "Segmentation fault"),
        ("import os; os.abort()", "crashed", "SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGBUS)", "crashed", "SIGBUS"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGFPE)", "crashed", "SIGFPE"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "killed", "SIGTERM"),
        ("pass", "early_exit", "exit code 0"),
        ("import os; os._exit(3)", "unknown", "exit code 3"),
        ("print('so far'); raise SystemExit(9)", "unknown", "so far"),
        ("open('/dev/full', 'w').write('x' * 10**6)", "disk_full", "No space left on device"),
        (
            "import sys; print('save failed: No space left on device', file=sys.stderr); raise ValueError('later')",
            "exception",
            "later",
        ),
        ("from goku_mega.errors import DataError; raise DataError('a shard')", "data_error", "a shard"),
    ],
)
def test_a_real_end_has_its_cause(code, cause, words) -> None:
    found, detail = classify(*end_of(code))
    assert found == cause
    assert words in detail
    assert "\n" not in detail


def test_memory_that_a_limit_refuses() -> None:
    limit = 1 << 30
    end = end_of(
        "x = bytearray(1 << 34)", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )  # fmt: skip
    assert classify(*end)[0] == "out_of_memory"


@pytest.mark.slow
def test_memory_that_torch_cannot_get(tmp_path) -> None:
    ranks = start_ranks(_too_much_memory, 1, tmp_path)
    ranks.results()
    lines = (tmp_path / "rank_0").read_text().splitlines()
    assert classify(1, lines) == ("out_of_memory", lines[-1])
    assert "DefaultCPUAllocator" in lines[-1]


def test_a_disk_that_is_full(tmp_path) -> None:
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        end = end_of(f"open('{tmp_path}/shard', 'wb').write(bytes(1 << 20))")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert classify(*end) == ("disk_full", "OSError: [Errno 28] No space left on device")


def test_a_refused_setting_and_a_damaged_shard() -> None:
    command = "import sys; from goku_mega.cli import main; sys.exit(main(['train', 'stpes=3']))"
    cause, detail = classify(*end_of(command))
    assert cause == "bad_input"
    assert "stpes" in detail and not detail.startswith("goku-mega")
    line = "goku-mega: error: d/shard_000001.tar cannot be read at byte 512 (Input/output error); encode again"
    assert classify(2, [line])[0] == "data_error"


@pytest.mark.parametrize(("how", "cause"), [("dies", "exception"), ("is late", "collective_timeout")])
def test_the_rank_that_lost_another_shows_a_symptom(tmp_path, how, cause) -> None:
    ranks = start_ranks(_one_leaves, 2, tmp_path, how)
    try:
        log = tmp_path / "rank_0"
        deadline = time.monotonic() + 20
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        lines = log.read_text().splitlines()
    finally:
        ranks.stop()
    assert classify(1, lines)[0] == cause
    assert is_symptom(1, lines)


@pytest.mark.parametrize(
    ("exit_code", "line", "cause", "symptom"),
    [
        # torch.cuda, c10/cuda/CUDAException.cpp and CUDACachingAllocator.cpp; the texts of cudaGetErrorString
        (1, "torch.AcceleratorError: CUDA error: an illegal memory access was encountered", "device_error", False),
        (1, "RuntimeError: CUDA error: uncorrectable ECC error encountered", "device_error", False),
        (1, "RuntimeError: CUDA error: unspecified launch failure", "device_error", False),
        (1, "RuntimeError: CUDA error: device-side assert triggered", "exception", False),
        (1, "RuntimeError: CUDA error: out of memory", "device_out_of_memory", False),
        (
            1,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity",
            "device_out_of_memory",
            False,
        ),
        # torch/csrc/distributed/c10d: NCCLUtils.cpp, ProcessGroupNCCL.cpp
        (1, "ncclUnhandledCudaError: Call to CUDA function failed.", "device_error", False),
        (
            1,
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            "exception",
            True,
        ),
        (
            -signal.SIGABRT,
            "[rank1]:[E ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation timeout: "
            "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600020 milliseconds before timing out.",
            "collective_timeout",
            True,
        ),
        (
            -signal.SIGABRT,
            "  what():  [Rank 3] Process group watchdog thread terminated with exception: CUDA error: "
            "an illegal memory access was encountered",
            "device_error",
            False,
        ),
        # gloo, from its own threads
        (
            -signal.SIGABRT,
            "  what():  [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.4]:19124",
            "exception",
            True,
        ),
        # the kernel's and SLURM's words
        (-signal.SIGKILL, "Memory cgroup out of memory: Killed process 4711 (python)", "out_of_memory", False),
        (-signal.SIGKILL, "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0.", "out_of_memory", False),
        (137, "step 12", "killed", False),
        (-signal.SIGTERM, "step 12", "killed", True),
    ],
)  # fmt: skip
def test_lines_that_only_a_cluster_writes(exit_code, line, cause, symptom) -> None:
    assert classify(exit_code, ["step 11", line])[0] == cause
    assert is_symptom(exit_code, ["step 11", line]) is symptom


def test_what_training_says_of_itself_comes_first() -> None:
    lines = ["Traceback (most recent call last):", "x: y", '{"fault": "nan_loss", "step": 7, "data_step": 9}']
    cause, detail = classify(70, lines)
    assert cause == "nan_loss" and "step 7" in detail
    assert fault_record(lines) == {"fault": "nan_loss", "step": 7, "data_step": 9}
    cause, detail = classify(71, ['[rank1]: {"fault": "corruption", "step": 7, "ranks": [1]}'])
    assert cause == "corruption" and "rank: 1" in detail
    assert fault_record(["{ not JSON"]) == {} and fault_record([]) == {}


@pytest.mark.parametrize("exit_code", [-64, -9, -1, 0, 1, 2, 70, 71, 128, 255])
def test_any_end_has_a_cause(exit_code) -> None:
    for lines in ([], [""], ["\x00\xff"], ["Traceback (most recent call last):"], ["{}"], ["null"], ["a" * 10_000]):
        cause, detail = classify(exit_code, lines)
        assert cause in CAUSES and 0 < len(detail) <= 300


def _too_much_memory(rank: int, folder: Path) -> None:
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
    _keep_error(folder / "rank_0", lambda: torch.empty(1 << 45))


def _one_leaves(rank: int, folder: Path, how: str) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    group = dist.new_group(timeout=datetime.timedelta(seconds=2 if how == "is late" else 20))
    dist.all_reduce(torch.ones(3), group=group)
    if rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    _keep_error(folder / "rank_0", lambda: dist.all_reduce(torch.ones(3), group=group))


def _keep_error(path: Path, function) -> None:
    """Write what Python would print about the error that `function` raises."""
    try:
        function()
    except Exception:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(traceback.format_exc())
        temporary.rename(path)
