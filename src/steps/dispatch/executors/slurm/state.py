"""What has become of Slurm jobs: their own files first, then squeue, then sacct or, where it does not answer, scontrol.

Each cluster is asked once for all of its jobs, and a second time only about those that have left the queue.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

from steps.dispatch.executors.slurm import answers, layout
from steps.dispatch.executors.slurm.answers import Files, Row
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.shell import Shell
from steps.dispatch.job import LOST, JobRecord, Status
from steps.errors import ExecutorError

_FILES = (layout.JOB_ID, layout.STARTED, layout.ENDED, layout.EXIT_CODE)
#: A job that has just written a bad exit code is given this long to get Slurm's verdict on it.
_VERDICT_TRIES, _VERDICT_PAUSE = 10, 0.3
_TIMEOUT = 120.0


@dataclass(frozen=True)
class Found:
    """A job as the cluster knows it: its name in the queue (unique), its directory there, its number if it has one.

    cluster: Slurm's name of the cluster that it was submitted to, where that was written down.
    """

    id: str
    name: str
    directory: str
    slurm_job_id: str
    submitted_on: str
    cluster: str = ""

    @property
    def secrets(self) -> str:
        """The file with the job's secrets; there only between its submission and its start."""
        return layout.secrets(self.directory)


def environment(job: JobRecord) -> SlurmEnv:
    """`run.env` of a job, typed."""
    return SlurmEnv.model_validate(job.run_env)


def find(job: JobRecord) -> Found:
    """Where a job is on its cluster, by its record alone."""
    env = environment(job)
    usual = posixpath.join(layout.root(env, Path(job.asked.get("submitted_from", ""))), "jobs", job.id)
    handle = job.status.handle
    return Found(
        job.id, layout.job_name(env, job.id), str(handle.get("directory") or usual),
        str(handle.get("slurm_job_id") or ""), str(job.asked.get("submitted_at", ""))[:10],
        str(handle.get("cluster") or ""),
    )  # fmt: skip


def look(jobs: Sequence[JobRecord]) -> list[Status]:
    """What has become of each, in their order. Raises ExecutorError when a cluster that must be asked does not answer,
    or is another than the job's: several login nodes may share a home, and each knows its own jobs only.

    A job that nobody knows is `lost`, unless its record says already how it ended.
    """
    clusters: dict[Shell, list[Found]] = {}
    for job in jobs:
        clusters.setdefault(Shell.of(environment(job)), []).append(find(job))
    seen: dict[str, Status] = {}
    for shell, group in clusters.items():
        seen.update(_ask(shell, group))
    for job in jobs:
        seen[job.id].handle = {**job.status.handle, **seen[job.id].handle}
    return [job.status if seen[job.id].state == LOST and job.status.ended else seen[job.id] for job in jobs]


def _ask(shell: Shell, jobs: Sequence[Found]) -> dict[str, Status]:
    sections = shell.ask(_first_question(jobs), timeout=_TIMEOUT).sections
    files = _read_files(sections.get("files", []))
    rows = {job.id: _of(job, answers.squeue_rows("\n".join(sections.get("squeue", [])))) for job in jobs}
    complaint = " ".join(sections.get("complaint", []))
    known = {}
    for number, job in enumerate(jobs):
        own, row = files.get(number, Files()), rows[job.id]
        number_there = (row.id if row else "") or job.slurm_job_id or own.slurm_job_id
        known[job.id] = (replace(job, slurm_job_id=number_there), own)
    for cluster in sections.get("cluster", []):
        _at_home(cluster, shell, [job for job, own in known.values() if own.exit_code is None])

    gone = [job for job, own in known.values() if own.exit_code != 0 and _left(own, rows[job.id])]
    if gone:
        # scontrol would only wait for the same controller once more.
        sections = shell.ask(_second_question(gone, controller=not complaint), timeout=_TIMEOUT).sections
        for job in gone:
            told = [
                _of(job, answers.sacct_rows("\n".join(sections.get("sacct", [])))),
                _of(job, answers.scontrol_rows("\n".join(sections.get("scontrol", [])))),
                rows[job.id],
            ]
            heard = [row for row in told if row]
            rows[job.id] = next((row for row in heard if row.ended), heard[0] if heard else None)
        trouble = " ".join(sections.get("accounting", []))
        if not any(part in trouble for part in ("is disabled", "command not found")):
            complaint = complaint or trouble  # there is accounting, and it may know more than it can say now

    result = {}
    for job, own in known.values():
        row = rows[job.id]
        status = answers.judge(own, row)
        if status is None and complaint:
            raise _silent(shell, complaint)
        number_there = job.slurm_job_id or (row.id if row else "")
        status = status or answers.lost(number_there, job.name)
        handle = {"slurm_job_id": number_there} if number_there else {}
        status.handle = {**handle, "directory": job.directory}
        result[job.id] = status
    return result


def _at_home(cluster: str, shell: Shell, jobs: Iterable[Found]) -> None:
    """Raises ExecutorError for a job without an end of its own that another cluster than this one would know of."""
    if far := [job for job in jobs if job.cluster and job.cluster != cluster]:
        more = f" and {len(far) - 1} more" if far[1:] else ""
        what = f"{shell} belongs to the Slurm cluster {cluster}; {far[0].id}{more} is on {far[0].cluster}"
        raise ExecutorError(what, hint=f"Ask on a login node of {far[0].cluster}.")


def _left(own: Files, row: Row | None) -> bool:
    """Whether a job is no longer in the queue, or about to leave it with a bad exit code."""
    return row is None or row.ended or own.exit_code is not None


def _of(job: Found, rows: Iterable[Row]) -> Row | None:
    """The row of a job. By its name, which is its own: Slurm's numbers start anew when a cluster is set up anew."""
    return next((row for row in rows if row.name == job.name), None)


def _first_question(jobs: Sequence[Found]) -> str:
    """The queue first and the files after it: a job that leaves it in between has left its exit code."""
    tell = "\n".join(f"tell {number} {shlex.quote(job.directory)}" for number, job in enumerate(jobs))
    directories = " ".join(shlex.quote(job.directory) for job in jobs)
    # All of the user's jobs: asked for one that it has forgotten, squeue answers with an error and nothing else.
    squeue = f'squeue --noheader --states=all --user="$(id -u)" --format={shlex.quote(answers.SQUEUE_FORMAT)}'
    cluster = f"echo '== cluster'; {layout.CLUSTER_NAME}" if any(job.cluster for job in jobs) else ":"
    return f"""\
export TZ=UTC0
open=
for directory in {directories}; do
    code=
    [ -f "$directory/exit_code" ] && read -r code <"$directory/exit_code"
    [ "$code" = 0 ] || open=yes
done
if [ "$open" ]; then
    if queue=$({squeue} 2>&1); then
        printf '== squeue\\n%s\\n' "$queue"
        {cluster}
    else
        printf '== complaint\\n%s\\n' "$queue"
    fi
fi
echo '== files'
tell() {{
    for name in {" ".join(_FILES)}; do
        [ -f "$2/$name" ] || continue
        value=
        read -r value <"$2/$name"
        printf '%s|%s|%s\\n' "$1" "$name" "$value"
    done
}}
{tell}
"""


def _second_question(jobs: Sequence[Found], *, controller: bool) -> str:
    numbers = [job.slurm_job_id for job in jobs if job.slurm_job_id]
    names = [job.name for job in jobs if not job.slurm_job_id]
    since = min((_day_before(job.submitted_on) for job in jobs if job.submitted_on), default="1970-01-01")
    sacct = f"sacct --noheader --allocations --parsable2 --starttime={since} --format={answers.SACCT_FORMAT}"
    lines = ["export TZ=UTC0", "words=", "echo '== sacct'"]
    wanted = [f"--jobs={','.join(numbers)}"] if numbers else []
    wanted += [f"--name={shlex.quote(','.join(names))}"] if names else []
    lines += [f"{{ complaint=$({sacct} {one} 2>&1 >&3) || words=$complaint; }} 3>&1" for one in wanted]
    lines.append("printf '== accounting\\n%s\\n== scontrol\\n' \"$words\"")
    if numbers and controller:
        lines.append(f"""\
tries={_VERDICT_TRIES}
for number in {" ".join(map(shlex.quote, numbers))}; do
    while shown=$(scontrol --oneliner show job "$number" 2>/dev/null); do
        case $shown in
        *' JobState=RUNNING '*|*' JobState=COMPLETING '*) ;;
        *) break ;;
        esac
        [ $((tries -= 1)) -ge 0 ] || break
        sleep {_VERDICT_PAUSE}
    done
    printf '%s\\n' "$shown"
done""")
    return "\n".join([*lines, "true", ""])


def _day_before(day: str) -> str:
    try:
        return str(date.fromisoformat(day) - timedelta(days=1))
    except ValueError:
        return "1970-01-01"


def _read_files(lines: Iterable[str]) -> dict[int, Files]:
    result: dict[int, Files] = {}
    for line in lines:
        number, name, value = line.split("|", 2)
        value = value.strip()
        own = result.get(int(number), Files())
        if name == layout.JOB_ID:
            own = replace(own, slurm_job_id=value)
        elif name == layout.STARTED:
            own = replace(own, started_at=value)
        elif name == layout.ENDED:
            own = replace(own, ended_at=value)
        elif value.isdigit():
            own = replace(own, exit_code=int(value))
        result[int(number)] = own
    return result


def _silent(shell: Shell, complaint: str) -> ExecutorError:
    if "command not found" in complaint:
        return ExecutorError(f"{shell} has no squeue on its PATH", hint="Is this the login node of a Slurm cluster?")
    hint = "Jobs go on without it; try again later, or ask the cluster's people."
    return ExecutorError(f"Slurm on {shell} does not answer: {complaint}", hint=hint)
