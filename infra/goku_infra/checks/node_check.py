"""`goku-ops check-node`: is this node fit to run ranks. Usable as SLURM's prolog and HealthCheckProgram.

    goku-ops check-node [FOLDER] [--quick] [--json] [--limits FILE]
    goku-ops check-node [FOLDER] --store HOST:PORT --world N --rank R      (on N nodes at once)

Exit code 0: healthy. 1: not, and one line a finding says why. 2: bad input. Needs no torch itself: what computes is a
process of its own.
"""

import argparse
import contextlib
import difflib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from goku_infra.checks import gpu_health, host_health
from goku_infra.checks.health import HealthFinding, answer_within
from goku_infra.errors import OpsError
from goku_infra.views import GpuView

QUICK_BYTES, FULL_BYTES = 1 << 20, 64 << 20
"""Written to the folder's disk and read back."""
COMPUTE_TIMEOUT_S = 300.0
GROUP_TIMEOUT_S = 600.0
EVENT_KEPT_S = 600.0
GPU_ANSWER_S = 5.0
GPU_FIRST_ANSWER_S = 30.0
"""The first: without persistence mode the driver wakes every GPU for it."""
INFRA = Path(__file__).parents[2]


@dataclass(frozen=True)
class Check:
    """One figure of the node, and whether it is within its limit."""

    name: str
    ok: bool
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    text: str = ""
    """Why it is not ok, or what could not be looked at; one line."""


class Limit(NamedTuple):
    """The least that a healthy node reaches; `wrong_elements` alone is the most."""

    value: float
    source: str


OURS = "a floor that a working node is far above; set your fleet's own with --limits"
NHC = "AzureHPC NHC, conf/"
LIMITS: dict[str, dict[str, Limit]] = {
    "cpu": {
        "matrix_product": Limit(0.001, OURS),  # TFLOP/s
        "memory_copy": Limit(0.5, OURS),  # GB/s
        "loopback_all_reduce": Limit(0.02, OURS),
        "disk_write": Limit(0.01, OURS),
        "disk_read": Limit(0.01, OURS),
    },
    # Only what has been published for the model; its other figures are reported without a limit, and compared with the
    # node's other GPUs.
    "NVIDIA A100-SXM4-80GB": {
        "host_to_device": Limit(24.0, NHC + "nd96amsr_a100_v4.conf, check_cuda_bw"),
        "device_to_host": Limit(24.0, NHC + "nd96amsr_a100_v4.conf, check_cuda_bw"),
        "nccl_all_reduce_8": Limit(228.0, NHC + "nd96amsr_a100_v4.conf, check_nccl_allreduce"),
    },
    "NVIDIA H100 80GB HBM3": {
        "host_to_device": Limit(52.0, NHC + "nd96isr_h100_v5.conf, check_cuda_bw"),
        "device_to_host": Limit(52.0, NHC + "nd96isr_h100_v5.conf, check_cuda_bw"),
        "nccl_all_reduce_8": Limit(460.0, NHC + "nd96isr_h100_v5.conf, check_nccl_allreduce"),
    },
    "NVIDIA H200": {
        "host_to_device": Limit(48.0, NHC + "nd96isr_h200_v5.conf, check_gpu_bw"),
        "device_to_host": Limit(48.0, NHC + "nd96isr_h200_v5.conf, check_gpu_bw"),
        "nccl_all_reduce_8": Limit(431.0, NHC + "nd96isr_h200_v5.conf, check_nccl_allreduce"),
    },
}
"""By device and figure. A file of the same shape, with plain numbers, overrides them."""
PEER_SHARE = 0.9
"""A GPU below this share of the node's median GPU is slow (in MegaScale's fleet, slow machines were about 10% slow)."""
PEER_FIGURES = ("matrix_product", "memory_copy", "host_to_device", "device_to_host")


class NodeWatch:
    """Cheap checks again and again, for an agent: no torch, nothing written.

    Counters are compared with the time before, and Xids are collected in between. What happened once, as an Xid, stays
    a finding for `EVENT_KEPT_S`.
    """

    def __init__(self, folder: Path) -> None:
        """folder: on the disk that the run needs."""
        self._folder = folder
        self._host: host_health.Sample | None = None
        self._gpus: list[gpu_health.GpuSample] = []
        self._nvml = _nvml_if_there()
        self._gpu_answer_s = GPU_FIRST_ANSWER_S
        self._xids = _xids_if_possible(self._nvml)
        self._events: list[tuple[float, HealthFinding]] = []

    @property
    def gpus(self) -> list[GpuView]:
        """What the node's GPUs did when `findings` last asked them."""
        return [gpu_health.view(gpu) for gpu in self._gpus]

    def findings(self) -> list[HealthFinding]:
        """What is wrong with this node now; empty: healthy."""
        limits = host_health.Limits()
        host = host_health.sample([self._folder], self._host, limits)
        rows = host_health.findings(self._host, host, limits)
        self._host = host
        if self._nvml:
            gpus, silent = _ask_gpus(self._nvml, self._gpu_answer_s)
            self._gpu_answer_s = GPU_ANSWER_S
            rows += silent
            if not silent:
                rows += gpu_health.findings(self._gpus, gpus, gpu_health.GpuLimits())
                self._gpus = gpus
        rows += self._xids.take() if self._xids else []
        now_s = time.monotonic()
        self._events = [(since_s, row) for since_s, row in self._events if now_s - since_s < EVENT_KEPT_S]
        self._events += [(now_s, row) for row in rows if row.is_event]
        return [row for row in rows if not row.is_event] + [row for _, row in self._events]


def read_limits(path: Path | None) -> dict[str, dict[str, float]]:
    """The table's values, with those of a JSON file in their place: {"NVIDIA H200": {"host_to_device": 50}}.

    Raises:
        OpsError: the file cannot be read, or names a figure that nobody measures.
    """
    limits = {device: {name: limit.value for name, limit in table.items()} for device, table in LIMITS.items()}
    if path is None:
        return limits
    try:
        given = json.loads(path.read_text())
        tables = {str(device): {str(k): float(v) for k, v in table.items()} for device, table in given.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise OpsError(f"{path}: no limits can be read from it: {error}") from None
    known = {name for table in LIMITS.values() for name in table} | set(PEER_FIGURES)
    for device, table in tables.items():
        for name in table:
            if name not in known and not name.startswith("nccl_all_reduce_"):
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
                raise OpsError(f"{path}: {device}: no figure is called {name!r}; {hint}")
        limits[device] = {**limits.get(device, {}), **table}
    return limits


def judge(measurements: Sequence[Mapping[str, Any]], limits: Mapping[str, Mapping[str, float]]) -> list[Check]:
    """Each figure of `compute_check` against its device's limit, and each GPU against the node's others."""
    checks = []
    for figure in measurements:
        name, value, unit = figure["name"], figure["value"], figure["unit"]
        label = f"{name} {figure['device']}" + (f" {figure['index']}" if figure["index"] >= 0 else "")
        if name == "wrong_elements":
            text = "" if value == 0 else f"{label}: {value:.0f} elements of an exact matrix product are wrong"
            checks.append(Check(label, value == 0, value, unit, 0, text))
            continue
        limit = _limits_of(figure["device"], limits).get(name)
        peers = [f["value"] for f in measurements if f["name"] == name and f["device"] == figure["device"]]
        if figure["index"] >= 0 and name in PEER_FIGURES and len(peers) > 1:
            limit = max(limit or 0.0, PEER_SHARE * sorted(peers)[len(peers) // 2])
        checks.append(_at_least(label, value, unit, limit))
    return checks


def check_disk(folder: Path, bytes_: int, limits: Mapping[str, float]) -> list[Check]:
    """Write, sync and read back a file of the folder; remove it."""
    block = bytes(range(256)) * (1 << 12)  # 1 MiB
    path = folder / f".check_node_{socket.gethostname()}_{os.getpid()}"  # other nodes check the same shared folder
    try:
        begin = time.monotonic()
        with path.open("wb") as file:
            for _ in range(bytes_ // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.monotonic()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from memory
        with path.open("rb") as file:
            begin_read = time.monotonic()
            same = all(file.read(len(block)) == block for _ in range(bytes_ // len(block)))
            read_s = time.monotonic() - begin_read
    except OSError as error:
        return [Check("disk", False, text=f"the disk of {folder} fails: {error.strerror}")]
    finally:
        with contextlib.suppress(OSError):  # as on a disk that is read-only: the finding is what counts
            path.unlink()
    return [
        Check(
            "disk_content", same, text="" if same else f"the disk of {folder} gave back other bytes than were written"
        ),
        _at_least("disk_write", bytes_ / (written - begin) / 1e9, "GB/s", limits.get("disk_write")),
        _at_least("disk_read", bytes_ / read_s / 1e9, "GB/s", limits.get("disk_read")),
    ]


def check_node(folder: Path, limits: Mapping[str, Mapping[str, float]], *, quick: bool) -> list[Check]:
    """Everything that this node can find out alone."""
    rows, notes = _quick(folder, must_be_free=not quick)
    checks = [Check(row.name, row.severity != "critical", text=row.text) for row in rows]
    checks += [Check("gpu", True, text=note) for note in notes]
    if quick:  # a small file's speed is its one sync's, so it has no limit
        return checks + check_disk(folder, QUICK_BYTES, {})
    return checks + check_disk(folder, FULL_BYTES, limits["cpu"]) + _compute_checks(limits)


def check_group(store: str, world: int, rank: int, device: str) -> Iterator[Check]:
    """This node among `world` nodes that check each other at the same time; rank 0 leads."""
    words = ["--store", store, "--world", str(world), "--device", device]
    leader = _start("collective_check", [*words, "--coordinate"]) if rank == 0 else None
    try:
        report = _finish(_start("collective_check", [*words, "--rank", str(rank)]), GROUP_TIMEOUT_S)
    except OpsError:
        if leader and leader.poll():
            _finish(leader, GROUP_TIMEOUT_S)  # says why, as the port is taken, where the member only misses it
        raise
    else:
        if leader:
            _finish(leader, GROUP_TIMEOUT_S)  # the others have read the report, too
    finally:
        if leader and leader.poll() is None:
            leader.kill()
            leader.communicate()
    for bad, reason in sorted((int(number), text) for number, text in report["bad"].items()):
        yield Check(f"node {bad}", False, text=f"node {bad} {reason}")
    for first, second in report["links"]:
        yield Check(f"link {first}-{second}", False, text=f"nodes {first} and {second} work, but not with each other")
    offset = report["clock_offset_s"].get(str(rank))
    yield Check("clock_offset", str(rank) not in report["bad"], offset, "s")
    yield Check("pair_all_reduce", True, report["bandwidth_gb_per_s"], "GB/s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("."), metavar="FOLDER", help="whose disk to check")
    parser.add_argument("--quick", action="store_true", help="less than 2 s and no computing: for a prolog")
    parser.add_argument("--json", action="store_true", help="one JSON object, the last line")
    parser.add_argument("--limits", type=Path, metavar="FILE", help="JSON: limits by device and figure")
    parser.add_argument("--store", metavar="HOST:PORT", help="check N nodes together: an address on node 0, free port")
    parser.add_argument("--world", type=int, metavar="N", help="how many nodes")
    parser.add_argument("--rank", type=int, metavar="R", help="which of them this is, from 0")
    parser.add_argument("--device", default="cpu", help="what the nodes reduce on: cpu (gloo) or cuda:0 (nccl)")


def run(options: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        OpsError: bad input.
    """
    if not options.folder.is_dir():
        raise OpsError(f"{options.folder} is not a folder; give one on the disk that the run needs")
    group = [options.store, options.world, options.rank]
    if any(value is not None for value in group) and None in group:
        raise OpsError("--store, --world and --rank belong together")
    checks = check_node(options.folder, read_limits(options.limits), quick=options.quick)
    if options.store is not None:
        checks += check_group(options.store, options.world, options.rank, options.device)
    healthy = all(check.ok for check in checks)
    if options.json:
        print(json.dumps({"healthy": healthy, "checks": [asdict(check) for check in checks]}))
    else:
        print("\n".join(_lines(checks)))
    return int(not healthy)


def _lines(checks: Sequence[Check]) -> list[str]:
    """The findings, one line each; without any, one line that says so."""
    bad = [check.text for check in checks if not check.ok]
    notes = [f"note: {check.text}" for check in checks if check.ok and check.text]
    figures = [f"{check.name} {check.value:.4g} {check.unit}" for check in checks if check.value is not None]
    return [*(bad or [f"healthy: {', '.join(figures)}"]), *notes]


def _quick(folder: Path, *, must_be_free: bool) -> tuple[list[HealthFinding], list[str]]:
    """Findings on host and GPUs, and what could not be looked at."""
    limits = host_health.Limits()
    rows = host_health.findings(None, host_health.sample([folder], None, limits), limits)
    nvml = _nvml_if_there()
    if nvml is None:
        has_gpus = Path("/proc/driver/nvidia/gpus").exists()
        return rows, [f"the GPUs' health was not looked at; {gpu_health.INSTALL}"] if has_gpus else []
    gpus, silent = _ask_gpus(nvml, GPU_FIRST_ANSWER_S)
    rows += silent
    return rows + gpu_health.findings((), gpus, gpu_health.GpuLimits(), must_be_free=must_be_free), []


def _ask_gpus(nvml: Any, timeout_s: float) -> tuple[list[gpu_health.GpuSample], list[HealthFinding]]:
    """The GPUs' samples, or that their driver gives none."""
    try:
        gpus = answer_within(timeout_s, lambda: gpu_health.sample(nvml), "GPUs")
    except nvml.NVMLError as error:
        return [], [HealthFinding("gpu_driver", "critical", f"the GPUs' driver fails: {error}")]
    if gpus is None:
        text = f"the GPUs' driver does not answer within {timeout_s:g} s"
        return [], [HealthFinding("gpu_driver", "critical", text)]
    return gpus, []


def _nvml_if_there() -> Any:
    try:
        return gpu_health.open_nvml()
    except OpsError:
        return None


def _xids_if_possible(nvml: Any) -> gpu_health.XidWatch | None:
    """A driver that refuses is found by its samples."""
    if nvml is None:
        return None
    try:
        return gpu_health.XidWatch(nvml)
    except nvml.NVMLError:
        return None


def _compute_checks(limits: Mapping[str, Mapping[str, float]]) -> list[Check]:
    try:
        return judge(_finish(_start("compute_check", []), COMPUTE_TIMEOUT_S)["measurements"], limits)
    except OpsError as error:
        return [Check("compute", False, text=str(error))]


def _start(module: str, words: Sequence[str]) -> subprocess.Popen[str]:
    # From the folder of the package, so that it is found wherever it was imported from.
    command = [sys.executable, "-m", f"goku_infra.checks.{module}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=INFRA)


def _finish(process: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
    """The JSON object that is the last line of the process's output.

    Raises:
        OpsError: it failed or took longer than `timeout_s`.
    """
    name = Path(str(process.args[2] if isinstance(process.args, list) else "")).name
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise OpsError(f"python -m {name} took longer than {timeout_s:g} s") from None
    lines = output.splitlines()
    if not lines or process.returncode not in (0, 1):
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise OpsError(f"python -m {name} failed: {last[0]}")
    return json.loads(lines[-1])


def _limits_of(device: str, limits: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """The table whose name is the longest start of the device's; NVML and CUDA add variants to a model's name."""
    names = [name for name in limits if device.startswith(name)]
    return limits[max(names, key=len)] if names else {}


def _at_least(name: str, value: float, unit: str, limit: float | None) -> Check:
    ok = limit is None or value >= limit
    text = "" if ok else f"{name}: {value:.4g} {unit}; at least {limit:.4g} is needed"
    return Check(name, ok, value, unit, limit, text)
