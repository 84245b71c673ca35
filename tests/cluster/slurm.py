"""A real SLURM of two nodes on this machine, in one folder: its own munge, controller and node daemons."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from user import PATIENCE

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
NODES = ("n1", "n2")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

CONFIGURATION = """\
ClusterName=rcpo-test
# ranks meet at a port that follows from the job: not at that of another cluster on this machine
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job that is requeued waits for its old credentials to expire
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
# a lost node is found lost in seconds
SlurmdTimeout=5
MessageTimeout=4
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """The programs that a cluster needs and this machine lacks; empty if none."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return ", ".join(name for name in PROGRAMS if shutil.which(name, path=path) is None)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Two nodes of one CPU each. A context manager: up on entry, gone at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._path = os.environ["PATH"] + ":/usr/sbin:/sbin"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to speak to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.configuration), "PATH": self._path}

    def __enter__(self) -> Cluster:
        munge = self.folder / "munge"
        for place in ("state", "munge", *(f"spool-{node}" for node in NODES)):
            (self.folder / place).mkdir(mode=0o711)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        text = CONFIGURATION.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            ports=free_ports(3),
            first_job=1 + os.getpid() % 30000,
        )
        self.configuration.write_text(text)
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}={munge / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self.run("munged", "--force", f"--key-file={munge / 'key'}", *files)
        self.run("slurmctld", "-f", str(self.configuration))
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%D", "-t", "idle").split() == ["2"], "idle nodes")

    def start_node(self, node: str) -> None:
        """Starts a node's daemon, also after `lose_node`."""
        self.run("slurmd", "-f", str(self.configuration), "-N", node)

    def lose_node(self, node: str, job: str) -> None:
        """`kill -9` of a node's daemon, of the steps of `job` there, and of what they started."""
        os.kill(self._pid(f"slurmd-{node}"), signal.SIGKILL)
        for pid in self.processes(node, job):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def processes(self, node: str, job: str) -> list[int]:
        """The processes of a job on a node: its step daemons and the tasks, by their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            own = {b"SLURMD_NODENAME=" + node.encode(), b"SLURM_JOB_ID=" + job.encode()} <= set(environment)
            daemon = re.match(rf"slurmstepd: \[{job}\.", command) and b"SLURM_CONF=" in b"".join(environment)
            if own or (daemon and self._node_of(int(entry.name)) == node):
                found.append(int(entry.name))
        return found

    def _node_of(self, pid: int) -> str | None:
        """The node of a step daemon, by the spool folder whose files it holds open."""
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(handle)
            except OSError:
                continue
            match = re.search(r"(?:spool|slurmd)-(n\d)", target)
            if match:
                return match[1]
        return None

    def run(self, program: str, *arguments: str) -> str:
        """What a program says; its error, with its message, where it fails."""
        found = shutil.which(program, path=self._path)
        assert found is not None, program
        result = subprocess.run(
            [found, *arguments], capture_output=True, text=True, env=self.environment, timeout=60
        )
        assert result.returncode == 0, f"{program} {arguments}: {result.stderr}"
        return result.stdout

    def state(self, job: str) -> str:
        """The job's state in SLURM's words: PENDING, RUNNING, COMPLETED, …"""
        match = re.search(r"JobState=(\S+)", self.run("scontrol", "show", "job", job))
        assert match is not None
        return match[1]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until `condition()` is true; fails, with queue and log, where it does not become so."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"no {what}: {self.words()}"
            time.sleep(0.2)

    def wait_for_end(self, job: str) -> str:
        """A job's last state."""
        self.wait(lambda: self.state(job) in ENDS, f"end of {job}")
        return self.state(job)

    def words(self) -> str:
        """What the queue and the end of the controller's log say."""
        log = (self.folder / "slurmctld.log").read_text(errors="replace")
        return self.run("squeue", "--states=all") + log[-3000:]

    def clear(self) -> None:
        """Ends all jobs."""
        self.run("scancel", f"--user={getpass.getuser()}")
        self.wait(lambda: not self.run("squeue", "-h"), "empty queue")

    def _pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def _stop(self) -> None:
        """Ends the daemons; the jobs first, where the controller still answers."""
        if (self.folder / "slurmctld.pid").exists():
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.clear()
        pids = [*(self.folder / f"{name}.pid" for name in ("slurmctld", "slurmd-n1", "slurmd-n2"))]
        for path in [*pids, self.folder / "munge" / "pid-file"]:
            try:
                os.kill(int(path.read_text()), signal.SIGTERM)
            except (OSError, ValueError):  # never came up, or gone already
                continue
