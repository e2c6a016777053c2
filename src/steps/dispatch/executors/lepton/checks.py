"""What is missing in a profile for Lepton, and what the workspace lacks of it."""

from __future__ import annotations

import importlib
import posixpath
from collections.abc import Iterable, Iterator

from steps.dispatch import importing
from steps.dispatch.executors.lepton.client import NotThere, Workspace
from steps.dispatch.executors.lepton.env import LeptonEnv
from steps.errors import ExecutorError, Problem, suggest

_NEEDED = {
    "nemo_run_dir": "Set it to a directory on the workspace's shared storage, for job directories.",
    "node_group": "Set it to the name of a dedicated node group of your workspace.",
    "resource_shape": "Set it to a machine of that node group, as gpu.8xh100-80gb.",
}


def check(env: LeptonEnv) -> Iterator[Problem]:
    """Every fault that can be seen without asking."""
    for name, hint in _NEEDED.items():
        if not getattr(env, name):
            yield Problem(f"run.env.{name}", "is missing, and a Lepton job needs it", hint=hint)
    if env.container_image == "":
        what = "is empty, which means no container, and a Lepton job needs one"
        yield Problem("run.env.container_image", what, hint="Set it, or drop it where the step names an image.")
    for index, mount in enumerate(env.mounts):
        if not mount.source:
            hint = 'Name the storage: from = "node-nfs:NAME", as the workspace\'s storage page shows it.'
            yield Problem(f"run.env.mounts.{index}.from", "is missing", hint=hint)
        if not mount.mount_path.startswith("/"):
            yield Problem(f"run.env.mounts.{index}.mount_path", f"{mount.mount_path!r} is no absolute path")
    for name in ("nemo_run_dir", "workspace", "remote_job_dir"):
        path = getattr(env, name)
        if path and not path.startswith("/"):
            yield Problem(f"run.env.{name}", f"{path!r} is no absolute path", hint="Write it as the job sees it.")
        elif path and not any(_lies_in(path, mount.mount_path) for mount in env.mounts):
            mounts = ", ".join(mount.mount_path for mount in env.mounts) or "none"
            what = f"{path} lies in none of the mounts ({mounts}): what is written there is lost with the job"
            yield Problem(f"run.env.{name}", what, hint="Add its storage to mounts, or choose a directory in one.")
    for name in sorted(name for name in env.secret_vars if env.env_vars.get(name)):  # an empty one sets nothing
        yield Problem(f"run.env.secret_vars.{name}", "is set by env_vars, too", hint="Drop one of the two.")


def _lies_in(path: str, folder: str) -> bool:
    return f"{posixpath.normpath(path)}/".startswith(f"{posixpath.normpath(folder).rstrip('/')}/")


def probe(env: LeptonEnv) -> Iterator[Problem]:
    """What the workspace says. Its own failures are problems, too."""
    if not env.container_image:
        hint = "Set it, unless every step that you run with this profile names one."
        yield Problem("run.env.container_image", "is not set", hint=hint)
    try:
        importing.must_be_installed()
        with importing.nemo_run():
            importlib.import_module("nemo_run.core.execution.lepton")  # a submission must be able to
    except ExecutorError as error:
        yield from error.problems
    try:
        workspace = Workspace()
        with workspace.asking():
            names = workspace.secrets()
        yield from _secrets(env, workspace, names)
        if env.node_group:
            yield from _node_group(env, workspace)
    except ExecutorError as error:
        yield from error.problems


def _secrets(env: LeptonEnv, workspace: Workspace, known: Iterable[str]) -> Iterator[Problem]:
    """image_pull_secrets are of another kind, which leptonai cannot list."""
    for variable, name in env.secret_vars.items():
        if name not in known:
            hint = suggest(name, known) or f"Add it on the workspace's page, or: lep secret create -n {name} -v VALUE"
            yield Problem(f"run.env.secret_vars.{variable}", f"{workspace} has no secret {name!r}", hint=hint)


def _node_group(env: LeptonEnv, workspace: Workspace) -> Iterator[Problem]:
    try:
        group = workspace.node_group(env.node_group or "")
    except NotThere as error:
        yield Problem("run.env.node_group", error.problems[0].what, hint=error.problems[0].hint)
        return
    shapes = workspace.shapes(group)
    if env.resource_shape and shapes and env.resource_shape not in shapes:
        hint = suggest(env.resource_shape, shapes)
        what = f"the node group {env.node_group} has no shape {env.resource_shape!r}"
        yield Problem("run.env.resource_shape", what, allowed=", ".join(shapes), hint=hint)
