"""On a Slurm cluster: sbatch here on a login node, or through ssh. NeMo-Run submits, everything else is a thin layer of
our own over Slurm's commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from steps.config.base import RunEnv, StepConfig
from steps.dispatch.executors.slurm import layout, script
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.job import JobRecord, JobSpec, Status
from steps.errors import Problem


class Slurm:
    """Executor `slurm`."""

    env: type[RunEnv] = SlurmEnv
    imports_images = True
    has_order = True

    def workspace(self, env: SlurmEnv) -> str | None:
        return layout.workspace(env, Path.cwd())

    def sees_this_machine(self, env: SlurmEnv) -> bool:
        return env.tunnel == "local"

    def check(self, config: StepConfig, env: SlurmEnv) -> Iterable[Problem]:
        from steps.dispatch.executors.slurm import checks

        return checks.check(env)

    def render(self, spec: JobSpec) -> Mapping[str, str]:
        env = spec.environment
        assert isinstance(env, SlurmEnv)
        return script.render(spec, env.python or (sys.executable if env.tunnel == "local" else "python3"))

    def submit(self, spec: JobSpec) -> Status:
        from steps.dispatch.executors.slurm import submit

        return submit.submit(spec, self.look)

    def attach(self, spec: JobSpec) -> int:
        from steps.dispatch.jobs.attend import attend

        return attend(self, spec)

    def probe(self, env: SlurmEnv) -> Iterable[Problem]:
        from steps.dispatch.executors.slurm import probe

        return probe.probe(env)

    def place(self, job: JobRecord) -> str:
        from steps.dispatch.executors.slurm.shell import Shell

        shell = Shell.of(SlurmEnv.model_validate(job.run_env))
        name = job.status.handle.get("cluster", "")
        return f"here {name}" if shell.here else f"{shell}:{shell.port} {shell.identity} {name}"

    def look(self, jobs: Sequence[JobRecord]) -> list[Status]:
        from steps.dispatch.executors.slurm import state

        return state.look(jobs)

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[bytes]:
        from steps.dispatch.executors.slurm import follow as following

        return following.logs(job, follow=follow)

    def cancel(self, job: JobRecord) -> None:
        from steps.dispatch.executors.slurm import follow

        follow.cancel(job)

    def fetch(self, job: JobRecord) -> None:
        from steps.dispatch.executors.slurm import follow

        follow.fetch(job)


EXECUTOR = Slurm()
