"""Submission: secrets into the workspace, the job's files and our code onto its storage, then the job itself.

NeMo-Run's LeptonExecutor finds node groups and nodes and is what talks to the workspace. Its launch script, which
downloads another, and its data mover, which leaves its job behind when anything goes wrong, are replaced.
What may be left behind when this process dies at any point is known: status.json holds the job's name, which follows
from its id, before anything is made; so do the names of the mover's job and of the secrets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from steps.dispatch import importing
from steps.dispatch.executors.lepton import package, script, state
from steps.dispatch.executors.lepton.client import NotThere, Workspace
from steps.dispatch.job import CANCELLED, FAILED, PENDING, SUBMITTING, JobSpec, Status, utc_now
from steps.errors import ExecutorError

_MOVE_SECONDS, _POLL_SECONDS = 600.0, 0.2
#: Kubernetes keeps a job as one object, of at most 1.5 MiB.
_LARGEST_REQUEST = 1024 * 1024
_FILES = ("config.yaml", "job.yaml", script.SCRIPT, script.REQUEST)


def submit(spec: JobSpec) -> Status:
    """Start the job. Raises ExecutorError; nothing is left in the workspace then, or it can be found by name."""
    secrets = script.secrets(spec)
    name, mover = script.name(spec.id), script.name(spec.id, "move")
    handle = {"lepton_job_id": name, "directory": script.directory(spec), "secrets": list(secrets.values())}
    status = Status(PENDING, reason=SUBMITTING, handle={**handle, "mover": mover})
    status.write(spec.directory)
    made = False  # anything in the workspace
    try:
        workspace = Workspace()
        handle["workspace"] = status.handle["workspace"] = workspace.id
        status.write(spec.directory)
        workspace.node_group(script.environment(spec).node_group or "")  # before seconds go into importing NeMo-Run
        with _executor_class() as executor_class:
            executor = executor_class(spec, workspace)
            made = True
            workspace.create_secrets({secrets[variable]: value for variable, value in spec.secret_env.items()})
            with workspace.asking():
                executor.launch(name, [])
    except BaseException as error:
        if not made or _cleared(workspace, [name, mover], secrets.values()):
            stopped = isinstance(error, KeyboardInterrupt)
            status.state, status.ended_at = (CANCELLED if stopped else FAILED), utc_now()
            said = error.problems[0].what if isinstance(error, ExecutorError) else type(error).__name__
            status.reason = "not submitted: " + ("stopped by the user" if stopped else said)
            with contextlib.suppress(OSError):  # a full disk is the reason, not the news
                status.write(spec.directory)
        raise
    status.handle, status.reason = handle, ""
    status.write(spec.directory)
    return status


def _cleared(workspace: Workspace, jobs: Iterable[str], secrets: Iterable[str]) -> bool:
    """Whether nothing of the job is in the workspace any more."""
    try:
        for name in jobs:
            workspace.delete(name)
        workspace.delete_secrets(secrets)
    except ExecutorError:
        return False
    return True


@contextlib.contextmanager
def _executor_class() -> Iterator[Any]:
    """NeMo-Run's executor with our launch, imported now (2 seconds), and saying nothing."""
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())  # NeMo-Run calls logging.info(), which would add another
    importing.must_be_installed()
    with importing.nemo_run():
        from nemo_run.core.execution.lepton import LeptonExecutor

    class Submission(LeptonExecutor):  # type: ignore[misc]
        """One submission. launch() is what NeMo-Run's own does, without its flaws."""

        def __init__(self, spec: JobSpec, workspace: Workspace) -> None:
            env = script.environment(spec)
            super().__init__(
                container_image=spec.image, nemo_run_dir=env.nemo_run_dir or "", nodes=spec.nodes,
                nprocs_per_node=spec.nprocs, resource_shape=env.resource_shape or "",
                node_group=env.node_group or "",
                mounts=[mount.model_dump(by_alias=True, exclude_none=True) for mount in env.mounts],
            )  # fmt: skip
            self.job_dir, self.lepton_job_dir = os.fspath(spec.directory), script.directory(spec)
            self._spec, self._workspace = spec, workspace

        def launch(self, name: str, cmd: list[str]) -> tuple[str, Any]:
            self._validate_mounts()
            self.move_data()
            job = self.create_lepton_job(name)
            return name, job.status

        def copy_directory_data_command(self, local_dir_path: str, dest_path: str) -> list[str]:
            return package.unpack([self._spec.directory / file for file in _FILES], dest_path)

        def move_data(self, *_: Any, **__: Any) -> None:
            """A job of one small worker unpacks the files; it is gone afterwards, whatever happens."""
            name = script.name(self._spec.id, "move")
            posted = {
                "metadata": {"id": name},
                "spec": {
                    "resource_shape": "cpu.small",
                    "container": {
                        "image": "busybox:1.37.0",
                        "command": self.copy_directory_data_command(self.job_dir, self.lepton_job_dir),
                    },
                    "mounts": self.mounts,
                },
            }
            size = len(json.dumps(posted))
            if size > _LARGEST_REQUEST:
                what = f"the job's files are too large for Lepton: {size:,} bytes, at most {_LARGEST_REQUEST:,}"
                raise ExecutorError(what, hint="Shorten the configuration.")
            try:
                self._create(posted)
                _wait_for_mover(self._workspace, name)
            finally:
                self._workspace.delete(name)

        def create_lepton_job(self, name: str) -> Any:
            return self._create(script.request(self._spec))

        def _create(self, posted: dict[str, Any]) -> Any:
            """Ask for the job `posted`, in the node group of the profile and on any of its nodes."""
            from leptonai.api.v1.types.job import LeptonJob

            group = self._node_group_id(self._workspace.api)
            affinity = {
                "allowed_dedicated_node_groups": [group.metadata.id_],
                "allowed_nodes_in_node_group": sorted(self._valid_node_ids(group, self._workspace.api)),
            }
            given = posted["spec"].get("affinity", {})
            spec = {**posted["spec"], "affinity": {**given, **affinity}}
            try:
                job = LeptonJob(metadata=posted["metadata"], spec=spec)
            except ValueError as error:
                hint = "Check mounts and custom_spec in the profile."
                raise ExecutorError(f"this is no job for Lepton: {error}", hint=hint) from error
            return self._workspace.api.job.create(job)

    yield Submission


def _wait_for_mover(workspace: Workspace, name: str) -> None:
    due = time.monotonic() + _MOVE_SECONDS
    pause = _POLL_SECONDS
    while True:
        try:
            found = state.word(workspace.job(name))
        except NotThere:
            found = "Deleted"
        if found == "Completed":
            return
        if found in state.ENDED:
            said = _said(workspace, name) or found
            hint = "Is nemo_run_dir on a storage of `mounts` that you may write to?"
            raise ExecutorError(f"the job's files could not be brought to the storage: {said}", hint=hint)
        if time.monotonic() > due:
            what = f"the job's files were not brought to the storage within {_MOVE_SECONDS:.0f} s: {name} is {found}"
            raise ExecutorError(what, hint="Does the node group have room for a small job (cpu.small)?")
        time.sleep(pause)
        pause = min(1.5 * pause, 2.0)


def _said(workspace: Workspace, name: str) -> str:
    """The last lines of the mover's output."""
    text = b""
    with contextlib.suppress(ExecutorError):
        for replica in workspace.replicas(name).values():
            text = b"".join(workspace.log(name, replica, 10.0))
    return "; ".join(text.decode(errors="replace").split("\n")[-4:]).strip("; ")
