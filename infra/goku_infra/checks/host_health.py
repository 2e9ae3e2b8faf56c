"""The health of a node's host: what is sampled from /proc, /sys and its disks, and what two samples say together.

`findings` is pure; only `sample` looks at the machine.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from goku_infra.checks.health import HealthFinding, answer_within

DOWN = ("down", "lowerlayerdown", "notpresent")
"""Values of /sys/class/net/NAME/operstate; `unknown` is what tunnels and loopback say when they work."""
KERNEL_LINES_KEPT = 20
RECENT_S = 3600.0
"""How old a line of the kernel's log may be that a first sample, which has no earlier one, still takes."""

CRITICAL_XIDS = frozenset({48, 56, 57, 58, 62, 64, 65, 68, 69, 73, 74, 79, 80, 81, 92, 95, 119, 120, 140})
"""Driver reports after which AzureHPC NHC (customTests/azure_gpu_xid.nhc) takes a node out, less 63 (a row was
remapped, as designed), and with 95 (uncontained memory error) and 140 (unrecovered memory error) of NVIDIA's catalogue
(docs.nvidia.com/deploy/xid-errors)."""


class KernelPattern(NamedTuple):
    """A line of the kernel's log that matters."""

    pattern: re.Pattern[str]
    name: str
    critical: bool


KERNEL_PATTERNS = (
    KernelPattern(re.compile(r"NVRM: Xid \(\S+\): (\d+)"), "gpu_xid", critical=True),  # unless the number is harmless
    KernelPattern(re.compile(r"NVRM: .*GPU .*has fallen off the bus"), "gpu_lost", critical=True),
    KernelPattern(re.compile(r"SXid \(\S+\): \d+, Fatal"), "nvswitch", critical=True),
    KernelPattern(
        re.compile(
            r"\[Hardware Error\].*(?i:\buncorrect|\bfatal|machine check exception)|mce: Uncorrected|EDAC .*\bUE\b"
        ),
        "kernel",
        True,
    ),
    # Errors that were corrected, too, are announced like this.
    KernelPattern(re.compile(r"mce: .*\[Hardware Error\]|Machine check events logged"), "kernel", critical=False),
    KernelPattern(re.compile(r"EXT4-fs error|XFS .*(?:Corruption|shutting down)|BTRFS: error"), "file_system", True),
    KernelPattern(re.compile(r"Remounting filesystem read-only"), "file_system", critical=True),
    KernelPattern(
        re.compile(r"blk_update_request: .*I/O error|\bI/O error, dev|nvme .*controller is down"), "disk", True
    ),
    KernelPattern(re.compile(r"watchdog: BUG: soft lockup|rcu.*detected stalls"), "kernel", critical=False),
    KernelPattern(re.compile(r"Out of memory: Killed process|Memory cgroup out of memory"), "memory", critical=False),
)


@dataclass(frozen=True)
class Limits:
    """What a healthy host keeps to. Ours, not a vendor's: floors that a working node is far from."""

    disk_free_share: float = 0.02
    disk_free_bytes: int = 20 << 30
    """A disk with so much left is not full, whatever its share."""
    inodes_free_share: float = 0.02
    memory_available_share: float = 0.02
    memory_stalled_percent: float = 20.0
    """`full avg10` of /proc/pressure/memory: time in which nothing could run for want of memory."""
    clock_jump_s: float = 1.0
    packet_error_share: float = 0.001
    disk_answer_s: float = 2.0


@dataclass(frozen=True)
class Disk:
    """One file system, by a folder on it."""

    free_bytes: int
    total_bytes: int
    free_inodes: int
    total_inodes: int
    """0 where the file system does not count them."""
    read_only: bool


@dataclass(frozen=True)
class Interface:
    """One network interface: of Ethernet, or a port of InfiniBand."""

    up: bool
    packets: int
    errors: int
    """Received, sent and dropped on the wire; for InfiniBand, symbol errors."""
    downs: int
    """How often the link has gone down."""


@dataclass(frozen=True)
class Sample:
    """The state of a host at a moment."""

    boot_id: str
    wall_s: float
    running_s: float
    """The clock that nobody sets, suspended time included."""
    disks: dict[str, Disk | None]
    """By folder; None: the disk did not answer in time, or refused."""
    interfaces: dict[str, Interface]
    once_up: tuple[str, ...]
    """Interfaces that have been up since the host started, as far as samples tell."""
    memory_available_share: float
    memory_stalled_percent: float
    oom_kills: int
    kernel_number: int
    """The last line of the kernel's log that was read; -1: it cannot be."""
    kernel_lines: tuple[str, ...] = ()
    """Lines newer than the sample before, or than `RECENT_S`, that match `KERNEL_PATTERNS`."""


def findings(previous: Sample | None, now: Sample, limits: Limits) -> list[HealthFinding]:
    """What is wrong with the host now; counters and clocks are compared with an earlier sample of the same boot."""
    before = previous if previous is not None and previous.boot_id == now.boot_id else None
    return [
        *_disk_findings(now, limits),
        *_network_findings(before, now, limits),
        *_memory_findings(before, now, limits),
        *_clock_findings(before, now, limits),
        *(_kernel_finding(line) for line in now.kernel_lines),
    ]


def sample(folders: Sequence[Path], previous: Sample | None, limits: Limits, root: Path = Path("/")) -> Sample:
    """Look at this host.

    Args:
        folders: whose disks are looked at.
        previous: the last sample, from which reading of the kernel's log goes on.
        root: holds `proc` and `sys`; another than / for tests.
    """
    boot_id = _text(root / "proc/sys/kernel/random/boot_id")
    before = previous if previous is not None and previous.boot_id == boot_id else None
    interfaces = {**_ethernet(root / "sys/class/net"), **_infiniband(root / "sys/class/infiniband")}
    up = {name for name, interface in interfaces.items() if interface.up}
    running_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    number, lines = _kernel_log(root / "dev/kmsg", before.kernel_number if before else -1, running_s - RECENT_S)
    return Sample(
        boot_id=boot_id,
        wall_s=time.time(),
        running_s=running_s,
        disks={
            str(folder): answer_within(limits.disk_answer_s, partial(_disk, folder), f"disk {folder}")
            for folder in folders
        },
        interfaces=interfaces,
        once_up=tuple(sorted(up | set(before.once_up if before else ()))),
        memory_available_share=_memory_available_share(root / "proc/meminfo"),
        memory_stalled_percent=_memory_stalled_percent(root / "proc/pressure/memory"),
        oom_kills=_counter(root / "proc/vmstat", "oom_kill"),
        kernel_number=number,
        kernel_lines=lines,
    )


def _disk_findings(now: Sample, limits: Limits) -> Iterator[HealthFinding]:
    for folder, disk in now.disks.items():
        if disk is None:
            yield _critical("disk", f"the disk of {folder} does not answer within {limits.disk_answer_s:g} s")
            continue
        if disk.read_only:
            yield _critical("disk", f"the disk of {folder} is mounted read-only")
        free, inodes = _share(disk.free_bytes, disk.total_bytes), _share(disk.free_inodes, disk.total_inodes)
        if free < limits.disk_free_share and disk.free_bytes < limits.disk_free_bytes:
            yield _critical(
                "disk",
                f"the disk of {folder} is full: {disk.free_bytes / 2**30:.2f} GiB, {free:.1%}, free; "
                f"at least {limits.disk_free_share:.1%} is needed",
            )
        if inodes < limits.inodes_free_share:
            yield _critical("disk", f"the disk of {folder} has no inodes left: {disk.free_inodes} free, {inodes:.1%}")


def _network_findings(before: Sample | None, now: Sample, limits: Limits) -> Iterator[HealthFinding]:
    for name in now.once_up:
        interface = now.interfaces.get(name)
        if interface is None or not interface.up:
            yield _critical("network", f"the network link {name} {'is down' if interface else 'is gone'}")
    if not any(interface.up for interface in now.interfaces.values()):
        yield _warning("network", "no network link is up: this node can only work alone")
    for name, interface in now.interfaces.items():
        old = before.interfaces.get(name) if before else None
        if old is None:
            continue
        errors, packets = interface.errors - old.errors, interface.packets - old.packets
        if errors > limits.packet_error_share * (errors + packets):
            yield _warning("network", f"the network link {name} had {errors} errors among {packets} packets")
        if interface.up and interface.downs > old.downs:
            yield _warning("network", f"the network link {name} was down {interface.downs - old.downs} times")


def _memory_findings(before: Sample | None, now: Sample, limits: Limits) -> Iterator[HealthFinding]:
    if now.memory_available_share < limits.memory_available_share:
        yield _warning("memory", f"only {now.memory_available_share:.1%} of the host's memory is available")
    if now.memory_stalled_percent > limits.memory_stalled_percent:
        yield _warning("memory", f"the host stood still for want of memory {now.memory_stalled_percent:.0f}% of 10 s")
    if before and now.oom_kills > before.oom_kills:
        yield _warning("memory", f"the kernel killed {now.oom_kills - before.oom_kills} processes for want of memory")


def _clock_findings(before: Sample | None, now: Sample, limits: Limits) -> Iterator[HealthFinding]:
    if before is None:
        return
    jump_s = (now.wall_s - before.wall_s) - (now.running_s - before.running_s)
    if abs(jump_s) > limits.clock_jump_s:
        yield _warning("clock", f"the clock was set by {jump_s:+.1f} s")


def _kernel_finding(line: str) -> HealthFinding:
    kind, match = next((kind, match) for kind in KERNEL_PATTERNS if (match := kind.pattern.search(line)))
    harmless = kind.name == "gpu_xid" and int(match[1]) not in CRITICAL_XIDS
    severity: Literal["critical", "warning"] = "critical" if kind.critical and not harmless else "warning"
    return HealthFinding(kind.name, severity, f"kernel: {line}", is_event=True)


def _critical(name: str, text: str) -> HealthFinding:
    return HealthFinding(name, "critical", text)


def _warning(name: str, text: str) -> HealthFinding:
    return HealthFinding(name, "warning", text)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _disk(folder: Path) -> Disk:
    state = os.statvfs(folder)
    return Disk(
        free_bytes=state.f_bavail * state.f_frsize,
        total_bytes=state.f_blocks * state.f_frsize,
        free_inodes=state.f_favail,
        total_inodes=state.f_files,
        read_only=bool(state.f_flag & os.ST_RDONLY),
    )


def _ethernet(folder: Path) -> dict[str, Interface]:
    """Links to other hosts: hardware, not what comes and goes with containers and tunnels.

    Where none is hardware, as inside of a container: not loopback, not bridges nor their ports.
    """
    interfaces = {}
    paths = sorted(folder.glob("*"))
    hardware = [path for path in paths if (path / "device").exists()]
    for path in hardware or paths:
        if not hardware and (path.name == "lo" or (path / "bridge").exists() or (path / "brport").exists()):
            continue
        counters = {name: _number(path / "statistics" / name) for name in _ETHERNET_COUNTERS}
        interfaces[path.name] = Interface(
            up=_text(path / "operstate") not in DOWN,
            packets=counters["rx_packets"] + counters["tx_packets"],
            errors=counters["rx_errors"] + counters["tx_errors"],
            downs=_number(path / "carrier_down_count"),
        )
    return interfaces


_ETHERNET_COUNTERS = ("rx_packets", "tx_packets", "rx_errors", "tx_errors")


def _infiniband(folder: Path) -> dict[str, Interface]:
    return {
        f"{port.parents[1].name}:{port.name}": Interface(
            up="ACTIVE" in _text(port / "state"),
            packets=_number(port / "counters/port_rcv_packets") + _number(port / "counters/port_xmit_packets"),
            errors=_number(port / "counters/symbol_error") + _number(port / "counters/port_rcv_errors"),
            downs=_number(port / "counters/link_downed"),
        )
        for port in sorted(folder.glob("*/ports/*"))
    }


def _memory_available_share(path: Path) -> float:
    sizes = dict(re.findall(r"^(\w+):\s+(\d+)", _text(path), re.MULTILINE))
    return _share(int(sizes.get("MemAvailable", 0)), int(sizes.get("MemTotal", 0)))


def _memory_stalled_percent(path: Path) -> float:
    match = re.search(r"^full avg10=([\d.]+)", _text(path), re.MULTILINE)
    return float(match[1]) if match else 0.0


def _counter(path: Path, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", _text(path), re.MULTILINE)
    return int(match[1]) if match else 0


def _kernel_log(path: Path, after: int, since_s: float) -> tuple[int, tuple[str, ...]]:
    """The number of the log's last line, and the newest lines that matter.

    Those are the lines after number `after`, or, if that is -1, since the clock of the host's start showed `since_s`.
    """
    lines = []
    last = after
    try:
        log = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return after, ()
    try:
        for record in _kernel_records(log):
            head, _, text = record.partition(";")
            number, micros = (int(part) for part in head.split(",")[1:3])
            message = text.splitlines()[0] if text else ""
            is_new = number > after if after >= 0 else micros / 1e6 > since_s
            if is_new and any(kind.pattern.search(message) for kind in KERNEL_PATTERNS):
                lines.append(message)
            last = max(last, number)
    finally:
        os.close(log)
    return last, tuple(lines[-KERNEL_LINES_KEPT:])


def _kernel_records(log: int) -> Iterator[str]:
    while True:
        try:
            record = os.read(log, 8192)
        except BrokenPipeError:  # overwritten while we read: go on with the oldest that is left
            continue
        except OSError:  # BlockingIOError: that was all; or the log may be opened but not read
            return
        if not record:
            return
        yield record.decode(errors="replace")


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdigit() else 0
