"""`steps run`: plan, then print the sheet (dry run) or submit job after job."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from steps.dispatch import executors, job, sheet
from steps.dispatch.plan import Planned, chain, prepare, refuse
from steps.errors import StepsError, UsageError
from steps.manifest import Manifest


@dataclass(frozen=True)
class Request:
    """The options of one `steps run`."""

    config: str = "default"
    overrides: Sequence[str] = ()
    passthrough: tuple[str, ...] = ()
    attached: str | None = None
    batch: str | None = None
    dry_run: bool = False
    force_squash: bool = False
    upstream: bool = False
    json: bool = False
    debug: bool = False


def run(step: Manifest, request: Request) -> None:
    """Do what was asked. Raises StepsError for what refuses the run, SystemExit with the code of a job that fails."""
    if request.attached and request.batch:
        raise UsageError("-r and -b exclude each other", hint="-r stays until the job ends, -b returns at once.")
    if request.json and not request.dry_run:
        raise UsageError("--json goes with --dry-run")
    planned: list[Planned] = []
    try:
        planned.append(
            prepare(
                step, request.config, request.overrides, profile=request.attached or request.batch,
                passthrough=request.passthrough, debug=request.debug,
            )
        )  # fmt: skip
        if request.upstream:
            planned[:] = chain(planned[0])
        _check_force_squash(request, planned[-1])
        if request.dry_run and not request.json:
            print("\n".join(sheet.text(planned)))
        refuse(planned)
        if request.batch and len(planned) > 1:
            raise UsageError(
                "--upstream with -b needs jobs that wait for each other", hint="Use -r, or run the steps one by one."
            )
    except StepsError as error:
        if request.json:
            print(json.dumps(sheet.data(planned, error.problems), indent=2, default=str))
        raise _explained(error, planned) from error
    if request.json:
        print(json.dumps(sheet.data(planned), indent=2, default=str))
    if request.dry_run:
        return
    for number, entry in enumerate(planned):
        if number > 0 or len(planned) > 1:
            print(f"[{number + 1}/{len(planned)}] {entry.step.id} -c {entry.config_name}", flush=True)
        if entry.waits_for:  # what was missing is there now: look at it before the job does
            entry = prepare(
                entry.step, entry.config_name, request.overrides if entry.step.id == step.id else (),
                profile=entry.spec.profile, passthrough=entry.spec.passthrough, debug=request.debug,
            )  # fmt: skip
            try:
                refuse([entry])
            except StepsError as error:
                raise _explained(error, [entry]) from error
        _submit(entry, attached=request.batch is None)


def _submit(entry: Planned, *, attached: bool) -> None:
    gc.enable()  # from here on this process may watch a job for days
    executor = executors.get(entry.spec.executor)
    job.create(entry.spec, executor.render(entry.spec))
    started = time.monotonic()
    code = executor.submit(entry.spec, attached=attached)
    directory = entry.spec.directory
    if code:
        reason = job.read_status(directory).reason
        print(f"{entry.step.id} failed: {reason}. Log: {directory / 'log'}", file=sys.stderr)
        raise SystemExit(code)
    if not attached:
        print(
            f"job {entry.spec.id} is on its way\n  status: {directory / 'status.json'}\n  log:    {directory / 'log'}"
        )
        return
    path = directory / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    print("\n".join(sheet.results(entry, summary, directory, time.monotonic() - started)), flush=True)


def _check_force_squash(request: Request, entry: Planned) -> None:
    if request.force_squash and executors.get(entry.spec.executor).is_local:
        raise UsageError(
            "--force-squash re-imports a container image on a cluster; this runs here without one",
            hint="Drop it, or choose a Slurm profile with -r or -b.",
        )


def _explained(error: StepsError, planned: Sequence[Planned]) -> StepsError:
    """The same failure, with what the manifests know of it."""
    problems = list(error.problems)
    for entry in planned:
        problems = [entry.step.explain(problem) for problem in problems]
    return type(error)(problems)
