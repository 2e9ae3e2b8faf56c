"""The cluster that other tests trust: its nodes fail as real ones do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import CONTROL, Cluster, available

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2])).sendall(b'x')"
LISTEN = """
import socket
server = socket.create_server(("", 5000))
print("up", flush=True)
held = [server.accept()[0] for _ in range(100)]
"""
HOLD = """
import socket
connection = socket.create_connection(("n3", 5000))
print("open", flush=True)
connection.settimeout(1.2)
try:
    print(connection.recv(1))
except TimeoutError:
    print("silence")
"""
OTHER_CLUSTER = """
import time
from cluster import Cluster
with Cluster(2) as cluster:
    pids = [pid for node in ("ctl", "n1", "n2") for pid in cluster.processes(node)]
    print(cluster.exec("ctl", ["srun", "-N2", "hostname"]).split(), pids, cluster.folder, sep=";", flush=True)
    time.sleep(100)
"""


def test_srun_runs_on_every_node_by_its_name_and_address(cluster):
    script = "echo $(hostname) $(hostname -i) $SLURM_PROCID"
    lines = cluster.exec(CONTROL, ["srun", "-N4", "bash", "-c", script]).splitlines()
    expected = [f"{node} {cluster.addresses[node]} {rank}" for rank, node in enumerate(cluster.nodes)]
    assert sorted(lines) == expected


def test_the_files_system_is_shared_and_the_local_disk_and_memory_are_not(cluster, tmp_path):
    for folder in (cluster.local, "/dev/shm"):
        cluster.exec("n1", ["touch", f"{folder}/mine"])
        assert "mine" in cluster.exec("n1", ["ls", str(folder)])
        assert "mine" not in cluster.exec("n2", ["ls", str(folder)])
        assert not Path(folder, "mine").exists()
        cluster.exec("n1", ["rm", f"{folder}/mine"])
    cluster.exec("n1", ["touch", str(tmp_path / "shared")])
    assert (tmp_path / "shared").exists() and cluster.exec("n2", ["ls", str(tmp_path)]) == "shared\n"


def test_a_node_without_power_takes_its_processes_and_its_disk_along_and_comes_back_empty(cluster):
    cluster.exec("n4", ["touch", f"{cluster.local}/lost"])
    sleeper = cluster.popen("n4", ["sleep", "1000"])

    def sleeping() -> list[int]:
        return [pid for pid, command in cluster.processes("n4").items() if command == "sleep 1000"]

    inside = cluster.wait_for(sleeping, 5, "a process on n4")
    cluster.power_off("n4")
    assert sleeper.wait(timeout=60) != 0
    assert not [pid for pid in inside if _runs(pid)]
    cluster.boot("n4", wait_s=20)
    assert cluster.exec("n4", ["ls", str(cluster.local)]) == ""
    assert cluster.exec(CONTROL, ["srun", "--nodelist=n4", "hostname"]) == "n4\n"


def test_power_off_and_a_pulled_cable_are_silent_and_a_cable_can_be_plugged_in_again(cluster):
    def reaches(limit_s: float = 1.0) -> bool:
        try:
            cluster.exec("n1", [sys.executable, "-c", CONNECT, "n3", str(limit_s)])
        except RuntimeError as error:
            assert "timed out" in str(error) or "No route" in str(error), error
            return False
        return True

    listener = cluster.popen("n3", [sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, text=True)
    assert listener.stdout.readline() == "up\n"
    assert reaches()
    # A connection that was open hears nothing of it: no end of file, no reset.
    for cut in (lambda: cluster.link("n3", up=False), lambda: cluster.power_off("n3")):
        holder = cluster.popen("n1", [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "open\n"
        cut()
        assert not reaches()
        assert holder.stdout.read() == "silence\n"
        if listener.poll() is None:
            cluster.link("n3", up=True)
            assert reaches(15)
    cluster.boot("n3", wait_s=20)


def test_a_frozen_node_does_nothing_and_goes_on_when_thawed(cluster, tmp_path):
    script = f"while true; do echo x >> {tmp_path}/ticks; sleep 0.01; done"
    ticker = cluster.popen("n2", ["bash", "-c", script])
    cluster.wait_for(lambda: (tmp_path / "ticks").exists(), 5, "a tick")
    cluster.freeze("n2")
    try:
        time.sleep(0.05)
        size = (tmp_path / "ticks").stat().st_size
        time.sleep(0.2)
        assert (tmp_path / "ticks").stat().st_size == size
    finally:
        cluster.thaw("n2")
    cluster.wait_for(lambda: (tmp_path / "ticks").stat().st_size > size, 5, "a tick after the thaw")
    ticker.kill()


def test_two_clusters_live_side_by_side_and_a_killed_maker_leaves_no_process(cluster, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_CLUSTER], stdout=subprocess.PIPE, text=True, env=environment
    ) as maker:
        hosts, pids, folder = maker.stdout.readline().strip().split(";")
        assert sorted(eval(hosts)) == ["n1", "n2"]
        assert cluster.exec(CONTROL, ["srun", "-N4", "hostname"]).count("n") == 4
        assert all(_runs(pid) for pid in eval(pids)) and len(eval(pids)) >= 6
        maker.kill()
    cluster.wait_for(lambda: not any(_runs(pid) for pid in eval(pids)), 5, "the end of the other cluster")
    Cluster(1).down()  # making one clears up what is left of those whose maker is gone
    assert not Path(folder).exists()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "slurm-wlm" in available() or "root" in available()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in available()


def test_a_cluster_is_up_within_seconds():
    reason = available()
    if reason:
        pytest.skip(reason)
    begin = time.monotonic()
    with Cluster(4) as one:
        assert time.monotonic() - begin < 20  # 2 on a machine that does nothing else
        assert one.states() == dict.fromkeys(one.nodes, "idle")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
