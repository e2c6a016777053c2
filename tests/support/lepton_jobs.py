"""The jobs of a `support.lepton` workspace: each worker is a process of this machine that sees what a container would.

What a container would change is imitated as far as a job can see it: an environment and a working directory of its own,
names of the other workers that resolve (a private /etc/hosts), SIGTERM to the first process alone, SIGKILL to whatever
is left of a worker when its first process has ended. Nothing is mounted: `mount_path` has to exist on this machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

WORKSPACE = "ws"
NODES = ("node-a", "node-b")
TICK = 0.02  # seconds between two looks at a process


class Replica:
    """One worker. Its id is also in its environment, by which everything that it started is found again."""

    def __init__(self, job: str, index: int, root: Path) -> None:
        self.id = f"{job}-{index}-{uuid.uuid4().hex[:8]}"
        self.index, self.node = index, NODES[index % len(NODES)]
        self.home = root / self.id
        self.log = root / f"{self.id}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.gone = threading.Event()

    @property
    def rc(self) -> int | None:
        return self.process.poll() if self.process else None

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        self.home.mkdir()
        environment = {**environment, "HOME": str(self.home), "LEPTON_WORKER_ID": self.id}
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    command, cwd=self.home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            except OSError as error:  # no such program, or an argument over 128 KB
                log.write(f"the container could not start: {error}\n".encode())
                log.flush()
                self.process = subprocess.Popen(["false"])

    def living(self) -> list[int]:
        """The ids of every living process of this worker."""
        mark = f"LEPTON_WORKER_ID={self.id}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return found

    def sweep(self) -> None:
        """End what outlived the first process, as a container's end does."""
        while pids := self.living():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.rc  # noqa: B018  (reaps the first process)
            time.sleep(TICK / 2)
        self.gone.set()


class Job:
    """What was posted, its workers and its state. `environment`: of every worker, secrets resolved.

    accelerators: how many and of which type; delay: seconds in the queue; grace: seconds from SIGTERM to SIGKILL.
    """

    def __init__(
        self,
        posted: dict[str, Any],
        root: Path,
        environment: dict[str, str],
        accelerators: tuple[int, str],
        *,
        delay: float,
        grace: float,
    ) -> None:
        self.metadata, self.spec = posted["metadata"], posted["spec"]
        self.id = str(self.metadata["id"])
        self.root, self.delay, self.grace = root, delay, grace
        self.replicas = [Replica(self.id, index, root) for index in range(int(self.spec.get("completions", 1)))]
        self.environment = {**environment, **self._told(accelerators)}
        self.state = "Queueing"
        self.created = int(time.time() * 1000)
        self.completed: int | None = None
        self._wanted = ""  # Stopped, Deleted: what somebody asked for
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, wanted: str) -> None:
        """Ask for Stopped or Deleted; a job that is over cannot be stopped any more, but deleted."""
        with self._lock:
            if self.completed is None:
                self._wanted = wanted
                self.state = {"Stopped": "Stopping", "Deleted": "Deleting"}[wanted]
            elif wanted == "Deleted":
                self.state = wanted

    def join(self) -> None:
        self._thread.join()

    def shown(self) -> dict[str, Any]:
        """As the API shows a job. ready: workers that run; active: those and the ones still to come."""
        codes = [replica.rc for replica in self.replicas if replica.process]
        status = {
            "job_name": self.id,
            "state": self.state,
            "ready": codes.count(None),
            "active": codes.count(None) + (len(self.replicas) - len(codes) if self.completed is None else 0),
            "failed": sum(bool(code) for code in codes),
            "succeeded": codes.count(0),
            "creation_time": self.created,
            "completion_time": self.completed,
            "job_history": [],
        }
        metadata = {"name": self.id, "visibility": "private", **self.metadata, "created_at": self.created}
        return {"metadata": metadata, "spec": self.spec, "status": status}

    def _told(self, accelerators: tuple[int, str]) -> dict[str, str]:
        """The variables of docs.nvidia.com/dgx-cloud/lepton/features/batch-jobs/predefined-env-vars."""
        return {
            "LEPTON_WORKSPACE_ID": WORKSPACE,
            "LEPTON_JOB_NAME": self.id,
            "LEPTON_JOB_SERVICE_PREFIX": self.id,
            "LEPTON_JOB_WORKER_PREFIX": "worker",
            "LEPTON_JOB_WORKER_HOSTNAME_PREFIX": "worker",
            "LEPTON_JOB_TOTAL_WORKERS": str(len(self.replicas)),
            "LEPTON_JOB_FAILURE_COUNT": "0",
            "LEPTON_SUBDOMAIN": f"{self.id}-job-svc",
            "LEPTON_RESOURCE_ACCELERATOR_NUM": str(accelerators[0]),
            "LEPTON_RESOURCE_ACCELERATOR_TYPE": accelerators[1],
        }

    def _run(self) -> None:
        """A job's life. The first worker that fails ends the others: nothing is retried."""
        due = time.monotonic() + self.delay
        while time.monotonic() < due and not self._wanted:
            time.sleep(TICK)
        with self._lock:
            if not self._wanted:
                self.state = "Starting"
        if not self._wanted:
            command = self._with_names() + self.spec["container"]["command"]
            for replica in self.replicas:
                replica.start(command, {**self.environment, "LEPTON_JOB_WORKER_INDEX": str(replica.index)})
            with self._lock:
                self.state = "Running" if not self._wanted else self.state
            self._watch()
        failed = any(replica.rc for replica in self.replicas)
        with self._lock:
            self.completed = int(time.time() * 1000)
            self.state = self._wanted or ("Failed" if failed else "Completed")

    def _watch(self) -> None:
        while waiting := [replica for replica in self.replicas if not replica.gone.is_set()]:
            for replica in waiting:
                if replica.rc is not None:
                    replica.sweep()
            if self._wanted or any(replica.rc for replica in self.replicas):
                self._terminate()
            time.sleep(TICK)

    def _terminate(self) -> None:
        """SIGTERM to each worker's first process, the grace, SIGKILL to the rest of it."""
        running = [replica.process for replica in self.replicas if replica.process and replica.rc is None]
        for process in running:
            process.terminate()
        due = time.monotonic() + self.grace
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, due - time.monotonic()))
        for replica in self.replicas:
            replica.sweep()

    def _with_names(self) -> list[str]:
        """A prefix that gives a process an /etc/hosts with the names of the workers; none where that is forbidden.

        A worker's name is <service prefix>-<index>.<subdomain>, with or without the cluster's own domain.
        """
        if not names_resolve():
            return []
        short = [f"{self.id}-{replica.index}.{self.id}-job-svc" for replica in self.replicas]
        names = [name + domain for name in short for domain in ("", f".ws-{WORKSPACE}.svc.cluster.local")]
        hosts = self.root / f"{self.replicas[0].id}.hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {name}\n" for name in names))
        return [*_own_mounts(), 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]


@functools.cache
def names_resolve() -> bool:
    """Whether a mount namespace is allowed here. Without one, the workers of a job cannot find each other by name."""
    if not shutil.which("unshare"):
        return False
    tried = subprocess.run([*_own_mounts(), "mount --bind /dev/null /etc/hosts"], capture_output=True)
    return tried.returncode == 0


def _own_mounts() -> list[str]:
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *as_root, "--mount", "sh", "-c"]
