"""A real SLURM cluster on one machine: every node is a set of namespaces with a slurmd of its own.

A node has its own network interface, host name, process ids, /dev/shm and local disk; the file system is the host's,
as a cluster's shared one is. All namespaces are held by processes alone: when the process that made a cluster ends,
even by SIGKILL, the kernel takes everything away, and two clusters never meet.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

CONTROL = "ctl"
SUBNET = "10.77.0"
PREFIX = "goku_slurm_"
PATIENCE = 6.0
"""Limits are those of a machine that does nothing else; a busy one may take so many times as long."""
NEEDED = {
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "ip": "iproute2", "unshare": "util-linux",
    "nsenter": "util-linux", "setpriv": "util-linux",
}  # fmt: skip


def available() -> str:
    """Why no cluster can run here; "" if one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster in namespaces needs root"
    missing = sorted({package for program, package in NEEDED.items() if shutil.which(program) is None})
    if missing:
        return f"not installed: apt-get install --no-install-recommends {' '.join(missing)}"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "this machine does not allow new namespaces"


def card_of(address: str) -> str:
    """The hardware address of the card with that IP address."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


class Cluster:
    """A running cluster of nodes n1, n2, ... and a control node `ctl`; a context manager.

    Args:
        nodes: how many.
        cpus: that every node claims to have, whatever the machine has.
        settings: further lines of slurm.conf, such as a Prolog.
        environment: variables of the nodes' daemons beside the caller's.
    """

    def __init__(
        self, nodes: int = 4, *, cpus: int = 4, settings: Sequence[str] = (), environment: Mapping[str, str] = {}
    ) -> None:
        _sweep()
        self.nodes = tuple(f"n{number}" for number in range(1, nodes + 1))
        self.addresses = {CONTROL: f"{SUBNET}.1", **{node: f"{SUBNET}.{10 + i}" for i, node in enumerate(self.nodes)}}
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}_"))
        self.local = self.folder / "local"
        """The same path on every node, another tmpfs on each: gone when the node goes."""
        self.conf = self.folder / "slurm.conf"
        self.environment = {**os.environ, **environment, "SLURM_CONF": str(self.conf)}
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[Any]] = []
        self._boots = 0
        self._write_files(cpus, settings)

    def __enter__(self) -> "Cluster":
        try:
            self._start_munge()
            self._power_on(CONTROL, "exec slurmctld -D")
            # Its own address: else it has the lowest of its ports' and another one when that node goes, and for half a
            # minute the others ask for a machine that is not there.
            card = card_of(self.addresses[CONTROL])
            self._switch(f"ip link add br0 address {card} type bridge forward_delay 0")
            self._switch(f"ip addr add {self.addresses[CONTROL]}/24 dev br0 && ip link set br0 up")
            for node in self.nodes:
                self._power_on(node, f"slurmd -D -N {node}")
            for name in (CONTROL, *self.nodes):
                self._connect(name)
            self.wait_for(lambda: set(self.states().values()) == {"idle"}, 20, "all nodes idle")
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def down(self) -> None:
        """End every node and everything that was started on one; remove the folder."""
        for name in list(self._holders):
            self._kill(name)
        for process in self._started:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def exec(self, node: str, command: Sequence[str], *, timeout_s: float = 60, **options: Any) -> str:
        """Run a command on a node and return what it wrote to stdout.

        Raises:
            RuntimeError: it failed; the message has what it wrote to stderr.
        """
        done = subprocess.run(
            self._inside(node, command), timeout=timeout_s, text=True, capture_output=True,
            **{"env": self.environment, **options},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} on {node} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def popen(self, node: str, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a command on a node; it dies with the node, and with the cluster."""
        process = subprocess.Popen(self._inside(node, command), **{"env": self.environment, **options})
        self._started.append(process)
        return process

    def power_off(self, node: str) -> None:
        """Cut the power: no process says goodbye, and no packet tells the peers that the node is gone."""
        self.link(node, up=False)
        self._kill(node)

    def boot(self, node: str, wait_s: float = 0) -> None:
        """Switch a node on again; with `wait_s` until SLURM knows it as idle.

        A node that SLURM has marked down must be resumed for that, unless ReturnToService says otherwise.
        """
        self._power_on(node, f"slurmd -D -N {node}")
        self._connect(node)
        if wait_s:
            self.wait_for(lambda: self._listens(node) and self.states()[node] == "idle", wait_s, f"{node} idle")

    def is_on(self, node: str) -> bool:
        return node in self._holders

    def link(self, node: str, *, up: bool) -> None:
        """Pull a node's network cable at the switch, or plug it in: what is sent meanwhile is lost in silence."""
        self._switch(f"ip link set {self._port(node)} {'up' if up else 'down'}")

    def freeze(self, node: str) -> None:
        """Stop every process of a node where it stands, as a stuck kernel does; the network stays up."""
        self._freezer(node, frozen=True)

    def thaw(self, node: str) -> None:
        self._freezer(node, frozen=False)

    def restore(self, timeout_s: float = 40) -> None:
        """Whatever befell the cluster: no job, every node up, plugged in, thawed and idle, nothing left of jobs.

        SLURM may keep the cores of an idle node for some seconds more: who needs certain nodes asks for them.
        """
        self.exec(CONTROL, ["scancel", "--user=root"])
        for node in self.nodes:
            if node not in self._holders:
                self.boot(node)
            self.link(node, up=True)
            self.thaw(node)

        def idle() -> bool:
            states = self.states()
            for node, state in states.items():
                if state.startswith(("down", "drain")):
                    self.exec(CONTROL, ["scontrol", "update", f"nodename={node}", "state=resume"])
            return set(states.values()) == {"idle"} and all(map(self._listens, self.nodes))

        self.wait_for(idle, timeout_s, "all nodes idle again")
        for node in self.nodes:
            self._clear(node)

    def _clear(self, node: str) -> None:
        """End what neither this class nor SLURM keeps on an idle node, and empty its memory's file system."""
        init = self._init(node)
        for pid, words in self.processes(node).items():
            if pid != init and not re.match(r"sleep 3600$|(\S*/)?slurmd\b", words):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.exec(node, ["find", "/dev/shm", "-mindepth", "1", "-delete"])

    def states(self) -> dict[str, str]:
        """SLURM's state of every node: idle, allocated, down*, drained, ..."""
        answer = self.exec(CONTROL, ["sinfo", "--noheader", "--Node", "--format=%N %T"])
        return dict(line.split() for line in answer.splitlines())

    def processes(self, node: str) -> dict[int, str]:
        """Command lines of a node's processes by their ids on the host, init and slurmd included."""
        namespace = os.readlink(f"/proc/{self._init(node)}/ns/pid")
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/pid") == namespace:
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue  # it has ended
        return found

    def wait_for(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Poll until the condition is true and return its value; `PATIENCE` times as long as the limit says.

        Raises:
            TimeoutError: it never was; says `what`, the nodes' states and the end of SLURM's log.
        """
        limit_s = PATIENCE * timeout_s
        end = time.monotonic() + limit_s
        while not (value := condition()):
            if time.monotonic() > end:
                log = (self.folder / f"{CONTROL}.log").read_text(errors="replace").splitlines()[-15:]
                raise TimeoutError(f"not within {limit_s} s: {what}; nodes {self.states()}\n" + "\n".join(log))
            time.sleep(0.02)
        return value

    def _write_files(self, cpus: int, settings: Sequence[str]) -> None:
        self.local.mkdir()
        (self.folder / "state").mkdir()
        hosts = [f"{address} {name}" for name, address in self.addresses.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(hosts) + "\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        self.folder.chmod(0o755)  # other users of the cluster read its slurm.conf
        lines = [
            "ClusterName=goku",
            f"SlurmctldHost={CONTROL}({self.addresses[CONTROL]})",
            "SlurmUser=root",
            f"AuthInfo=socket={self.folder}/munge.socket",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",
            "MpiDefault=none",
            f"MailProg={shutil.which('true')}",
            "SlurmdTimeout=60",
            "TCPTimeout=2",
            "MessageTimeout=5",
            "KillWait=2",
            "UnkillableStepTimeout=10",
            "BatchStartTimeout=5",
            "MinJobAge=3600",
            "ReturnToService=1",
            "SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0",
            *settings,
            *(f"NodeName={node} NodeAddr={self.addresses[node]} CPUs={cpus} RealMemory=4000" for node in self.nodes),
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE",
        ]
        self.conf.write_text("\n".join(lines) + "\n")

    def _start_munge(self) -> None:
        folder = self.folder
        command = ["setpriv", "--pdeathsig", "KILL", "munged", "--foreground", "--force"]
        command += [f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
        command += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed"]
        with (folder / "munge.log").open("wb") as log:
            self._started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _power_on(self, name: str, daemon: str) -> None:
        """Make a node's namespaces. Its daemon waits for a line on stdin: the word that its network is there."""
        script = f"""
            echo $$ > {shlex.quote(str(self._group(name)))}/cgroup.procs
            hostname {name}
            mount --bind {self.folder}/hosts /etc/hosts
            mount -t tmpfs local {self.local}
            mount -t tmpfs shm /dev/shm
            ip link set lo up
            read -r
            {daemon} < /dev/null &
            while true; do sleep 3600 & wait $!; done  # process 1 of the node: it reaps orphans
        """
        self._group(name).mkdir(exist_ok=True)
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--ipc", "--pid", "--mount"]
        command += ["--fork", "--kill-child=KILL", "--mount-proc", "bash", "-c", script.replace("\n            ", "\n")]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._holders[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def _connect(self, name: str) -> None:
        """Give a node its interface and let its daemon start."""
        if name != CONTROL:
            self._boots += 1
            port, address = self._port(name), self.addresses[name]
            # The same address of the card after each boot, or the peers would ask the old one for seconds.
            card = card_of(address)
            init = self._init(name)
            self._switch(
                f"ip link delete {port} 2>/dev/null; "
                f"ip link add {port} type veth peer name eth0 address {card} netns {init} && "
                f"ip link set {port} master br0 up"
            )
            self.exec(name, ["sh", "-c", f"ip addr add {address}/24 dev eth0 && ip link set eth0 up"])
        pipe = self._holders[name].stdin
        assert pipe is not None
        pipe.write(b"\n")
        pipe.close()

    def _kill(self, name: str) -> None:
        holder = self._holders.pop(name)
        init = self._init_of(holder)
        self._freezer(name, frozen=False)
        holder.kill()
        holder.wait()
        while init and _runs(init):  # it ends after all other processes of its namespace
            time.sleep(0.002)
        end = time.monotonic() + 60
        while True:  # the kernel lets go of the last process a moment after it has ended
            try:
                return self._group(name).rmdir()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.002)

    def _inside(self, node: str, command: Sequence[str]) -> list[str]:
        enter = ["nsenter", "--target", str(self._init(node)), "--net", "--uts", "--ipc", "--pid", "--mount"]
        join = ["sh", "-c", f'echo $$ > {self._group(node)}/cgroup.procs; exec "$@"', "join"]
        return [*join, "setpriv", "--pdeathsig", "KILL", *enter, "env", f"--chdir={os.getcwd()}", *command]

    def _listens(self, node: str) -> bool:
        """Whether a node's slurmd takes work: SLURM may not have missed it yet when it was off for a moment."""
        return bool(self.exec(node, ["ss", "--listening", "--tcp", "--numeric", "--no-header", "sport = 6818"]))

    def _switch(self, script: str) -> None:
        """Run a shell line where the cables meet: the control node's network, but the host's process ids."""
        enter = ["nsenter", "--target", str(self._init(CONTROL)), "--net", "sh", "-c", script]
        done = subprocess.run(enter, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.stderr}"

    def _port(self, node: str) -> str:
        """The switch's end of a node's cable."""
        return f"port_{node}"

    def _init(self, node: str) -> int:
        pid = self._init_of(self._holders[node]) if node in self._holders else 0
        assert pid, f"{node} is off"
        return pid

    def _init_of(self, holder: "subprocess.Popen[bytes]") -> int:
        """Process 1 of a node, by its id on the host; waits until it runs."""
        while holder.poll() is None:
            children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
            # The child is one of `unshare` until it has become bash in namespaces of its own.
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "bash\n":
                return int(children[0])
            time.sleep(0.002)
        return 0

    def _group(self, name: str) -> Path:
        return _groups_root() / f"{self.folder.name}_{name}"

    def _freezer(self, name: str, *, frozen: bool) -> None:
        group = self._group(name)
        if (group / "cgroup.freeze").exists():
            (group / "cgroup.freeze").write_text(str(int(frozen)))
        elif (group / "freezer.state").exists():
            (group / "freezer.state").write_text("FROZEN" if frozen else "THAWED")


def _groups_root() -> Path:
    """Where control groups are: version 2 where it is mounted, else version 1's freezer."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    version_2 = [mount[1] for mount in mounts if mount[2] == "cgroup2"]
    return Path(version_2[0]) if version_2 else Path("/sys/fs/cgroup/freezer")


def _sweep() -> None:
    """Remove the empty folders of clusters whose makers were killed; their processes died with them."""
    for root, remove in ((Path(tempfile.gettempdir()), shutil.rmtree), (_groups_root(), os.rmdir)):
        for folder in root.glob(f"{PREFIX}[0-9]*_*"):
            if not _runs(int(folder.name.removeprefix(PREFIX).split("_")[0])):
                remove(folder)


def _runs(pid: int) -> bool:
    """Whether a process has not ended; one that only waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
