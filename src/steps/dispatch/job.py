"""A job: what was asked, frozen; its directory; what became of it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from steps.artifacts.record import write_text
from steps.config import yaml12
from steps.config.base import RunEnv
from steps.manifest import Manifest

JOBS = Path(".steps") / "jobs"
MASK = "<secret>"
# A name is secret when its last word says so: HF_TOKEN and DB_PASSWORD, not TOKENIZERS_PARALLELISM or PER_TOKEN_LOSS.
_SECRET_WORDS = frozenset(
    {"token", "tokens", "secret", "password", "passwd", "pass", "pwd", "passphrase", "key", "apikey", "pat", "auth"}
    | {"credential", "credentials"}
)
_SECRET_PARTS = re.compile(r"(?:^|_)(?:secrets?|password|(?:api|access|private|ssh|license|account)_key)(?:_|$)")
# In a configuration `pad_token` and `key` are everyday words.
_SECRET_TOKENS = re.compile(r"(?:^|_)(?:hf|hub|auth|access|api|bearer|wandb|ngc|github)_token$")


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    lowered = name.lower()
    return lowered.rpartition("_")[2] in _SECRET_WORDS or bool(_SECRET_PARTS.search(lowered))


def is_secret_key(name: str) -> bool:
    """Whether a configuration key of this name (its last part) holds a secret."""
    lowered = name.lower()
    return bool(_SECRET_PARTS.search(lowered) or _SECRET_TOKENS.search(lowered))


@dataclass(frozen=True)
class JobSpec:
    """Everything that an executor needs to know to render and submit a job.

    config:   the resolved configuration, secrets masked: what the step reads.
    env:      environment variables that may be written down; secrets are in `secret_env` and live in memory only.
    nprocs:   processes on each node (launch "torchrun"); 1 without torchrun means a plain `python -m`.
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
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    torchrun: bool = False
    nodes: int = 1
    nprocs: int = 1
    passthrough: tuple[str, ...] = ()
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
    executor: str,
    torchrun: bool,
    passthrough: tuple[str, ...],
    debug: bool,
) -> JobSpec:
    """A job that is not on disk yet."""
    variables = environment.env_vars
    nprocs, nodes = environment.nprocs_per_node or environment.gpus_per_node or 1, environment.nodes or 1
    masked = json.loads(json.dumps(config))
    for name in masked.get("run", {}).get("env", {}).get("env_vars", {}):
        if is_secret(name):
            masked["run"]["env"]["env_vars"][name] = MASK
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
        executor=executor,
        env={name: value for name, value in variables.items() if not is_secret(name)},
        # An empty token must not replace the one that the user is logged in with.
        secret_env={name: value for name, value in variables.items() if is_secret(name) and value},
        torchrun=step.run.launch == "torchrun" and (torchrun or nprocs * nodes > 1),
        nodes=nodes,
        nprocs=nprocs if step.run.launch == "torchrun" else 1,
        passthrough=passthrough,
        debug=debug,
    )


def create(spec: JobSpec, files: Mapping[str, str]) -> None:
    """Make the job's directory, exclusively, with job.yaml, config.yaml and the executor's files."""
    spec.directory.parent.mkdir(parents=True, exist_ok=True)
    spec.directory.mkdir()
    asked = {
        "id": spec.id, "step": spec.step, "config": spec.config_name, "profile": spec.profile,
        "executor": spec.executor, "nodes": spec.nodes, "nprocs_per_node": spec.nprocs,
        "passthrough": list(spec.passthrough),
        "environment": {**spec.env, **dict.fromkeys(spec.secret_env, MASK)},
        "resolved": spec.config, "sources": dict(spec.sources),
    }  # fmt: skip
    write_text(spec.directory / "job.yaml", yaml12.dump(asked))
    write_text(spec.config_path, yaml12.dump(spec.config))
    for name, text in files.items():
        write_text(spec.directory / name, text, mode=0o777 if name.endswith(".sh") else None)
    (spec.directory / "log").touch()


@dataclass
class Status:
    """status.json. state: pending | running | succeeded | failed | cancelled."""

    state: str = "pending"
    exit_code: int | None = None
    reason: str = ""
    started_at: str = ""
    ended_at: str = ""
    handle: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        write_text(directory / "status.json", json.dumps(asdict(self), indent=2) + "\n")


def read_status(directory: Path) -> Status:
    """What became of the job in `directory`; pending while nothing is written."""
    try:
        return Status(**json.loads((directory / "status.json").read_text()))
    except FileNotFoundError:
        return Status()


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def quote(command: list[str]) -> str:
    """A command as a shell would have to be given it."""
    return " ".join(shlex.quote(part) for part in command)


def step_arguments(spec: JobSpec) -> list[str]:
    """`-m MODULE --config FILE …`: the part of the command that every executor shares."""
    extra = ["--", *spec.passthrough] if spec.passthrough else []
    return ["-m", spec.module, "--config", os.fspath(spec.config_path), *(["--debug"] if spec.debug else []), *extra]
