"""`steps run`: plan, then print the sheet (dry run) or submit job after job."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from steps.dispatch import executors, job, sheet
from steps.dispatch.job import JobSpec
from steps.dispatch.jobs import order
from steps.dispatch.jobs.stops import Stops
from steps.dispatch.plan import Place, Planned, chain, prepare, refuse
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
    env_file: str | None = None
    after: tuple[str, ...] = ()
    dry_run: bool = False
    probe: bool = False
    force_squash: bool = False
    upstream: bool = False
    json: bool = False
    debug: bool = False


def run(step: Manifest, request: Request) -> None:
    """Do what was asked. Raises StepsError for what refuses the run, SystemExit with the code of a job that fails."""
    if request.attached and request.batch:
        raise UsageError("-r and -b exclude each other", hint="-r stays until the job ends, -b returns at once.")
    if request.probe:
        from steps.dispatch import probing

        probing.refuse_options(request)
    if request.json and not request.dry_run:
        raise UsageError("--json goes with --dry-run")
    place = Place(
        request.attached or request.batch, request.env_file, attached=request.batch is None,
        after=order.waited_for(request.after), force_squash=request.force_squash,
    )  # fmt: skip
    planned: list[Planned] = []
    try:
        planned.append(
            prepare(
                step, request.config, request.overrides, place=place,
                passthrough=request.passthrough, debug=request.debug,
            )
        )  # fmt: skip
        if request.upstream:
            planned[:] = chain(planned[0])
        if request.batch and len(planned) > 1:
            _wait_for_each_other(planned)
        if request.dry_run and not request.json:
            print("\n".join(sheet.text(planned)))
        if request.probe:
            probing.refuse_step(planned[0])
        refuse(planned)
    except StepsError as error:
        if request.json:
            print(json.dumps(sheet.data(planned, error.problems), indent=2, default=str))
        raise _explained(error, planned) from error
    if request.json:
        print(json.dumps(sheet.data(planned), indent=2, default=str))
    if request.dry_run:
        return
    for note in dict.fromkeys(note for entry in planned for note in entry.notes):
        print(f"note: {note}", file=sys.stderr)
    if request.probe:
        probing.run(planned[0])
        return
    gc.enable()  # from here on this process may watch a job for days
    if request.batch:
        _submit_all(planned)
        return
    for number, entry in enumerate(planned):
        if len(planned) > 1:
            print(f"[{number + 1}/{len(planned)}] {entry.step.id} -c {entry.config_name}", flush=True)
        if entry.waits_for:  # what was missing is there now: look at it before the job does
            entry = prepare(
                entry.step, entry.config_name, entry.overrides,
                place=entry.place, passthrough=entry.spec.passthrough, debug=request.debug,
            )  # fmt: skip
            try:
                refuse([entry])
            except StepsError as error:
                raise _explained(error, [entry]) from error
        attach(entry)


def _submit_all(planned: Sequence[Planned]) -> None:
    """Start one job, or a chain whose jobs wait for each other, and say how to follow them."""
    if len(planned) == 1:
        submit(planned[0].spec)
        return
    for number, entry in enumerate(planned, start=1):
        status = _start(entry.spec)
        print(sheet.link(number, len(planned), entry, status), flush=True)
    print("  steps jobs list\n  steps jobs logs -f latest", flush=True)


def submit(spec: JobSpec) -> None:
    """Start a job, say how to follow it, and return."""
    status = _start(spec)
    print("\n".join(sheet.submitted(spec, status)), flush=True)


def _start(spec: JobSpec) -> job.Status:
    executor = executors.get(spec.executor)
    job.create(spec, executor.render(spec))
    with Stops():  # told to stop, a submission is taken back as after Ctrl-C, not torn
        return executor.submit(spec)


def attach(entry: Planned) -> None:
    """Start a job and stay until its end. Raises SystemExit with its code when it does not succeed."""
    executor = executors.get(entry.spec.executor)
    job.create(entry.spec, executor.render(entry.spec))
    started = time.monotonic()
    code = executor.attach(entry.spec)
    directory = entry.spec.directory
    if code:
        status = job.read_status(directory)
        if status.ended:  # otherwise it was left to itself, and that was said
            told = {job.CANCELLED: "was cancelled", job.LOST: "is lost"}.get(status.state, status.state)
            reason = f": {status.reason}" if status.reason.lower() not in ("", status.state) else ""
            print(f"{entry.step.id} {told}{reason}. Log: {directory / 'log'}", file=sys.stderr)
        raise SystemExit(code)
    path = directory / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    print("\n".join(sheet.results(entry, summary, directory, time.monotonic() - started)), flush=True)


def _wait_for_each_other(planned: list[Planned]) -> None:
    """Each job of a chain starts after those that make what it lacks."""
    ids = {entry.step.id: entry.spec.id for entry in planned}
    for entry in planned:
        makers = dict.fromkeys(ids[maker] for maker in entry.waits_for.values() if maker in ids)
        if makers and not executors.get(entry.spec.executor).has_order:
            what = f"jobs of the executor {entry.spec.executor} cannot wait for others: no --upstream with -b"
            raise UsageError(what, hint=f"Stay with the chain instead: -r {entry.spec.profile}.")
        entry.spec = replace(entry.spec, after=(*entry.spec.after, *makers))


def _explained(error: StepsError, planned: Sequence[Planned]) -> StepsError:
    """The same failure, with what the manifests know of it."""
    problems = list(error.problems)
    for entry in planned:
        problems = [entry.step.explain(problem) for problem in problems]
    return type(error)(problems)
