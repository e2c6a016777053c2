"""Slurm accounting for a cluster without a database: `sacct`'s command line, answered from scontrol and the jobs that
slurmctld wrote to its job completion file. Run as a program with SLURM_CONF set; the standard library only.

One row per job, as with `--allocations`. An option or a column that it does not know is an error, as in the real one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "DEADLINE",
    "BOOT_FAIL",
)
DEFAULT_COLUMNS = "JobID,JobName,Partition,Account,AllocCPUS,State,ExitCode"
# A column's name in sacct -> its name in `scontrol show job` and in the job completion file.
COLUMNS = {
    "jobid": ("JobId", "JobId"),
    "jobidraw": ("JobId", "JobId"),
    "jobname": ("JobName", "Name"),
    "state": ("JobState", "JobState"),
    "exitcode": ("ExitCode", "ExitCode"),
    "reason": ("Reason", "Reason"),
    "partition": ("Partition", "Partition"),
    "account": ("Account", "Account"),
    "alloccpus": ("NumCPUs", "ProcCnt"),
    "nodelist": ("NodeList", "NodeList"),
    "submit": ("SubmitTime", "SubmitTime"),
    "start": ("StartTime", "StartTime"),
    "end": ("EndTime", "EndTime"),
    "workdir": ("WorkDir", "WorkDir"),
}
_FIELD = re.compile(r"(?:^| )([A-Za-z][\w:/]*)=")
# Text of a user's choice, which may look like fields: it ends where the field begins that always follows it.
_FREE_TEXT = {"JobName": " UserId=", "Name": " JobState="}


def fields(line: str) -> dict[str, str]:
    """Read one line of `scontrol --oneliner show job` or of jobcomp/filetxt. No job: an empty mapping."""
    found: dict[str, str] = {}
    at = 0
    while match := _FIELD.search(line, at):
        name, start = match[1], match.end()
        if name in _FREE_TEXT:
            at = line.find(_FREE_TEXT[name], start)
        else:
            following = _FIELD.search(line, start)
            at = following.start() if following else len(line)
        at = len(line) if at < 0 else at
        found[name] = line[start:at].strip()
    return found


def completed(configuration: Path) -> dict[str, dict[str, str]]:
    """Job id -> its line in the job completion file that slurm.conf names, in `scontrol`'s words."""
    place = re.search(r"^JobCompLoc=(.+)$", configuration.read_text(), re.MULTILINE)
    if place is None or not Path(place[1]).exists():
        return {}
    rows = [fields(line) for line in Path(place[1]).read_text(errors="replace").splitlines()]
    renamed = ({ours: row.get(theirs, "") for ours, theirs in COLUMNS.values()} for row in rows)
    return {row["JobId"]: row for row in renamed}


def known(configuration: Path) -> dict[str, dict[str, str]]:
    """Every job since the cluster's start: those that the controller remembers over those that it wrote down."""
    answer = subprocess.run(["scontrol", "--oneliner", "show", "jobs"], capture_output=True, text=True)
    rows = completed(configuration)
    for row in (fields(line) for line in answer.stdout.splitlines() if line.startswith("JobId=")):
        if row["JobState"] == "COMPLETING":  # accounting has the state that it ends in as soon as it is written down
            row["JobState"] = rows.get(row["JobId"], {}).get("JobState", "RUNNING")
        rows[row["JobId"]] = row
    return rows


def cell(row: dict[str, str], column: str) -> str:
    """One value in sacct's words: a cancelled job names who did it, a reason that is none says None."""
    value = row.get(COLUMNS[column][0], "")
    if column == "state" and value == "CANCELLED":
        return f"CANCELLED by {os.getuid()}"
    return (value or "None") if column == "reason" else value


def since(text: str) -> datetime:
    """A time as in --starttime: an ISO date or moment, or now+N or now-N seconds, minutes, hours, days."""
    if relative := re.fullmatch(r"now(?:([+-]\d+)(second|minute|hour|day|week)s?)?", text):
        return datetime.now() + timedelta(**{f"{relative[2] or 'second'}s": int(relative[1] or 0)})
    # 1970-01-01-00:00:01 is a spelling that Slurm takes too
    return datetime.fromisoformat(re.sub(r"^(\d+-\d+-\d+)-", r"\1T", text))


def wanted(row: dict[str, str], arguments: argparse.Namespace) -> bool:
    if arguments.jobs and row["JobId"] not in arguments.jobs.split(","):
        return False
    if arguments.name and row["JobName"] not in arguments.name.split(","):
        return False
    if arguments.starttime and row.get("JobState") in ENDED:
        return datetime.fromisoformat(row["EndTime"]) >= since(arguments.starttime)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="sacct", allow_abbrev=False)
    parser.add_argument("-n", "--noheader", action="store_true")
    parser.add_argument("-X", "--allocations", action="store_true")
    parser.add_argument("-P", "--parsable2", action="store_true")
    parser.add_argument("-p", "--parsable", action="store_true")
    parser.add_argument("-D", "--duplicates", action="store_true")
    parser.add_argument("-j", "--jobs", default="")
    parser.add_argument("-u", "--user", default="")
    parser.add_argument("-o", "--format", default=DEFAULT_COLUMNS)
    parser.add_argument("-S", "--starttime", default="")
    parser.add_argument("--name", default="")
    arguments = parser.parse_args()
    names = [name.partition("%")[0] for name in arguments.format.split(",")]
    columns = [name.lower() for name in names]
    for name, column in zip(names, columns, strict=True):
        if column not in COLUMNS:
            print(f'sacct: fatal: Invalid field requested: "{name}"', file=sys.stderr)
            return 1
    rows = [row for _, row in sorted(known(Path(os.environ["SLURM_CONF"])).items(), key=lambda item: int(item[0]))]
    table = [[cell(row, column) for column in columns] for row in rows if wanted(row, arguments)]
    if not arguments.noheader:
        table.insert(0, names)
    for values in table:
        if arguments.parsable2 or arguments.parsable:
            print("|".join(values) + ("|" if arguments.parsable else ""))
        else:
            print(" ".join(f"{value:>12.12}" for value in values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
