"""A real, private Slurm on this machine: munged, slurmctld and two slurmd on loopback, for as long as a test needs them.

Nothing of the machine's own Slurm is read or written. Everything lies under one directory in /tmp (its short name keeps
the unix sockets below their 108 bytes), runs as the current user, root or not, on ports that were free, so that several
clusters live side by side. The nodes claim 4 CPUs each, shared eight times over, whatever the machine has.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from support import sacct
from support.processes import Guard, kill, members_of, stop_process

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
NODES = ("n1", "n2")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class ClusterError(RuntimeError):
    """The private Slurm did not do what a test asked of it; the message ends with the daemons' last lines."""


class Cluster:
    """Two nodes (n1, n2), the partitions `batch` (default) and `debug`, no accounting: `sacct` is there and exits 1.

    settings: slurm.conf overrides, as {"MinJobAge": "2", "KillWait": "2"}. MinJobAge=2 makes the controller forget an
        ended job two to four seconds later.
    memory_limits: the nodes watch memory once a second and end a job above its --mem as OUT_OF_MEMORY.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, *, memory_limits: bool = False) -> None:
        self.settings = {**(_MEMORY_LIMITS if memory_limits else {}), **(settings or {})}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._directory: Path | None = None
        self._guard: Guard | None = None

    @staticmethod
    def missing() -> str:
        """A sentence that says what this machine lacks, or nothing at all."""
        absent = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
        return f"no private Slurm: {', '.join(absent)} not found (apt install slurm-wlm munge)" if absent else ""

    @property
    def directory(self) -> Path:
        """Where everything of this cluster lies; gone after stop()."""
        if self._directory is None:
            raise ClusterError("the cluster is not running")
        return self._directory

    @property
    def configuration(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """What a user's shell on this cluster adds to its environment: SLURM_CONF and PATH."""
        return {"SLURM_CONF": str(self.configuration), "PATH": SEARCH_PATH}

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # starting and stopping

    def start(self, timeout: float = 30) -> Cluster:
        """Start the daemons and wait until both nodes are idle. ClusterError, and nothing left, if they do not come up."""
        if lack := self.missing():
            raise ClusterError(lack)
        for attempt in range(3):
            try:
                self._start(timeout)
            except BaseException as error:
                log = self.log_tail()
                self.stop()
                # Ports are chosen before the daemons bind them: somebody may have come between.
                if isinstance(error, ClusterError) and "in use" in log and attempt < 2:
                    continue
                if isinstance(error, ClusterError):
                    raise ClusterError(f"{error}\n{log}") from None
                raise
            return self
        raise AssertionError("not reached")

    def _start(self, timeout: float) -> None:
        root = self._directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._guard = Guard(root, *self._marks())
        for name in ("munge", "log", "state", *(f"spool/{node}" for node in NODES)):
            (root / name).mkdir(parents=True, mode=0o755)
        key = root / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        (root / "plugstack.conf").touch()
        (root / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")  # device files that every machine has
        self.configuration.write_text(_slurm_conf(root, self.settings))
        munge = {"socket": "s", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={root / 'munge' / name}" for option, name in munge.items()]
        self._spawn("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        self._wait("munged", lambda: (root / "munge/s").exists(), timeout)
        self.start_controller(timeout)
        for node in NODES:
            self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.configuration))
        self._wait("the nodes", lambda: self.node_states() == dict.fromkeys(NODES, "idle"), timeout)

    def stop(self) -> None:
        """Cancel every job, end every daemon and remove the directory. Safe to call twice, and after half a start."""
        if self._directory is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            if all(name in self._daemons and self._daemons[name].poll() is None for name in ("munged", "slurmctld")):
                self.cancel_all()
        for name in reversed(list(self._daemons)):
            stop_process(self._daemons.pop(name))
        kill(members_of(self._directory, *self._marks()))  # what jobs left behind
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._guard is not None:
            self._guard.dismiss()
        self._directory = self._guard = None

    def cancel_all(self, timeout: float = 10) -> None:
        """scancel every job and wait for an empty queue."""
        deadline = time.monotonic() + timeout
        self.run("scancel", "--user", getpass.getuser(), timeout=timeout)
        while self.run("squeue", "--noheader", timeout=timeout).stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.05)

    # using it

    def run(self, *command: str, timeout: float = 60, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command with this cluster's environment. check: raise CalledProcessError when it fails."""
        return subprocess.run(
            command, env={**os.environ, **self.env}, text=True, capture_output=True, timeout=timeout, check=check
        )

    def submit(self, script: str, *options: str) -> int:
        """sbatch a script's text, in the cluster's directory; the job id."""
        file = self.directory / f"job-{secrets.token_hex(4)}.sh"
        file.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
        place = [f"--chdir={self.directory}", f"--output={self.directory}/%j.out"]
        answer = self.run("sbatch", "--parsable", *place, *options, str(file))
        if answer.returncode:
            raise ClusterError(f"sbatch: {answer.stderr}")
        return int(answer.stdout.split(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says, field by field. Empty when the controller has forgotten the job."""
        return sacct.fields(self.run("scontrol", "--oneliner", "show", "job", str(job)).stdout.strip())

    def wait_for(self, job: int, *states: str, timeout: float = 30) -> dict[str, str]:
        """show(job) once it is in one of these states (JobState words; none named: any that a job ends in)."""
        wanted = states or sacct.ENDED
        deadline = time.monotonic() + timeout
        while (seen := self.show(job)).get("JobState") not in wanted:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {job} is not {' or '.join(wanted)} after {timeout} s: {seen}\n{self.log_tail()}"
                )
            time.sleep(0.05)
        return seen

    def expire(self, job: int) -> None:
        """Let the time limit of a running job be over now. Slurm counts limits in minutes and looks twice a minute."""
        self.run("scontrol", "update", f"JobId={job}", "EndTime=now", check=True)

    def write_sacct(self, directory: Path) -> Path:
        """Put a `sacct` into `directory`, for a PATH: accounting that answers from this cluster's controller and its
        job completion file, with every job since the start and nothing else."""
        directory.mkdir(parents=True, exist_ok=True)
        script = directory / "sacct"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{sacct.__file__}" "$@"\n')
        script.chmod(0o755)
        return script

    # faults

    def stop_controller(self) -> None:
        """End slurmctld. Jobs go on; sbatch, squeue and scontrol fail."""
        stop_process(self._daemons.pop("slurmctld"))

    def start_controller(self, timeout: float = 30) -> None:
        """Start slurmctld and wait until it answers and knows its living nodes. After stop_controller() it remembers
        its jobs."""
        self._spawn("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.configuration))
        self._wait("slurmctld", lambda: self.run("scontrol", "ping").returncode == 0, timeout)
        living = [node for node in NODES if node in self._daemons]
        self._wait("the nodes", lambda: not any("unk" in self.node_states()[node] for node in living), timeout)

    def kill_node(self, node: str, *, noticed: bool = True) -> None:
        """The power of a node goes: slurmd, its step daemons and all that its jobs started get SIGKILL at once.

        noticed: the controller is told at once, as a health check would. Otherwise it finds out after SlurmdTimeout.
        """
        daemon = self._daemons.pop(node)
        kill({daemon.pid, *members_of(self.directory / "spool" / node, *self._marks(), f"SLURMD_NODENAME={node}")})
        daemon.wait()
        if noticed:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power", check=True)

    def start_node(self, node: str, timeout: float = 30) -> None:
        """Bring a killed node back and wait until it takes jobs."""
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.configuration))
        self._wait(node, lambda: self._takes_jobs(node), timeout)

    def node_states(self) -> dict[str, str]:
        """Each node's state as sinfo writes it, such as {"n1": "idle", "n2": "down*"}."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def log_tail(self, lines: int = 8) -> str:
        """The last lines of every daemon's log."""
        if self._directory is None:
            return ""
        tails = ((log.name, log.read_text(errors="replace")) for log in sorted(self._directory.glob("log/*.log")))
        return "\n".join(f"{name}: {line}" for name, text in tails for line in text.splitlines()[-lines:])

    def _marks(self) -> tuple[str, str]:
        """How the environment tells a process that a job of this cluster started."""
        return f"SLURM_CONF={self.configuration}", "SLURM_JOB_ID="

    def _takes_jobs(self, node: str) -> bool:
        state = self.node_states().get(node, "")
        if state == "down":  # somebody said so by hand: only a hand takes it back
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        return state in ("idle", "mixed", "allocated")

    def _spawn(self, name: str, *command: str) -> None:
        with (self.directory / f"log/{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the tests' terminal is not for the cluster
            )

    def _wait(self, what: str, ready: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise ClusterError(f"{name} ended with status {daemon.returncode}")
            if time.monotonic() > deadline:
                raise ClusterError(f"{what} not up after {timeout} s; nodes: {self.node_states()}")
            time.sleep(0.05)


# slurmd can end a job above its memory without cgroups; it needs memory as something that is allocated.
_MEMORY_LIMITS = {
    "JobAcctGatherType": "jobacct_gather/linux",
    "JobAcctGatherParams": "OverMemoryKill",
    "JobAcctGatherFrequency": "task=1",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerNode": "100",
}


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _slurm_conf(root: Path, settings: Mapping[str, str]) -> str:
    """The text of slurm.conf for a cluster in `root`."""
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    controller, *ports = free_ports(1 + len(NODES))
    values = {
        "ClusterName": "private",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": str(controller),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={root}/munge/s",
        "CredType": "cred/munge",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": f"{root}/jobcomp.txt",
        "PlugStackConfig": f"{root}/plugstack.conf",
        "StateSaveLocation": f"{root}/state",
        "SlurmdSpoolDir": f"{root}/spool/%n",
        "SlurmctldPidFile": f"{root}/slurmctld.pid",
        "SlurmdPidFile": f"{root}/%n.pid",
        "SlurmdParameters": "config_overrides",  # the nodes may claim more than the machine has
        "ReturnToService": "2",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "KillWait": "2",
        "MinJobAge": "3600",
        "GresTypes": "gpu",
        **settings,
    }
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
    partition = "Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=FORCE:8"
    lines = [f"{name}={value}" for name, value in values.items()]
    lines += [f"NodeName={name} Port={port} {node}" for name, port in zip(NODES, ports, strict=True)]
    lines += [f"PartitionName=batch Default=YES {partition}", f"PartitionName=debug {partition}"]
    return "\n".join(lines) + "\n"
