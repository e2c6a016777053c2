"""Submission: the job is staged on the cluster, then NeMo-Run's Slurm scheduler calls sbatch.

What may be left behind when this process dies at any point is known: status.json names the directory before anything is
made, and the job's name in the queue is its id, by which it is found again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import posixpath
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.dispatch import importing, jobs
from steps.dispatch.executors.slurm import layout, login
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.shell import Shell
from steps.dispatch.executors.slurm.stage import Cluster, Stage, not_put, refused
from steps.dispatch.job import CANCELLED, FAILED, PENDING, SUCCEEDED, JobRecord, JobSpec, Status, utc_now
from steps.errors import ExecutorError, Interrupted, StepsError

SUBMITTING = "being submitted"
_NOT_SUBMITTED = "the job was not submitted"
_UNCLEAR, _ASK = "whether it is in the queue cannot be told now", "`steps jobs list` asks for it by its name."
Look = Callable[[Sequence[JobRecord]], list[Status]]


def submit(spec: JobSpec, look: Look) -> Status:
    """Put the job into the cluster's queue. look: tells what has become of the jobs that this one waits for.

    Raises ExecutorError; the job is then marked as failed, unless sbatch may have taken it without our hearing of it.
    Raises Interrupted after Ctrl-C: the job was not submitted, or is cancelled.
    """
    status = Status(PENDING, reason=SUBMITTING, handle={"directory": layout.directory(spec)})
    status.write(spec.directory)
    submission = _Submission(Stage(spec, Shell.of(_environment(spec)), layout.directory(spec)), status)
    try:
        status.handle |= submission.run(dependency(spec, look))
    except KeyboardInterrupt:
        try:
            submission.withdraw()
        except ExecutorError as error:
            raise Interrupted(f"interrupted: {_UNCLEAR}", hint=_ASK) from error
        _ended(spec, status, CANCELLED, "stopped by the user")
        raise Interrupted("interrupted: the job was not submitted") from None
    except _Unknown as error:
        raise ExecutorError(f"{error.problems[0].what}; {_UNCLEAR}", hint=_ASK) from error
    except StepsError as error:
        _ended(spec, status, FAILED, error.problems[0].what)
        raise
    status.reason = ""
    status.write(spec.directory)
    return status


class _Unknown(ExecutorError):
    """Nobody can tell whether sbatch took the job."""


def _ended(spec: JobSpec, status: Status, state: str, reason: str) -> None:
    reason = f"not submitted: {reason.removeprefix(_NOT_SUBMITTED + ': ')}"
    status.state, status.reason, status.ended_at = state, reason, utc_now()
    with contextlib.suppress(OSError):  # a full disk is the reason, not the news
        status.write(spec.directory)


def _environment(spec: JobSpec) -> SlurmEnv:
    assert isinstance(spec.environment, SlurmEnv)
    return spec.environment


def dependency(spec: JobSpec, look: Look) -> str:
    """What `sbatch --dependency` is given: the profile's own, and the jobs of `spec.after` that still run or wait."""
    numbers = []
    for name in spec.after:
        before = jobs.by_id(name, spec.directory)
        if not before.executor:
            raise ExecutorError(f"{name}, which this job shall wait for, is lost: {before.status.reason}")
        if before.executor != spec.executor:
            what = f"{name} runs on the executor {before.executor}, and a Slurm job cannot wait for it"
            raise ExecutorError(what, hint="Wait until it has ended, then drop --after.")
        if Shell.of(SlurmEnv.model_validate(dict(before.run_env))) != Shell.of(_environment(spec)):
            hint = "A job can wait for jobs of its own cluster; wait until that one has ended, then drop --after."
            raise ExecutorError(f"{name} is on another cluster", hint=hint)
        status = before.status if before.status.ended else look([before])[0]
        if status.state == SUCCEEDED:
            continue
        if status.ended or "slurm_job_id" not in status.handle:
            what = f"{name}, which this job shall wait for, is {status.state}"
            what += f" ({status.reason})" if status.reason else ""
            raise ExecutorError(what, hint=f"Start it again (steps jobs rerun {name}) and name the new job.")
        numbers.append(str(status.handle["slurm_job_id"]))
    own = _environment(spec).dependency
    return ",".join([*([own] if own and numbers else []), *([f"afterok:{':'.join(numbers)}"] if numbers else [])])


@dataclass(frozen=True)
class _Submission:
    stage: Stage
    status: Status

    def run(self, dependency: str) -> dict[str, Any]:
        """Everything, in order; the rest of the job's handle. What was put on the cluster is removed on failure."""
        importing.must_be_installed()
        cluster = self.stage.prepare()
        if cluster.name:  # before sbatch: whoever looks for the job must know where
            self.status.handle["cluster"] = cluster.name
            self.status.write(self.stage.spec.directory)
        try:
            with nemo_run(self.stage.spec.directory) as nemo:
                env = _environment(self.stage.spec)
                tunnel = nemo.tunnel(env, self.stage.directory)
                try:
                    self.stage.send(lambda source, target: nemo.rsync(env, tunnel, source, target))
                    self.stage.send_secrets()
                    return self._sbatch(nemo, tunnel, cluster, dependency)
                finally:
                    with contextlib.suppress(Exception):  # whatever it says, the job is there or is not
                        tunnel.cleanup()
        except _Unknown:
            raise
        except Exception:
            self.stage.remove()
            raise

    def withdraw(self) -> None:
        """Take the job out of the queue, if it is there, and off the cluster. Raises ExecutorError: nobody answers."""
        env, job_id = _environment(self.stage.spec), self.stage.spec.id
        for name in (layout.job_name(env, job_id), layout.image_job_name(env, job_id)):
            if number := self._find(name):
                self._cancel(number)
        self.stage.remove()

    def _sbatch(self, nemo: _NemoRun, tunnel: Any, cluster: Cluster, dependency: str) -> dict[str, Any]:
        spec = self.stage.spec
        env, call, image = _environment(spec), cluster.sbatch(spec), ""
        if layout.squash_file(spec) and cluster.pyxis and (spec.force_squash or not cluster.has_image):
            image = self._schedule(nemo, tunnel, call, layout.SQUASH_SCRIPT, layout.image_job_name(env, spec.id))
            before = dependency or env.dependency
            dependency = ",".join([*([before] if before else []), f"afterok:{image}"])
        options = [f"--dependency={shlex.quote(dependency)}"] if dependency else []
        try:
            number = self._schedule(nemo, tunnel, [*call, *options], layout.SCRIPT, layout.job_name(env, spec.id))
        except Exception:
            if image:
                self._cancel(image)
            raise
        return {"slurm_job_id": number, **({"image_job_id": image} if image else {})}

    def _schedule(self, nemo: _NemoRun, tunnel: Any, call: list[str], script: str, name: str) -> str:
        """NeMo-Run calls sbatch. When it is not clear how that went, the queue tells: the name is there only once."""
        path = posixpath.join(self.stage.directory, script)
        try:
            with _uninterrupted():
                return nemo.schedule(tunnel, self.stage.spec, [*call, shlex.quote(path)])
        except ExecutorError as error:
            if not isinstance(error, _Unknown):
                raise
            try:
                number = self._find(name)
            except ExecutorError:
                raise error from None
            if number:
                return number
            raise ExecutorError(error.problems) from error

    def _find(self, name: str) -> str:
        """The number of the job of that name as long as the queue remembers it, '' when there is none."""
        result = self.stage.shell.run(f"squeue --states=all --noheader --format=%i --name={shlex.quote(name)}")
        if result.returncode:
            raise ExecutorError(result.stderr.strip())
        return result.text.strip()

    def _cancel(self, number: str) -> None:
        with contextlib.suppress(ExecutorError):
            self.stage.shell.run(f"scancel {shlex.quote(number)}")


# NeMo-Run

#: NeMo-Run's own directory, as it was read once, at its import.
_home: Path | None = None


class _NemoRun:
    """The parts of NeMo-Run that submit. Made inside `nemo_run()`."""

    def __init__(self) -> None:
        from nemo_run.core.execution.slurm import SlurmBatchRequest, SlurmExecutor
        from nemo_run.core.frontend.console.api import CONSOLE
        from nemo_run.core.packaging.base import Packager
        from nemo_run.core.tunnel.client import LocalTunnel, SSHTunnel
        from nemo_run.core.tunnel.rsync import rsync
        from nemo_run.run.torchx_backend.schedulers.slurm import SlurmTunnelScheduler
        from torchx.specs import AppDryRunInfo

        CONSOLE.quiet = True
        self._request, self._executor, self._packager = SlurmBatchRequest, SlurmExecutor, Packager
        self._local, self._ssh, self._rsync = LocalTunnel, SSHTunnel, rsync
        self._scheduler, self._info = SlurmTunnelScheduler, AppDryRunInfo

    def tunnel(self, env: SlurmEnv, directory: str) -> Any:
        if env.tunnel == "local":
            tunnel = self._local(job_dir=directory)
            tunnel.session.config.run.in_stream = False  # our standard input is not sbatch's
            return tunnel
        identity = os.fspath(Path(env.identity).expanduser()) if env.identity else None
        tunnel = self._ssh(host=env.host, user=env.user, port=env.port, identity=identity, job_dir=directory)
        login.Prompt(_address(env)).answer_for(tunnel)
        return tunnel

    def rsync(self, env: SlurmEnv, tunnel: Any, source: str, target: str) -> None:
        """Copy what is in `source` here into `target` there. Raises ExecutorError."""
        try:
            tunnel.connect()
        except (Exception, SystemExit) as error:
            what = f"steps' own connection to {_address(env)} was refused (ssh itself may share an open one)"
            by_hand = "ssh -o ControlPath=none " + " ".join(Shell.of(env).address())
            raise ExecutorError(f"{what}: {_words(error)}", hint=f"`{by_hand}` must log in by itself.") from error
        try:
            self._rsync(tunnel.session, f"{shlex.quote(source)}/", shlex.quote(target))
        except (Exception, SystemExit) as error:
            raise not_put(target, _words(error)) from error

    def schedule(self, tunnel: Any, spec: JobSpec, call: list[str]) -> str:
        """sbatch, called by NeMo-Run's scheduler; the job's number. Raises ExecutorError; _Unknown: it may be there.

        The scheduler appends the path of a script as it would have written it; ours stands in `call`, so that a
        comment sign comes between.
        """
        env = _environment(spec)
        executor = self._executor(
            account=env.account or "", partition=env.partition, nodes=spec.nodes, time=env.time or "", tunnel=tunnel,
            packager=self._packager(), poll_estimated_start_time=False,
        )  # fmt: skip
        executor.job_name, executor.experiment_id = spec.id, spec.id
        executor.experiment_dir = executor.job_dir = executor.job_details.folder = os.fspath(spec.directory)
        request = self._request(
            launch_cmd=[*call, "#"], jobs=[spec.id], command_groups=[], executor=executor, max_retries=0, extra_env={}
        )
        try:
            answer: str = self._scheduler("steps").schedule(self._info(request, repr))
        except (Exception, SystemExit) as error:
            words = _words(error)
            failed = refused(_NOT_SUBMITTED, words)
            # Slurm's answer was lost, sbatch was killed, or it is not sbatch that failed: the job may be in the queue.
            result = getattr(error, "result", None)
            if result is None or result.exited < 0 or "timed out" in words:
                raise _Unknown(failed.problems) from error
            raise failed from error
        return answer.partition(";")[0]


def _address(env: SlurmEnv) -> str:
    return f"{Shell.of(env)}:{env.port}" if env.port else str(Shell.of(env))


def _words(error: BaseException) -> str:
    """What a failed command said, or the error itself."""
    result = getattr(error, "result", None)
    if result is not None:
        return str(result.stderr).strip() or str(result.stdout).strip() or f"status {result.exited}"
    if isinstance(error, SystemExit):
        return "nobody was let in (authentication failed)"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def nemo_run(directory: Path) -> Iterator[_NemoRun]:
    """NeMo-Run, imported now (2 seconds), saying nothing, its own files in that directory until the end of the block.

    Raises ExecutorError when it cannot be imported.
    """
    global _home
    importing.must_be_installed()
    given = os.environ.get("NEMORUN_HOME")
    if given is None:
        _home = _home or directory.absolute() / ".nemo-run"
        _home.mkdir(parents=True, exist_ok=True)
        os.environ["NEMORUN_HOME"] = os.fspath(_home)
    try:
        try:
            with _uninterrupted(), importing.nemo_run():
                nemo = _NemoRun()
                for name in ("nemo_run", "torchx", "paramiko", "fabric", "invoke"):
                    logging.getLogger(name).setLevel(logging.CRITICAL)
        finally:
            if given is None:
                del os.environ["NEMORUN_HOME"]
        with contextlib.redirect_stdout(io.StringIO()):
            yield nemo
    finally:
        if given is None and _home is not None:
            shutil.rmtree(_home, ignore_errors=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: what NeMo-Run imports and how it runs commands would swallow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt
