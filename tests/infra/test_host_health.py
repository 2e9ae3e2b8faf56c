"""What two samples of a host say together, and that a sample reads the machine's real files."""

import errno
import os
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from goku_infra.checks import host_health
from goku_infra.checks.host_health import Disk, Interface, Limits, Sample, findings, sample

HEALTHY = Sample(
    boot_id="b",
    wall_s=1e9,
    running_s=1000.0,
    disks={"/run": Disk(50, 100, 50, 100, read_only=False)},
    interfaces={"eth0": Interface(up=True, packets=10_000, errors=0, downs=1)},
    once_up=("eth0",),
    memory_available_share=0.5,
    memory_stalled_percent=0.0,
    oom_kills=2,
    kernel_number=9,
)
LATER = replace(HEALTHY, wall_s=1e9 + 10, running_s=1010.0)


def rows(previous, now):
    return [(row.name, row.severity) for row in findings(previous, now, Limits())]


def test_a_healthy_host_has_no_findings():
    assert rows(None, HEALTHY) == rows(HEALTHY, LATER) == []


def link(**changes):
    return {"interfaces": {"eth0": replace(HEALTHY.interfaces["eth0"], **changes)}}


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        ({"disks": {"/run": None}}, ("disk", "critical"), "does not answer within 2 s"),
        ({"disks": {"/run": Disk(1, 100, 50, 100, False)}}, ("disk", "critical"), "is full"),
        ({"disks": {"/run": Disk(50, 100, 1, 100, False)}}, ("disk", "critical"), "no inodes left"),
        ({"disks": {"/run": Disk(50, 100, 50, 100, True)}}, ("disk", "critical"), "read-only"),
        (link(packets=20_000, errors=11), ("network", "warning"), "11 errors among 10000 packets"),
        (link(downs=3), ("network", "warning"), "down 2 times"),
        ({"memory_available_share": 0.01}, ("memory", "warning"), "1.0%"),
        ({"memory_stalled_percent": 21.0}, ("memory", "warning"), "21%"),
        ({"oom_kills": 3}, ("memory", "warning"), "killed 1 process"),
        ({"wall_s": 1e9 + 3610}, ("clock", "warning"), "+3600.0 s"),
        ({"wall_s": 1e9 - 3590}, ("clock", "warning"), "-3600.0 s"),
    ],
)
def test_each_fault_is_one_finding(change, expected, words):
    now = replace(LATER, **change)
    assert rows(HEALTHY, now) == [expected]
    assert words in findings(HEALTHY, now, Limits())[0].text


@pytest.mark.parametrize("interfaces", [{}, link(up=False)["interfaces"]])
def test_a_link_that_was_up_and_is_not_is_critical(interfaces):
    other = {"ib0": Interface(up=True, packets=0, errors=0, downs=0)}
    now = replace(LATER, interfaces={**interfaces, **other}, once_up=("eth0", "ib0"))
    assert rows(HEALTHY, now) == [("network", "critical")]
    assert "eth0" in findings(HEALTHY, now, Limits())[0].text


def test_a_port_that_was_never_up_is_no_finding_but_no_link_at_all_is():
    port = Interface(up=False, packets=0, errors=0, downs=0)
    assert rows(None, replace(HEALTHY, interfaces={**HEALTHY.interfaces, "eth1": port})) == []
    assert rows(None, replace(HEALTHY, interfaces={"eth1": port}, once_up=())) == [("network", "warning")]


def test_counters_start_again_with_the_host():
    rebooted = replace(LATER, boot_id="c", wall_s=2e9, running_s=5.0, oom_kills=7, **link(downs=9, errors=99))
    assert rows(HEALTHY, rebooted) == []


def test_a_large_disk_is_not_full_while_much_is_left():
    left = Disk(free_bytes=21 << 30, total_bytes=10 << 40, free_inodes=1, total_inodes=1, read_only=False)
    assert rows(None, replace(HEALTHY, disks={"/run": left})) == []
    assert rows(None, replace(HEALTHY, disks={"/run": replace(left, free_bytes=19 << 30)})) == [("disk", "critical")]


def test_a_file_system_that_does_not_count_inodes_has_enough():
    assert rows(None, replace(HEALTHY, disks={"/run": Disk(50, 100, 0, 0, False)})) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.", ("gpu_xid", "critical")),
        ("NVRM: Xid (PCI:0000:3b:00): 13, pid=1234, Graphics Exception", ("gpu_xid", "warning")),
        ("mce: [Hardware Error]: Machine check events logged", ("kernel", "warning")),
        ("mce: [Hardware Error]: CPU 1: Machine Check: 0 Bank 7: 8c00004000010090", ("kernel", "warning")),
        ("mce: [Hardware Error]: CPU 1: Machine Check Exception: 5 Bank 1: b200", ("kernel", "critical")),
        ("[Hardware Error]: Uncorrected, software restartable error.", ("kernel", "critical")),
        ("{1}[Hardware Error]: event severity: fatal", ("kernel", "critical")),
        ("mce: Uncorrected hardware memory error in user-access at 3f1c", ("kernel", "critical")),
        ("EDAC MC0: 1 UE memory read error on CPU_SrcID#0", ("kernel", "critical")),
        ("EXT4-fs error (device sda1): ext4_find_entry:1455: inode #2", ("file_system", "critical")),
        ("EXT4-fs (sda1): Remounting filesystem read-only", ("file_system", "critical")),
        ("blk_update_request: critical medium error, dev sda: I/O error", ("disk", "critical")),
        ("Out of memory: Killed process 4242 (python)", ("memory", "warning")),
        ("watchdog: BUG: soft lockup - CPU#3 stuck for 22s!", ("kernel", "warning")),
    ],
)
def test_a_line_of_the_kernels_log_is_read_once_and_judged(tmp_path, line, expected):
    number, micros = 41, int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1e6)
    records = [f"6,40,{micros},-;usb 1-1: new device", f"3,{number},{micros},-;{line}\n SUBSYSTEM=x"]
    last, lines = kernel_log(tmp_path, records, after=-1)
    assert (last, lines) == (41, (line,))
    assert rows(None, replace(HEALTHY, kernel_lines=lines)) == [expected]
    assert kernel_log(tmp_path, records, after=41) == (41, ())


def test_old_lines_of_the_kernels_log_are_left_to_those_who_were_there(tmp_path):
    line = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."
    assert kernel_log(tmp_path, [f"3,7,1000000,-;{line}"], after=-1, since_s=2.0) == (7, ())
    assert kernel_log(tmp_path, [f"3,7,3000000,-;{line}"], after=-1, since_s=2.0) == (7, (line,))
    assert kernel_log(tmp_path, [f"3,7,1000000,-;{line}"], after=3, since_s=2.0) == (7, (line,))


def kernel_log(folder: Path, records: list[str], after: int, since_s: float = 0.0):
    """/dev/kmsg gives one record a read and then says that it would block; so does this stand-in."""
    remaining = [record.encode() for record in records]

    def read(descriptor, size):
        if not remaining:
            raise BlockingIOError(errno.EAGAIN, "no more")
        return remaining.pop(0)

    path = folder / "kmsg"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_health.os, "read", read)
        return host_health._kernel_log(path, after, since_s)


def test_this_machine_is_sampled(tmp_path):
    first = sample([tmp_path], None, Limits())
    assert first.disks[str(tmp_path)].total_bytes == os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    assert 0 < first.memory_available_share <= 1
    assert abs(first.wall_s - time.time()) < 60
    second = sample([tmp_path], first, Limits())
    assert (second.boot_id, second.once_up) == (first.boot_id, first.once_up)
    assert second.running_s > first.running_s and second.kernel_number >= first.kernel_number


def test_a_folder_that_is_not_there_and_a_disk_that_hangs_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(host_health.os, "statvfs", lambda folder: time.sleep(6))
    begin = time.monotonic()
    now = sample([tmp_path], None, Limits(disk_answer_s=0.1))
    assert now.disks[str(tmp_path)] is None and time.monotonic() - begin < 5
    monkeypatch.undo()
    assert sample([tmp_path / "none"], None, Limits()).disks[str(tmp_path / "none")] is None


def test_the_files_of_a_host_are_read(tmp_path):
    files = {
        "proc/sys/kernel/random/boot_id": "x\n",
        "proc/meminfo": "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 250 kB\n",
        "proc/pressure/memory": "some avg10=9.00 avg60=0 avg300=0 total=0\nfull avg10=4.50 avg60=0 avg300=0 total=0\n",
        "proc/vmstat": "nr_free_pages 1\noom_kill 3\n",
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/docker0/operstate": "down",
        "sys/class/net/docker0/bridge/x": "",
        "sys/class/net/eth0/operstate": "up",
        "sys/class/net/eth0/carrier_down_count": "4",
        "sys/class/net/eth0/statistics/rx_packets": "10",
        "sys/class/net/eth0/statistics/tx_packets": "20",
        "sys/class/net/eth0/statistics/rx_errors": "1",
        "sys/class/net/eth0/statistics/tx_errors": "2",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
        "sys/class/infiniband/mlx5_0/ports/1/counters/link_downed": "5",
        "sys/class/infiniband/mlx5_0/ports/1/counters/symbol_error": "6",
        "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    now = sample([], None, Limits(), root=tmp_path)
    assert now.interfaces == {
        "eth0": Interface(up=True, packets=30, errors=3, downs=4),
        "mlx5_0:1": Interface(up=True, packets=0, errors=6, downs=5),
        "mlx5_1:1": Interface(up=False, packets=0, errors=0, downs=0),
    }
    assert now.once_up == ("eth0", "mlx5_0:1") and now.kernel_number == -1
    assert (now.memory_available_share, now.memory_stalled_percent, now.oom_kills) == (0.25, 4.5, 3)
    (tmp_path / "sys/class/net/eth0/operstate").write_text("lowerlayerdown")
    later = sample([], now, Limits(), root=tmp_path)
    assert [row.text for row in findings(now, later, Limits())] == ["the network link eth0 is down"]
    assert [row.text for row in findings(later, sample([], later, Limits(), root=tmp_path), Limits())] == [
        "the network link eth0 is down"
    ]


def test_only_hardware_is_a_link_where_there_is_some(tmp_path):
    """Containers' and tunnels' interfaces come and go."""
    for name in ("lo", "cali12", "tun0", "ib0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text("up")
    assert set(host_health._ethernet(tmp_path)) == {"cali12", "tun0", "ib0"}
    for name in ("eth0", "ib0"):
        (tmp_path / name / "device").mkdir(parents=True)
    assert set(host_health._ethernet(tmp_path)) == {"eth0", "ib0"}


def test_a_disk_that_hangs_is_asked_again_only_when_it_has_answered(tmp_path, monkeypatch):
    asked, stop = [], threading.Event()
    real = os.statvfs

    def hangs(folder):
        asked.append(folder)
        stop.wait(60)
        return real(folder)

    monkeypatch.setattr(host_health.os, "statvfs", hangs)
    for _ in range(3):
        assert sample([tmp_path], None, Limits(disk_answer_s=0.05)).disks[str(tmp_path)] is None
    assert len(asked) == 1
    stop.set()
    deadline = time.monotonic() + 30
    while sample([tmp_path], None, Limits(disk_answer_s=30)).disks[str(tmp_path)] is None:
        assert time.monotonic() < deadline


def _may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _may_mount(), reason="mounting a file system needs root and unshare")
def test_a_full_and_a_read_only_disk_are_found_on_real_file_systems(tmp_path):
    """In a mount namespace of its own, so that nothing is left behind."""
    code = (
        "import os, pathlib, sys\n"
        "from goku_infra.checks.host_health import Limits, findings, sample\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def names(): return [row.text for row in findings(None, sample([folder], None, Limits()), Limits())"
        " if row.name == 'disk']\n"
        "os.system(f'mount -t tmpfs -o size=1m tmpfs {folder}')\n"
        "assert names() == [], names()\n"
        "(folder / 'x').write_bytes(bytes(1020 * 1024))\n"
        "assert len(names()) == 1 and 'is full' in names()[0], names()\n"
        "(folder / 'x').unlink()\n"
        "os.system(f'mount -o remount,ro {folder}')\n"
        "assert len(names()) == 1 and 'read-only' in names()[0], names()\n"
        "print('seen')\n"
    )
    infra = Path(host_health.__file__).parents[1]
    done = subprocess.run(
        ["unshare", "--mount", "python3", "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=infra
    )
    assert done.stdout == "seen\n", done.stderr
