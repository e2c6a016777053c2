"""The jobs that were started from here, found again from any later shell."""

from __future__ import annotations

from pathlib import Path

from steps.dispatch.job import JOBS, JobRecord, read_record
from steps.errors import UsageError, suggest


def home(start: Path | None = None) -> Path:
    """The nearest .steps/jobs, upwards from here; where it would be made if there is none."""
    here = (start or Path.cwd()).absolute()
    return next((folder / JOBS for folder in (here, *here.parents) if (folder / JOBS).is_dir()), here / JOBS)


def find(name: str) -> JobRecord:
    """The job of that id, of a part of it that fits only one, or in that directory. `latest` is the newest."""
    if (Path(name) / "job.yaml").is_file():
        return read_record(Path(name).absolute())
    known = sorted(path.name for path in home().glob("*") if path.is_dir())
    if name == "latest" and known:
        return read_record(home() / known[-1])
    fitting = [entry for entry in known if name and name in entry]
    if name in known or len(fitting) == 1:
        return read_record(home() / (name if name in known else fitting[0]))
    if fitting:
        raise UsageError(f"{name!r} could be any of {', '.join(fitting)}", hint="Write more of the id.")
    hint = suggest(name, known) or (f"The newest is {known[-1]}." if known else f"There are none in {home()}.")
    raise UsageError(f"there is no job {name!r}", hint=hint)
