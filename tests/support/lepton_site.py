"""A directory with a profile for the Lepton of the tests, where `steps` is called as a user of it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from steps.dispatch import jobs
from steps.dispatch.executors.lepton import EXECUTOR
from steps.dispatch.executors.lepton.env import LeptonEnv
from steps.dispatch.job import JOBS, JobRecord, JobSpec, create
from support.lepton import NODE_GROUP, Job, Lepton

DEMO = ("data_prep/demo_chat", "-c", "tiny", "max_conversations=3")
T = TypeVar("T")


@dataclass
class Site:
    """store: the workspace's shared storage, which in tests is a directory of this machine."""

    directory: Path
    lepton: Lepton
    env: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.directory / "a store"  # a space in every path of every test

    @property
    def run_env(self) -> dict[str, Any]:
        """A profile with everything that a job needs."""
        return {
            "executor": "lepton",
            "container_image": "registry.example/image:1",
            "node_group": NODE_GROUP,
            "resource_shape": "cpu.small",
            "nemo_run_dir": str(self.store / "nemo-run"),
            "workspace": str(self.store),
            "mounts": [{"path": "/", "mount_path": str(self.store), "from": "node-nfs:store"}],
        }

    def profile(self, **more: Any) -> None:
        """Write env.toml with the profile `here`."""
        values = {**self.run_env, **more}
        lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
        (self.directory / "env.toml").write_text("\n".join(["[here]", *lines, ""]))

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "steps", *arguments],
            cwd=self.directory,
            env={**os.environ, **self.lepton.env, **self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, env=env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    # without the command line

    def spec(self, script: str, profile: Mapping[str, Any] | None = None, **given: Any) -> JobSpec:
        """A job whose step is a Python program of the test's own."""
        module = f"program_{len(list(self.directory.glob('program_*')))}"
        (self.directory / f"{module}.py").write_text(script)
        name = f"20260102-030405-test-{module}-{os.urandom(3).hex()}"
        env = {"PYTHONPATH": str(self.directory), "PYTHONDONTWRITEBYTECODE": "1", **given.pop("env", {})}
        run_env = {**self.run_env, **(profile or {})}
        return JobSpec(
            id=name, step=f"test/{module}", module=module, directory=self.directory / JOBS / name,
            config={"run": {"env": run_env}}, sources={}, config_name="tiny", profile="here", executor="lepton",
            environment=LeptonEnv.model_validate(run_env), image="registry.example/image:1", env=env, **given,
        )  # fmt: skip

    def submit(self, script: str, profile: Mapping[str, Any] | None = None, **given: Any) -> JobRecord:
        """Submit such a job."""
        spec = self.spec(script, profile, **given)
        create(spec, EXECUTOR.render(spec))
        EXECUTOR.submit(spec)
        return jobs.read(spec.directory)

    def record(self, directory: Path | None = None) -> JobRecord:
        """The newest job, or the one in `directory`, as it was written down last."""
        return jobs.read(directory or max((self.directory / JOBS).iterdir()))

    def remote(self, job: JobRecord) -> Job:
        """The workspace's side of a job."""
        (found,) = [other for other in self.lepton.jobs if other.id == job.status.handle["lepton_job_id"]]
        return found

    def ended(self, job: JobRecord) -> JobRecord:
        """The job, refreshed until it has ended."""
        return until(lambda: (fresh := jobs.refresh([jobs.read(job.directory)])[0]).status.ended and fresh)


def until(what: Callable[[], T], seconds: float = 20) -> T:
    """The first true value of `what()`."""
    due = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < due, "waited too long"
        time.sleep(0.02)
    return value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
