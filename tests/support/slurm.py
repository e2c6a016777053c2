"""A real, private Slurm on this machine: munged, slurmctld and two slurmd on loopback, as long as a test needs them.

Nothing of the machine's own Slurm is read or written. Everything lies under one directory in /tmp (its short name keeps
the unix sockets below their 108 bytes), runs as the current user, root or not, on ports that were free, so that several
clusters live side by side. The nodes claim 4 CPUs each, shared eight times over, whatever the machine has.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from support import sacct
from support.processes import Guard, kill, members_of, stop_process
from support.slurm_conf import MEMORY_LIMITS, NODES, slurm_conf, user_name

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")


def search_path() -> str:
    """PATH, with the directories that daemons are in and that an ordinary user's PATH may lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class ClusterError(RuntimeError):
    """The private Slurm did not do what a test asked of it; the message ends with the daemons' last lines."""


class Cluster:
    """Two nodes (n1, n2), the partitions `batch` (default) and `debug`, no accounting: `sacct` is there and exits 1.

    settings: slurm.conf overrides. {"MinJobAge": "2"} makes the controller forget an ended job some ten seconds later;
        {"SlurmdTimeout": "3"} makes it notice a silent node after some fifteen.
    memory_limits: the nodes look at memory once a second and kill what is above its --mem. The job is then FAILED, with
        "Exceeded job memory limit" in its output: it takes cgroups for Slurm to call that OUT_OF_MEMORY.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, *, memory_limits: bool = False) -> None:
        self.settings = {**(MEMORY_LIMITS if memory_limits else {}), **(settings or {})}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._directory: Path | None = None
        self._guard: Guard | None = None

    @staticmethod
    def missing() -> str:
        """A sentence that says what this machine lacks, or nothing at all."""
        if absent := [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]:
            return f"no private Slurm: {', '.join(absent)} not found (apt install slurm-wlm munge)"
        try:
            user_name()
        except KeyError:
            return f"no private Slurm: user {os.getuid()} is not in the password file"
        return ""

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
        return {"SLURM_CONF": str(self.configuration), "PATH": search_path()}

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # starting and stopping

    def start(self, timeout: float = 30) -> Cluster:
        """Start the daemons and wait until both nodes are idle. ClusterError, and nothing left, if they do not come."""
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
        self.configuration.write_text(slurm_conf(root, self.settings))
        munge = {"socket": "s", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={root / 'munge' / name}" for option, name in munge.items()]
        self._spawn("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        self._wait("munged", lambda: (root / "munge/s").exists(), timeout)
        self.start_controller(timeout)
        for node in NODES:
            self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.configuration))
        self._wait("the nodes", lambda: self.node_states() == dict.fromkeys(NODES, "idle"), timeout)

    def stop(self) -> None:
        """Cancel every job, end every daemon and remove the directory. Safe to call twice, and after half a start.

        0.2 s, or 3 s when a node was lost: slurmctld waits for its last messages to that node.
        """
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

    def cancel_all(self, timeout: float = 5) -> None:
        """scancel every job and wait for an empty queue."""
        deadline = time.monotonic() + timeout
        self.run("scancel", "--user", user_name(), timeout=timeout)
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
        """Let the time limit of a running job be over now. Slurm looks twice a minute: TIMEOUT comes within 30 s."""
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
        """End slurmctld. Jobs go on; sbatch, squeue and scontrol fail, after nine seconds of trying.

        A job that ends meanwhile is reported half a minute later: its step daemon sleeps between its tries.
        """
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
