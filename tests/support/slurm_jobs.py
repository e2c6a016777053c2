"""Slurm jobs without a step: batch scripts that leave the files in their directory that every job of ours leaves there.

With them, what is known of a job after its submission is tested on a real Slurm, whoever submitted it.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steps.dispatch.job import JobRecord, Status, utc_now
from support.slurm import Cluster

SCRIPT = """\
#!/bin/bash
job={directory}
finish() {{
    code=$?
    date -u +%Y-%m-%dT%H:%M:%S+00:00 >"$job/ended_at"
    echo "$code" >"$job/.exit_code" && mv "$job/.exit_code" "$job/exit_code"
}}
trap finish EXIT
trap 'trap - EXIT; exit 143' TERM
echo "$SLURM_JOB_ID" >"$job/slurm_job_id"
date -u +%Y-%m-%dT%H:%M:%S+00:00 >"$job/started_at"
{lines}
"""


@dataclass(frozen=True)
class Place:
    """Where jobs are submitted in a test. env: `run.env` of a profile that reaches the cluster.

    here, there: directories for the records on this machine and for the jobs on the cluster.
    """

    cluster: Cluster
    here: Path
    there: Path
    env: Mapping[str, Any]

    def submit(self, lines: str, *options: str) -> JobRecord:
        """A job of these shell lines, submitted with sbatch itself."""
        job = self.record()
        directory = Path(job.status.handle["directory"])
        directory.mkdir(parents=True)
        text = SCRIPT.format(directory=shlex.quote(str(directory)), lines=lines)
        number = self.cluster.submit(text, f"--job-name={job.id}", f"--output={directory}/log", *options)
        job.status.handle["slurm_job_id"] = str(number)
        return job

    def record(self) -> JobRecord:
        """A job that is known here and nowhere else."""
        name = f"20260101-000000-plain-{secrets.token_hex(3)}"
        (self.here / name).mkdir(parents=True)
        asked = {
            "id": name, "step": "plain", "executor": "slurm", "submitted_at": utc_now(),
            "submitted_from": str(self.here), "resolved": {"run": {"env": {"executor": "slurm", **self.env}}},
        }  # fmt: skip
        return JobRecord(self.here / name, asked, Status(handle={"directory": str(self.there / "jobs" / name)}))


def login_to(cluster: Cluster, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """This shell as a login node of that cluster, with everything below `directory`."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    return Place(cluster, directory / "here", directory / "there", {"remote_job_dir": str(directory / "there")})


def number(job: JobRecord) -> int:
    """The job's number in Slurm."""
    return int(job.status.handle["slurm_job_id"])


def there(job: JobRecord) -> Path:
    """The job's directory on the cluster, which in tests is this machine."""
    return Path(job.status.handle["directory"])
