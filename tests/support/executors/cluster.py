"""A small cluster that is a directory: it runs jobs as processes, makes them wait, and can be out of reach.

`env.room` is its place. In it, while they exist: `hold`, whose text is the reason why jobs wait; `down`: nothing can be
reached. A job has a directory of its own there: pid, started, log, exit_code, cancelled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pydantic import Field

from steps.config.base import RunEnv
from steps.dispatch.executors.local import script
from steps.dispatch.job import CANCELLED, FAILED, LOST, PENDING, RUNNING, SUBMITTING, SUCCEEDED, Status, utc_now
from steps.dispatch.jobs.attend import attend
from steps.errors import ExecutorError

_JOB = """
while [ -e ../hold ]; do sleep 0.05; done
date > started
/bin/sh command.sh > log 2>&1
echo $? > code && mv code exit_code
"""


class ClusterEnv(RunEnv):
    room: str = Field("room", description="Where the cluster is")
    fragile: bool = Field(False, description="Whether submission dies on the way")


class Cluster:
    env = ClusterEnv
    imports_images = False
    has_order = False

    def workspace(self, env):
        return None

    def sees_this_machine(self, env):
        return True

    def check(self, config, env):
        return ()

    def probe(self, env):
        return ()

    def render(self, spec):
        return {"command.sh": script(spec)}

    def attach(self, spec):
        return attend(self, spec)

    def submit(self, spec):
        place = Path(spec.environment.room).absolute() / spec.id
        status = Status(PENDING, reason=SUBMITTING, handle={"place": str(place)})
        status.write(spec.directory)
        if spec.environment.fragile:
            os.kill(os.getpid(), signal.SIGKILL)
        _reach(place)
        place.mkdir(parents=True)
        text = (spec.directory / "command.sh").read_text()
        (place / "command.sh").write_text(text.replace("exec ", f"cd {spec.base} && exec ", 1))
        process = subprocess.Popen(
            ["/bin/sh", "-c", _JOB],
            cwd=place,
            env={**os.environ, **spec.secret_env, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        (place / "pid").write_text(str(process.pid))
        status = Status(PENDING, handle={"place": str(place), "cluster_job_id": f"c{process.pid}"})
        status.write(spec.directory)
        return status

    def place(self, job):
        return str(Path(job.status.handle["place"]).parent)

    def look(self, jobs):
        with contextlib.suppress(KeyError), Path(os.environ["ASKED"]).open("a") as asked:
            asked.write(" ".join(job.id for job in jobs) + "\n")
        return [self._look(job) for job in jobs]

    def _look(self, job):
        place = Path(job.status.handle["place"])
        _reach(place)
        status = Status(PENDING, handle=job.status.handle)
        if not (place / "pid").exists():
            return Status(LOST, reason="the cluster does not know it", handle=job.status.handle)
        if (place / "cancelled").exists():
            return Status(CANCELLED, reason="cancelled on the cluster", handle=job.status.handle)
        if (place / "exit_code").exists():
            code = int((place / "exit_code").read_text())
            status.state, status.exit_code = (FAILED, code) if code else (SUCCEEDED, 0)
            status.reason = f"exit code {code}" if code else ""
            status.started_at, status.ended_at = utc_now(), utc_now()
        elif not _alive(place):
            status.state, status.reason = LOST, "it is gone without a word"
        elif (place / "started").exists():
            status.state = RUNNING
        else:
            with contextlib.suppress(FileNotFoundError):
                status.reason = (place.parent / "hold").read_text().strip()
        return status

    def logs(self, job, *, follow):
        place, given = Path(job.status.handle["place"]), 0
        while True:
            _reach(place)
            ended = not follow or self._look(job).ended
            log = (place / "log").read_bytes() if (place / "log").exists() else b""
            while given < len(log):  # in the smallest pieces: characters and lines arrive torn
                yield log[given : given + 1]
                given += 1
            if ended:
                return
            yield b""
            time.sleep(0.1)

    def cancel(self, job):
        place = Path(job.status.handle["place"])
        _reach(place)
        if (place / "pid").exists() and not self._look(job).ended:
            (place / "cancelled").touch()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((place / "pid").read_text()), signal.SIGTERM)

    def fetch(self, job):
        place = Path(job.status.handle["place"])
        _reach(place)
        if (place / "log").exists():
            shutil.copy(place / "log", job.directory / "log")


def _reach(place):
    if (place.parent / "down").exists():
        raise ExecutorError("connection refused")


def _alive(place):
    try:
        stat = Path(f"/proc/{(place / 'pid').read_text()}/stat").read_text()
    except FileNotFoundError:
        return (place / "exit_code").exists()
    return stat.rpartition(")")[2].split()[0] != "Z"


EXECUTOR = Cluster()

if __name__ == "__main__":  # `steps`, which knows this executor as one more
    from steps.dispatch import cli, executors

    executors.__path__.append(str(Path(__file__).parent))
    sys.argv[0] = "steps"
    cli.main()
