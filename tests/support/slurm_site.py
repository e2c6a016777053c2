"""A place with an env.toml, where `steps` is called as a user of a private Slurm calls it, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.slurm import Cluster

DEMO = ("data_prep/demo_chat", "-c", "tiny", "max_conversations=3")


@dataclass
class Site:
    """A directory with an env.toml, where `steps` is called as a user of the cluster calls it."""

    directory: Path
    cluster: Cluster
    env: dict[str, str] = field(default_factory=dict)

    def profile(self, text: str, name: str = "here") -> None:
        with (self.directory / "env.toml").open("a") as file:
            file.write(f'[{name}]\nexecutor = "slurm"\n{text}\n')

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "steps", *arguments],
            cwd=self.directory,
            env={**os.environ, **self.cluster.env, **self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, env=env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def submit(self, *arguments: str, profile: str = "here", env: Mapping[str, str] | None = None) -> Submitted:
        """`steps run … -b PROFILE`, which must succeed."""
        before = set(self.jobs())
        done = self.steps("run", *arguments, "-b", profile, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (new,) = set(self.jobs()) - before
        return Submitted(new, self.cluster)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Jobs that are submitted now wait until this is over."""
        self.cluster.run("scontrol", "update", "PartitionName=batch", "State=DOWN", check=True)
        try:
            yield
        finally:
            self.cluster.run("scontrol", "update", "PartitionName=batch", "State=UP", check=True)

    def jobs(self) -> list[Path]:
        return sorted((self.directory / ".steps/jobs").glob("*"))


@dataclass
class Submitted:
    directory: Path
    cluster: Cluster

    @property
    def status(self) -> dict:
        return json.loads((self.directory / "status.json").read_text())

    @property
    def number(self) -> int:
        return int(self.status["handle"]["slurm_job_id"])

    @property
    def there(self) -> Path:
        return Path(self.status["handle"]["directory"])

    @property
    def log(self) -> str:
        return (self.there / "log").read_text()

    def end(self, timeout: float = 60) -> dict[str, str]:
        return self.cluster.wait_for(self.number, timeout=timeout)

    def succeed(self, timeout: float = 60) -> None:
        shown = self.end(timeout)
        assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), self.log


def everything_written(*places: Path) -> dict[Path, bytes]:
    """Every file's bytes and name below some directories."""
    found = {}
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        with contextlib.suppress(OSError):  # files of daemons come and go
            found[path] = path.read_bytes() + os.fsencode(path)
    return found


def refused(site: Site, *words: str, profile: str = "here", env: Mapping[str, str] | None = None) -> Path:
    """A submission that ends with exit code 5 and these words, and leaves a failed job, no secrets and no code."""
    done = site.steps("run", *DEMO, "-b", profile, env=env)
    assert done.returncode == 5, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    job = site.jobs()[-1]
    status = json.loads((job / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].startswith("not submitted: ")
    assert "slurm_job_id" not in status["handle"]
    assert not list(site.directory.rglob(".steps/secrets/*"))
    assert not (Path(status["handle"]["directory"]) / "code").exists()
    return job
