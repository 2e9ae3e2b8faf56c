"""The health of a node's NVIDIA GPUs through NVML: ECC, remapped rows, NVLink, PCIe, clocks, temperature, Xid.

`sample` asks the library (nvidia-ml-py's `pynvml`, or a replay of it); `findings` is pure.

    python -m goku_infra.checks.gpu_health [--record FILE | --replay FILE]
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from goku_infra.checks.health import HealthFinding
from goku_infra.checks.host_health import CRITICAL_XIDS
from goku_infra.checks.nvml_recording import Recorder, Replay
from goku_infra.errors import OpsError
from goku_infra.views import GpuView

INSTALL = "pip install nvidia-ml-py"


@dataclass(frozen=True)
class GpuLimits:
    """What a healthy GPU keeps to. Temperatures, link widths and generations are compared with the GPU's own."""

    nvlink_crc_per_s: float = 100.0
    """DCGM, dcgm_gpu_hardware_limits.h: fewer cyclic redundancy errors a second do not matter."""
    pcie_replays_per_minute: float = 8.0
    """DCGM, the same file."""
    memory_errors: int = 20_000_000
    """AzureHPC NHC, `check_gpu_ecc 20000000 10000`: errors of either kind over the GPU's life."""
    sram_corrected: int = 10_000
    """The same check's second figure."""
    rows_remapped: int = 512
    """The same check (customTests/azure_gpu_ecc.nhc): rows replaced after uncorrectable errors."""


@dataclass(frozen=True)
class NvLink:
    """One NVLink of a GPU; counts are since the driver's start, None where the library does not tell."""

    active: bool
    replays: int | None
    recoveries: int | None
    crc_errors: int | None
    """Flow control units and data together."""


@dataclass(frozen=True)
class GpuSample:
    """One GPU at a moment; None: this GPU, driver or user cannot ask."""

    index: int
    monotonic_s: float
    lost: bool = False
    """The driver cannot reach it any more."""
    name: str | None = None
    uuid: str | None = None
    volatile_uncorrected: int | None = None
    """ECC errors since the driver's start."""
    aggregate_corrected: int | None = None
    aggregate_uncorrected: int | None = None
    sram_corrected: int | None = None
    """In the on-chip memories, since the driver's start."""
    sram_uncorrected: int | None = None
    """Over the GPU's life."""
    rows_remapped: int | None = None
    """After uncorrectable errors."""
    remap_pending: bool | None = None
    """A row of memory waits for a reset to be replaced."""
    remap_failed: bool | None = None
    """No spare row is left."""
    recovery_action: str | None = None
    """What the driver asks for: None or a key of `RECOVERY`."""
    slowdowns: tuple[str, ...] = ()
    """Reasons that hold its clocks down: keys of `SLOWDOWNS`."""
    idle: bool = False
    busy: float | None = None
    """Share of the last second or so in which a kernel ran."""
    memory_bytes: int | None = None
    """In use."""
    power_w: float | None = None
    temperature_c: int | None = None
    slowdown_c: int | None = None
    """Temperature at which this GPU slows down."""
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_replays: int | None = None
    nvlinks: tuple[NvLink, ...] = ()
    pids: tuple[int, ...] = ()
    """Processes that compute on it."""
    errors: tuple[str, ...] = ()
    """Calls that failed for another reason than not being supported."""


SLOWDOWNS = {
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware thermal slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonSwThermalSlowdown": "software thermal slowdown",
}
"""Reasons of NVML that hold clocks down though the GPU has work: not idleness, its power limit or an operator's clocks
(AzureHPC NHC leaves the first two out likewise)."""

RECOVERY = {
    "NVML_GPU_RECOVERY_ACTION_GPU_RESET": "a reset",
    "NVML_GPU_RECOVERY_ACTION_NODE_REBOOT": "a reboot of the node",
    "NVML_GPU_RECOVERY_ACTION_DRAIN_P2P": "its neighbours to be drained",
    "NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET": "to be drained and reset",
}


def open_nvml() -> ModuleType:
    """The initialised library.

    Raises:
        OpsError: the package or the driver is missing.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise OpsError(f"the health of GPUs needs nvidia-ml-py; {INSTALL}") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise OpsError(f"NVML does not start: {error}; is the NVIDIA driver loaded?") from None
    return nvml


def sample(nvml: Any) -> list[GpuSample]:
    """Ask for the state of every GPU of this node."""
    return [_Asker(nvml).gpu(index) for index in range(nvml.nvmlDeviceGetCount())]


def findings(
    previous: Sequence[GpuSample], now: Sequence[GpuSample], limits: GpuLimits, *, must_be_free: bool = False
) -> list[HealthFinding]:
    """What is wrong with the GPUs; counters are compared with an earlier sample, if there is one.

    Args:
        must_be_free: a process on a GPU is a finding, too: before a start.
    """
    before = {gpu.uuid: gpu for gpu in previous if gpu.uuid}
    rows = []
    for gpu in now:
        label = f"GPU {gpu.index}" + (f" ({gpu.uuid})" if gpu.uuid else "")
        for name, severity, text in _gpu_findings(before.get(gpu.uuid or ""), gpu, limits, must_be_free):
            rows.append(HealthFinding(f"gpu_{name}", severity, f"{label} {text}"))
    seen = {gpu.uuid for gpu in now}
    lost = [gpu for gpu in previous if gpu.uuid and gpu.uuid not in seen and not any(g.lost for g in now)]
    return rows + [HealthFinding("gpu_lost", "critical", f"GPU {gpu.index} ({gpu.uuid}) is gone") for gpu in lost]


def xid_finding(index: int | None, xid: int) -> HealthFinding:
    """A driver's report as a finding; index None: the GPU is not known."""
    severity: Literal["critical", "warning"] = "critical" if xid in CRITICAL_XIDS else "warning"
    return HealthFinding(
        "gpu_xid", severity, f"GPU {'?' if index is None else index} reported Xid {xid}", is_event=True
    )


def view(gpu: GpuSample) -> GpuView:
    """What operators see of a GPU beside its findings."""
    return GpuView(
        index=gpu.index, busy=gpu.busy, memory_bytes=gpu.memory_bytes, power_w=gpu.power_w,
        temperature_c=gpu.temperature_c,
    )  # fmt: skip


class XidWatch:
    """Collects the driver's Xid reports from a thread of its own, without rights to read the kernel's log."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._found: list[HealthFinding] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._events = nvml.nvmlEventSetCreate()
        self._indices: dict[str, int] = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # samples tell what is wrong with it; the others are watched
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                self._indices[nvml.nvmlDeviceGetUUID(handle)] = index
                if nvml.nvmlDeviceGetSupportedEventTypes(handle) & nvml.nvmlEventTypeXidCriticalError:
                    nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._events)
        self._thread = threading.Thread(target=self._watch, name="xid", daemon=True)
        self._thread.start()

    def take(self) -> list[HealthFinding]:
        """The reports since the last call."""
        with self._lock:
            found, self._found = self._found, []
        return found

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._nvml.nvmlEventSetFree(self._events)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 1000)
            except self._nvml.NVMLError as error:
                if error.value == self._nvml.NVML_ERROR_TIMEOUT:
                    continue
                if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
                    self._add(
                        HealthFinding(
                            "gpu_lost", "critical", "a GPU is lost: the driver cannot reach it", is_event=True
                        )
                    )
                return
            if event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                self._add(xid_finding(self._index(event.device), int(event.eventData)))

    def _index(self, device: Any) -> int | None:
        try:
            return self._indices.get(self._nvml.nvmlDeviceGetUUID(device))
        except self._nvml.NVMLError:
            return None

    def _add(self, finding: HealthFinding) -> None:
        with self._lock:
            self._found.append(finding)


_Row = tuple[str, Literal["critical", "warning"], str]


def _gpu_findings(before: GpuSample | None, gpu: GpuSample, limits: GpuLimits, must_be_free: bool) -> Iterator[_Row]:
    if gpu.lost:
        yield "lost", "critical", "is lost: the driver cannot reach it"
    if gpu.recovery_action:
        yield "recovery", "critical", f"needs {RECOVERY[gpu.recovery_action]}, says the driver"
    yield from _memory_findings(gpu, limits)
    yield from _link_findings(before, gpu, limits)
    yield from _pcie_findings(before, gpu, limits)
    for reason in gpu.slowdowns:
        yield "slowdown", "warning", f"runs slower: {SLOWDOWNS[reason]}"
    if gpu.temperature_c is not None and gpu.slowdown_c is not None and gpu.temperature_c >= gpu.slowdown_c:
        yield "temperature", "warning", f"is at {gpu.temperature_c} C; it slows down at {gpu.slowdown_c} C"
    if must_be_free and gpu.pids:
        yield "busy", "critical", f"is in use by process {', '.join(map(str, gpu.pids))}"
    for error in gpu.errors:
        yield "unknown", "warning", f"cannot be asked: {error}"


def _memory_findings(gpu: GpuSample, limits: GpuLimits) -> Iterator[_Row]:
    """The rules of AzureHPC NHC's check_gpu_ecc, and DCGM's: one uncorrectable error since the start is too many."""
    if gpu.volatile_uncorrected:
        yield "ecc", "critical", f"had {gpu.volatile_uncorrected} uncorrectable memory errors since its driver started"
    if gpu.sram_uncorrected:
        yield "ecc", "critical", f"had {gpu.sram_uncorrected} uncorrectable errors of its on-chip memory in its life"
    counts = (
        (gpu.aggregate_uncorrected, limits.memory_errors, "uncorrectable memory errors in its life"),
        (gpu.aggregate_corrected, limits.memory_errors, "corrected memory errors in its life"),
        (gpu.sram_corrected, limits.sram_corrected, "corrected errors of its on-chip memory since its driver started"),
        (gpu.rows_remapped, limits.rows_remapped, "rows of memory replaced after uncorrectable errors"),
    )
    for count, limit, what in counts:
        if count is not None and count > limit:
            yield "ecc", "critical", f"had {count} {what}; the limit is {limit}"
    if gpu.remap_failed:
        yield "remap", "critical", "has no spare row of memory left: it is to be replaced"
    if gpu.remap_pending:
        yield "remap", "critical", "waits for a reset to replace a row of memory: `nvidia-smi --gpu-reset`"


def _link_findings(before: GpuSample | None, gpu: GpuSample, limits: GpuLimits) -> Iterator[_Row]:
    """A link is down if another one of the GPU works: a GPU without a bridge or switch has none that do."""
    in_use = any(link.active for link in gpu.nvlinks) or (before is not None and any(x.active for x in before.nvlinks))
    down = [str(number) for number, link in enumerate(gpu.nvlinks) if in_use and not link.active]
    if down:
        yield "nvlink", "critical", f"has NVLink {', '.join(down)} down"
    if before is None or len(before.nvlinks) != len(gpu.nvlinks):
        return
    seconds = max(gpu.monotonic_s - before.monotonic_s, 1e-9)
    for number, (old, link) in enumerate(zip(before.nvlinks, gpu.nvlinks, strict=True)):
        crc = _growth(old.crc_errors, link.crc_errors)
        if crc / seconds >= limits.nvlink_crc_per_s:
            yield "nvlink", "critical", f"has {crc / seconds:.0f} CRC errors a second on NVLink {number}"
        # DCGM fails a GPU for one. The link has repeated what was lost, so work may go on; the operator should know.
        recovered = _growth(old.replays, link.replays) + _growth(old.recoveries, link.recoveries)
        if recovered:
            yield "nvlink", "warning", f"had to repeat or recover {recovered} times on NVLink {number}"


def _pcie_findings(before: GpuSample | None, gpu: GpuSample, limits: GpuLimits) -> Iterator[_Row]:
    if gpu.pcie_width is not None and gpu.pcie_width_max is not None and gpu.pcie_width < gpu.pcie_width_max:
        yield "pcie", "warning", f"has {gpu.pcie_width} of {gpu.pcie_width_max} PCIe lanes"
    # An idle GPU lowers its generation to save power.
    generation, best = gpu.pcie_generation, gpu.pcie_generation_max
    if generation is not None and best is not None and generation < best and not gpu.idle:
        yield "pcie", "warning", f"runs PCIe generation {generation} of {best}"
    if before is not None:
        minutes = max(gpu.monotonic_s - before.monotonic_s, 1e-9) / 60
        replays = _growth(before.pcie_replays, gpu.pcie_replays)
        # A rate needs its minute: two replays in a second are not 120 a minute.
        if replays > limits.pcie_replays_per_minute * max(minutes, 1.0):
            yield "pcie", "warning", f"repeated {replays} PCIe transfers in {minutes:.1f} minutes"


def _growth(old: int | None, new: int | None) -> int:
    return max(new - old, 0) if old is not None and new is not None else 0


class _Asker:
    """Asks the library about one GPU, and remembers what it would not say."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._silent = (
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_NO_PERMISSION,
            nvml.NVML_ERROR_INVALID_ARGUMENT,
        )
        self._lost = False
        self._errors: list[str] = []

    def gpu(self, index: int) -> GpuSample:
        nvml = self._nvml
        now_s = time.monotonic()
        handle = self._ask(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            return GpuSample(index, now_s, lost=self._lost, errors=tuple(self._errors))
        wrong, right = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
        rows = self._ask(nvml.nvmlDeviceGetRemappedRows, handle)
        link_count, recovery = self._fields(handle)
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if reasons is None:  # drivers before 535
            reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        used = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        facts = {
            "name": self._ask(nvml.nvmlDeviceGetName, handle),
            "uuid": self._ask(nvml.nvmlDeviceGetUUID, handle),
            "volatile_uncorrected": self._ask(nvml.nvmlDeviceGetTotalEccErrors, handle, wrong, nvml.NVML_VOLATILE_ECC),
            "aggregate_uncorrected": self._ask(
                nvml.nvmlDeviceGetTotalEccErrors, handle, wrong, nvml.NVML_AGGREGATE_ECC
            ),
            "aggregate_corrected": self._ask(nvml.nvmlDeviceGetTotalEccErrors, handle, right, nvml.NVML_AGGREGATE_ECC),
            "sram_corrected": self._sram(handle, right, nvml.NVML_VOLATILE_ECC),
            "sram_uncorrected": self._sram(handle, wrong, nvml.NVML_AGGREGATE_ECC),
            "rows_remapped": rows[1] if rows else None,
            "remap_pending": bool(rows[2]) if rows else None,
            "remap_failed": bool(rows[3]) if rows else None,
            "recovery_action": next((name for name in RECOVERY if getattr(nvml, name) == recovery), None),
            "slowdowns": tuple(name for name in SLOWDOWNS if reasons & getattr(nvml, name)),
            "idle": bool(reasons & nvml.nvmlClocksEventReasonGpuIdle),
            "busy": used and used.gpu / 100,
            "memory_bytes": memory and memory.used,
            "power_w": None if milliwatts is None else milliwatts / 1000,
            "temperature_c": self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            "slowdown_c": self._ask(
                nvml.nvmlDeviceGetTemperatureThreshold, handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
            "pcie_generation": self._ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            "pcie_generation_max": self._ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            "pcie_width": self._ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            "pcie_width_max": self._ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
            "pcie_replays": self._ask(nvml.nvmlDeviceGetPcieReplayCounter, handle),
            "nvlinks": tuple(self._link(handle, number) for number in range(link_count)),
            "pids": tuple(p.pid for p in self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()),
        }
        return GpuSample(index, now_s, lost=self._lost, errors=tuple(self._errors), **facts)

    def _sram(self, handle: Any, kind: int, since: int) -> int | None:
        where = self._nvml.NVML_MEMORY_LOCATION_SRAM
        return self._ask(self._nvml.nvmlDeviceGetMemoryErrorCounter, handle, kind, since, where)

    def _fields(self, handle: Any) -> tuple[int, int | None]:
        """The number of NVLinks and the recovery that the driver asks for."""
        wanted = [self._nvml.NVML_FI_DEV_NVLINK_LINK_COUNT, self._nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        answers = self._ask(self._nvml.nvmlDeviceGetFieldValues, handle, wanted)
        if answers is None:
            return 0, None
        links, recovery = (
            int(answer.value.uiVal) if answer.nvmlReturn == self._nvml.NVML_SUCCESS else None for answer in answers
        )
        return links or 0, recovery

    def _link(self, handle: Any, number: int) -> NvLink:
        nvml = self._nvml

        def count(kind: int) -> int | None:
            return self._ask(nvml.nvmlDeviceGetNvLinkErrorCounter, handle, number, kind)

        flits, data = count(nvml.NVML_NVLINK_ERROR_DL_CRC_FLIT), count(nvml.NVML_NVLINK_ERROR_DL_CRC_DATA)
        return NvLink(
            active=bool(self._ask(nvml.nvmlDeviceGetNvLinkState, handle, number)),
            replays=count(nvml.NVML_NVLINK_ERROR_DL_REPLAY),
            recoveries=count(nvml.NVML_NVLINK_ERROR_DL_RECOVERY),
            crc_errors=None if flits is None and data is None else (flits or 0) + (data or 0),
        )

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer; None if there is none."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
                self._lost = True
            elif error.value not in self._silent:
                self._errors.append(f"{function.__name__}: {error}")
            return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the GPUs' samples and findings as one JSON object; exit code 0 healthy, 1 not, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m goku_infra.checks.gpu_health", description=main.__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--record", type=Path, metavar="FILE", help="keep every call and answer of NVML in FILE")
    which.add_argument("--replay", type=Path, metavar="FILE", help="take the answers from such a file")
    options = parser.parse_args(arguments)
    try:
        nvml: Any = Replay(options.replay) if options.replay else open_nvml()
        recorder = Recorder(nvml, "recorded from the GPUs of this node") if options.record else None
        gpus = sample(recorder or nvml)
        if recorder:
            recorder.write(options.record)
    except OpsError as error:
        print(f"gpu_health: error: {error}", file=sys.stderr)
        return 2
    found = findings((), gpus, GpuLimits())
    report = {"gpus": [dataclasses.asdict(gpu) for gpu in gpus], "findings": [vars(row) for row in found]}
    print(json.dumps(report))
    return int(any(row.severity == "critical" for row in found))


if __name__ == "__main__":
    sys.exit(main())
