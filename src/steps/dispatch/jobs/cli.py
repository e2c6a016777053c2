"""`steps jobs`: the jobs that were started from here, in any later shell, wherever they run."""

from typing import TYPE_CHECKING, Annotated

import typer

from steps.dispatch import complete

if TYPE_CHECKING:
    from collections.abc import Sequence

    from steps.dispatch.job import JobRecord

app = typer.Typer(help="List, follow, cancel and repeat jobs.", no_args_is_help=True, rich_markup_mode=None)

JobName = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Job id, a part of it, its directory, or `latest`.", autocompletion=complete.job_ids
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_SHOWN = 20
_CANCEL_SECONDS = 10.0
_SETTLE_SECONDS = 10.0


@app.command("list")
def list_jobs(
    every: Annotated[
        bool, typer.Option("--all", help=f"Every job; without it, the last {_SHOWN} and all that have not ended.")
    ] = False,
    state: Annotated[
        str | None,
        typer.Option(help="Only jobs in this state.", autocompletion=complete.states),
    ] = None,
    json: Json = False,
) -> None:
    """List jobs, the newest last.

    Those that were started here or in a directory above.
    """
    import sys

    from steps.dispatch import jobs
    from steps.dispatch.job import STATES
    from steps.dispatch.jobs import view as jobs_view
    from steps.dispatch.jobs.listing import listing
    from steps.errors import UsageError, suggest

    if state is not None and state not in STATES:
        raise UsageError(f"there is no state {state!r}", hint=suggest(state, STATES) or f"States: {', '.join(STATES)}")
    known = jobs.ids()
    records = jobs.refresh([jobs.read(jobs.home() / name) for name in known])
    fitting = [record for record in records if state in (None, record.status.state)]
    shown = [
        record
        for place, record in enumerate(fitting)
        if every or state or not record.status.ended or place >= len(fitting) - _SHOWN
    ]
    if json:
        _print_json([jobs_view.data(record) for record in shown])
    elif shown:
        print("\n".join(listing(shown, known)))
    else:
        print(f"no jobs in {jobs.home()}" + (f" are {state}" if state else ""), file=sys.stderr)
    if len(shown) < len(fitting) and not json:
        print(f"{len(fitting) - len(shown)} older jobs have ended: --all shows them", file=sys.stderr)


@app.command()
def status(job: JobName, json: Json = False) -> None:
    """Show everything about one job.

    Exit code 5 when its cluster could not tell how it is now.
    """
    from steps.dispatch import jobs
    from steps.dispatch.jobs import view as jobs_view
    from steps.errors import ExecutorError

    (record,) = jobs.refresh([jobs.find(job)])
    known = jobs_view.details(record)
    if json:
        _print_json(known)
    else:
        print("\n".join(jobs_view.page(record, known)))
    if record.note:  # which was shown
        raise SystemExit(ExecutorError.exit_code)


@app.command()
def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended. Ctrl-C leaves it.")] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", metavar="LINES", min=0, help="Begin with the last LINES lines.")
    ] = None,
) -> None:
    """Print a job's log."""
    from steps.dispatch import executors, jobs
    from steps.dispatch.jobs import view as jobs_view
    from steps.dispatch.jobs.following import Following
    from steps.dispatch.jobs.screen import Screen
    from steps.errors import ExecutorError, Interrupted

    record, screen = jobs.find(job, submitted=True), Screen()
    name = record.id.rpartition("-")[2]
    if not record.executor:
        raise ExecutorError(f"job {record.id} has no log: {record.status.reason}")
    if not jobs.reached(record):
        reason = record.status.reason.removeprefix("not submitted: ")
        hint = f"Start it again: steps jobs rerun {name}"
        raise ExecutorError(f"job {name} has no log: it was not submitted ({reason})", hint=hint)
    executor = executors.get(record.executor)
    if follow:
        known = executor.logs(record, follow=False)
        skip = 0 if lines is None else jobs_view.before_last_lines(known, lines)
        with Following(executor, record, screen, skip) as following:
            try:
                record = following.until_end()
            except KeyboardInterrupt:
                screen.say(f"job {name} goes on (steps jobs cancel {name} ends it)")
                raise SystemExit(Interrupted.exit_code) from None
        screen.say(f"job {record.id} {jobs_view.told(record)}")
        return
    pieces = executor.logs(record, follow=False)
    for piece in pieces if lines is None else [jobs_view.last_lines(pieces, lines)]:
        screen.write(piece)
        if screen.closed:
            return


@app.command()
def cancel(
    names: Annotated[
        list[str],
        typer.Argument(metavar="JOB...", help="Jobs, as `status` takes one.", autocompletion=complete.job_ids),
    ],
) -> None:
    """Cancel jobs, and wait until they are gone.

    A job that has ended is left alone.
    """
    from steps.dispatch import executors, jobs
    from steps.errors import ExecutorError, Problem

    records = jobs.refresh(list({(record := jobs.find(name, submitted=True)).id: record for name in names}.values()))
    asked: list[JobRecord] = []
    problems: list[Problem] = []
    for record in records:
        if record.status.ended:
            _tell(record, "has already ended")
            continue
        if not record.executor:
            problems.append(Problem("", f"job {record.id} is being written down at this moment; try again"))
            continue
        try:
            executors.get(record.executor).cancel(record)
            asked.append(record)
        except ExecutorError as error:
            problems += error.problems
    for record in _until_ended(asked, _CANCEL_SECONDS):
        if record.status.ended:
            _tell(record, "ended")
        else:
            what = f"job {record.id} was told to stop and has not ended within {_CANCEL_SECONDS:.0f} seconds"
            hint = f"See later: steps jobs status {record.id.rpartition('-')[2]}"
            problems.append(Problem("", f"{what} ({record.note})" if record.note else what, hint=hint))
    if problems:
        raise ExecutorError(problems)


def _tell(record: "JobRecord", otherwise: str) -> None:
    from steps.dispatch.job import CANCELLED
    from steps.dispatch.jobs import view as jobs_view

    if record.status.state == CANCELLED and otherwise == "ended":
        print(f"job {record.id} is cancelled", flush=True)
    else:
        print(f"job {record.id} {otherwise}: {jobs_view.told(record)}", flush=True)


def _until_ended(records: "Sequence[JobRecord]", seconds: float) -> "list[JobRecord]":
    import time

    from steps.dispatch import jobs

    end = time.monotonic() + seconds
    while True:
        records = jobs.refresh(records)
        if all(record.status.ended for record in records) or time.monotonic() > end:
            return list(records)
        time.sleep(0.3)


@app.command()
def rerun(
    job: JobName,
    attached: Annotated[bool, typer.Option("--run", "-r", help="Stay until its end.")] = False,
    batch: Annotated[bool, typer.Option("--batch", "-b", help="Submit it and return at once.")] = False,
) -> None:
    """Run a job again, as a new job.

    It gets the same resolved configuration, and is attached or not as it was, unless told otherwise.
    """
    import gc
    import sys

    from steps.dispatch import jobs, launch
    from steps.dispatch.jobs import rerun as again
    from steps.errors import UsageError

    if attached and batch:
        raise UsageError("-r and -b exclude each other", hint="-r stays until the job ends, -b returns at once.")
    old = jobs.find(job)
    entry = again.planned(old, attached=True if attached else False if batch else None)
    gc.enable()  # from here on this process may watch a job for days
    if not entry.spec.attached:
        launch.submit(entry.spec)
        return
    print(f"job {entry.spec.id}", file=sys.stderr, flush=True)
    launch.attach(entry)


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, default=str))
