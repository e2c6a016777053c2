"""A job: what was asked, frozen; its directory; what became of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from steps.artifacts.record import write_text
from steps.config import yaml12
from steps.config.base import RunEnv
from steps.config.secrets import is_secret as is_secret
from steps.config.secrets import is_secret_key as is_secret_key
from steps.dispatch import processes
from steps.errors import StepsError, UsageError
from steps.manifest import Manifest

JOBS = Path(".steps") / "jobs"
MASK = "<secret>"


@dataclass(frozen=True)
class JobSpec:
    """Everything that an executor needs to know to render and submit a job.

    config:      the resolved configuration, secrets masked: what the step reads.
    environment: `run.env` as the executor types it; its env_vars hold no secret.
    env:         environment variables that may be written down; secrets are in `secret_env` and live in memory only.
    base:        where the command was given (absolute).
    image:       container image of the profile, the configuration or the manifest, in that order; '' for none.
    nprocs:      processes on each node (launch "torchrun"); 1 without torchrun means a plain `python -m`.
    after:       ids of the jobs that must succeed before this one starts.
    attached:    whether somebody stays until its end.
    probe:       whether the step only tries itself (`--probe`).
    """

    id: str
    step: str
    module: str
    directory: Path
    config: Mapping[str, Any]
    sources: Mapping[str, str]
    config_name: str
    profile: str
    executor: str
    environment: RunEnv = field(default_factory=RunEnv)
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    base: Path = field(default_factory=Path.cwd)
    image: str = ""
    torchrun: bool = False
    nodes: int = 1
    nprocs: int = 1
    after: tuple[str, ...] = ()
    attached: bool = False
    force_squash: bool = False
    passthrough: tuple[str, ...] = ()
    probe: bool = False
    debug: bool = False

    @property
    def config_path(self) -> Path:
        return self.directory / "config.yaml"


def new_spec(
    step: Manifest,
    config: Mapping[str, Any],
    environment: RunEnv,
    *,
    sources: Mapping[str, str],
    config_name: str,
    profile: str,
    torchrun: bool,
    secret_names: Collection[str] = (),
    passthrough: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    attached: bool = False,
    force_squash: bool = False,
    debug: bool = False,
) -> JobSpec:
    """A job that is not on disk yet.

    secret_names: variables of env_vars that are secret although their name does not say so.
    """

    def secret(name: str) -> bool:
        return is_secret(name) or name in secret_names

    variables = environment.env_vars
    nprocs, nodes = environment.processes, environment.nodes or 1
    masked = json.loads(json.dumps(config))
    for name in masked.get("run", {}).get("env", {}).get("env_vars", {}):
        if secret(name):
            masked["run"]["env"]["env_vars"][name] = MASK
    plain = {name: value for name, value in variables.items() if not secret(name)}
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    identity = f"{now}-{step.id.replace('/', '-')}-{os.urandom(3).hex()}"
    return JobSpec(
        id=identity,
        step=step.id,
        module=step.module,
        directory=JOBS / identity,
        config=masked,
        sources=dict(sources),
        config_name=config_name,
        profile=profile,
        executor=environment.executor,
        environment=environment.model_copy(update={"env_vars": plain}),
        env=plain,
        # An empty token must not replace the one that the user is logged in with.
        secret_env={name: value for name, value in variables.items() if secret(name) and value},
        image=step.run.image if environment.container_image is None else environment.container_image,
        torchrun=step.run.launch == "torchrun" and (torchrun or nprocs * nodes > 1),
        nodes=nodes,
        nprocs=nprocs if step.run.launch == "torchrun" else 1,
        after=after,
        attached=attached,
        force_squash=force_squash,
        passthrough=passthrough,
        debug=debug,
    )


def create(spec: JobSpec, files: Mapping[str, str]) -> None:
    """Make the job's directory, exclusively, with job.yaml, config.yaml and the executor's files, or leave none."""
    spec.directory.parent.mkdir(parents=True, exist_ok=True)
    spec.directory.mkdir()
    try:
        _fill(spec, files)
    except BaseException:
        shutil.rmtree(spec.directory, ignore_errors=True)
        raise


def _fill(spec: JobSpec, files: Mapping[str, str]) -> None:
    me = os.getpid()
    asked = {
        "id": spec.id, "step": spec.step, "config": spec.config_name, "profile": spec.profile,
        "executor": spec.executor, "image": spec.image, "nodes": spec.nodes, "nprocs_per_node": spec.nprocs,
        "submitted_at": utc_now(), "submitted_from": str(spec.base),
        "submitted_by": {"host": processes.host(), "pid": me, "started": processes.started(me)},
        "attached": spec.attached, "after": list(spec.after),
        "passthrough": list(spec.passthrough), "debug": spec.debug,
        "environment": {**spec.env, **dict.fromkeys(spec.secret_env, MASK)},
        "resolved": spec.config, "sources": dict(spec.sources),
    }  # fmt: skip
    write_text(spec.directory / "job.yaml", yaml12.dump(asked))
    write_text(spec.config_path, yaml12.dump(spec.config))
    for name, text in files.items():
        write_text(spec.directory / name, text, mode=0o777 if name.endswith(".sh") else None)
    (spec.directory / "log").touch()


PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED, LOST = "pending", "running", "succeeded", "failed", "cancelled", "lost"
STATES = (PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED, LOST)
#: The reason of a pending job of which nobody knows yet whether the cluster has it.
SUBMITTING = "being submitted"


@dataclass
class Status:
    """status.json. state: pending | running | succeeded | failed | cancelled | lost.

    reason: why it waits, or why it ended as it did, in the cluster's own word where that has one (OUT_OF_MEMORY, …).
    handle: how the executor finds the job again; what is in it is the executor's business.
    """

    state: str = PENDING
    exit_code: int | None = None
    reason: str = ""
    started_at: str = ""
    ended_at: str = ""
    handle: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether the job will never run again."""
        return self.state not in (PENDING, RUNNING)

    def write(self, directory: Path) -> None:
        write_text(directory / "status.json", json.dumps(asdict(self), indent=2) + "\n")


@dataclass
class JobRecord:
    """A job that was asked for, as its directory tells it.

    asked: job.yaml.
    note:  what makes the status uncertain (a cluster out of reach); never on disk.
    """

    directory: Path
    asked: Mapping[str, Any]
    status: Status
    note: str = ""

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def step(self) -> str:
        return str(self.asked["step"])

    @property
    def executor(self) -> str:
        return str(self.asked["executor"])

    @property
    def run_env(self) -> Mapping[str, Any]:
        """`run.env` as it was resolved, secrets masked."""
        env: Mapping[str, Any] = self.asked["resolved"].get("run", {}).get("env", {})
        return env


def read_record(directory: Path) -> JobRecord:
    """The job in `directory`. Raises UsageError when that is no job's directory, or half written."""
    try:
        asked, _ = yaml12.load(directory / "job.yaml")
        return JobRecord(directory, {"resolved": {}, "executor": "local", "step": "", **asked}, read_status(directory))
    except (OSError, StepsError) as error:
        raise UsageError(f"{directory} holds no job: {error}") from error


def read_status(directory: Path) -> Status:
    """What became of the job in `directory`; pending while nothing is written."""
    try:
        return Status(**json.loads((directory / "status.json").read_text()))
    except FileNotFoundError:
        return Status()


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def quote(command: Iterable[str]) -> str:
    """A command as a shell would have to be given it."""
    return " ".join(shlex.quote(part) for part in command)


def setup_commands(environment: RunEnv, python: str) -> list[str]:
    """What the profile wants done before the step, where the step runs; as shell commands."""
    extras = environment.pip_extras
    install = [f"{python} -m pip install --quiet {quote(extras)}"] if extras else []
    return [*install, *environment.startup_commands]


def step_arguments(spec: JobSpec, directory: str | None = None) -> list[str]:
    """`-m MODULE --config FILE …`: the part of the command that every executor shares.

    directory: the job's directory as the job sees it, where that is another than here.
    """
    extra = ["--", *spec.passthrough] if spec.passthrough else []
    config = os.fspath(spec.config_path) if directory is None else f"{directory}/config.yaml"
    flags = [flag for flag, given in (("--probe", spec.probe), ("--debug", spec.debug)) if given]
    return ["-m", spec.module, "--config", config, *flags, *extra]
