"""What makes a profile impossible to submit with, found without asking anybody."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from steps.dispatch.executors.slurm import script
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.errors import Problem

#: Fields whose values are shell text, where lines may be many.
_SHELL = frozenset({"setup_lines", "startup_commands", "env_vars"})
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check(env: SlurmEnv) -> Iterator[Problem]:
    """Every fault of the profile, together."""
    if env.tunnel == "ssh":
        for name, hint in (
            ("host", "Set it to the cluster's login node, or set tunnel to local where sbatch runs here."),
            ("remote_job_dir", "Set it to a directory of yours on the cluster that all nodes share."),
        ):
            if not getattr(env, name):
                yield _problem(name, "is missing, and tunnel ssh needs it", hint=hint)
        if env.identity and not Path(env.identity).expanduser().is_file():
            hint = "Set it to a private key of yours, or drop it where ssh finds one by itself."
            yield _problem("identity", f"there is no file {env.identity}", hint=hint)
    for name in ("remote_job_dir", "workspace", "squash_dir"):
        path = getattr(env, name)
        if path and not path.startswith("/"):
            yield _problem(name, f"{path!r} is no absolute path", hint="Write it from / on, as the cluster sees it.")
        elif path and re.search("[:,]", path):
            yield _problem(name, f"{path!r} has a colon or a comma, which container mounts cannot hold")
    for mount in env.all_mounts:
        parts = mount.split(":")
        if "," in mount or not 2 <= len(parts) <= 3 or not all(parts):
            yield _problem("mounts", f"{mount!r} is no mount", allowed="host:container or host:container:flags")
    for name in env.container_env:
        if not _VARIABLE.fullmatch(name):
            yield _problem("container_env", f"{name!r} is no name of an environment variable")
    for name in env.additional_parameters:
        option = script.option_name(name)
        if option in script.RESERVED:
            what = "is decided by the job itself"
            yield _problem(f"additional_parameters.{name}", what, hint="Drop it, or use the field of the profile.")
        elif not _OPTION.fullmatch(option):
            yield _problem(f"additional_parameters.{name}", "is no name of an sbatch option")
    for name, value in env.model_dump(exclude=set(_SHELL)).items():
        for text in _texts(value):
            if _CONTROL.search(text):
                yield _problem(name, f"{text!r} has a line break or a control character, which sbatch cannot read")


def _problem(name: str, what: str, *, allowed: str = "", hint: str = "") -> Problem:
    return Problem(where=f"run.env.{name}", what=what, allowed=allowed, hint=hint)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in _texts(part)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return []
