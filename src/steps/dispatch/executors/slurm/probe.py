"""What a profile needs and the cluster does not have, asked there before any job is (`steps profiles check`).

Two questions go to the login node: what is there, and whether Slurm itself would take such a job.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steps.dispatch.executors.slurm import layout
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.shell import Shell
from steps.dispatch.executors.slurm.stage import hint_for
from steps.dispatch.executors.slurm.submit import nemo_run
from steps.errors import ExecutorError, Note, Problem, suggest

_PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
_SINFO_FORMAT = "%P|%a|%l|%D|%s|%G"
#: What a step imports, and the oldest Python it runs on.
_MODULES = ("torch", "numpy", "pydantic", "omegaconf", "pyarrow", "safetensors", "tokenizers", "huggingface_hub")
_PYTHON = (3, 10)
_ROOM_MB = 100


@dataclass
class Partition:
    """A partition as sinfo shows it. minutes, most_nodes: the limits of one job, None for none."""

    up: bool
    default: bool
    minutes: float | None
    nodes: int
    most_nodes: int | None
    gpus: int


def probe(env: SlurmEnv) -> Iterator[Problem]:
    """Everything that is missing, each with what to do about it; at most notes when a job of this profile can run."""
    try:
        with tempfile.TemporaryDirectory() as home, nemo_run(Path(home)):
            pass  # what a submission imports can be
    except ExecutorError as error:
        yield from error.problems
    if env.tunnel == "ssh" and shutil.which("rsync") is None:
        yield Problem("run.env.tunnel", "there is no rsync on this machine, and ssh needs it", hint="Install rsync.")
    try:
        shell = Shell.of(env)
        facts = shell.run(_question(env)).sections
    except ExecutorError as error:
        yield from error.problems
        return
    found = list(_missing(env, shell, facts))
    yield from found
    partitions = read_partitions("\n".join(facts.get("partitions", [])))
    if partitions:
        limits = list(partition_problems(env, partitions))
        yield from limits
        if not limits and not any(problem.where == "run.env.account" for problem in found):
            yield from _refused(env, shell)


def _missing(env: SlurmEnv, shell: Shell, facts: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    """What the answer to the first question shows."""
    absent = [name for name in facts.get("absent", []) if name != "rsync"]
    if absent:
        hint = "Use the host of a login node." if shell.host else "Use tunnel: ssh with the host of a login node."
        yield Problem("", f"{shell} has no {', '.join(absent)} on its PATH", hint=hint)
    elif facts.get("controller"):
        what = f"Slurm's controller does not answer: {' '.join(facts['controller'])}"
        yield Problem("", what, hint="Try again later, or ask the cluster's people (`scontrol ping`).")
    if "rsync" in facts.get("absent", []) and env.tunnel == "ssh":
        yield Problem("run.env.host", f"there is no rsync on {shell}", hint="Ask the cluster's people to install it.")
    accounts = facts.get("accounts", [])
    if env.account and accounts and env.account not in accounts:
        what = f"you have no account {env.account!r} on this cluster"
        hint = suggest(env.account, accounts)
        yield Problem("run.env.account", what, allowed=", ".join(dict.fromkeys(accounts)), hint=hint)
    for words in facts.get("directory", []):
        hint = "Set remote_job_dir to a directory of yours that all nodes share, with room."
        yield Problem("run.env.remote_job_dir", f"{layout.root(env, Path.cwd())}: {words}", hint=hint)
    image = env.container_image
    if image and layout.is_file(image) and facts.get("image"):
        yield Problem("run.env.container_image", f"there is no file {image} on {shell}")
    if image and not facts.get("pyxis") and not absent:
        what = "srun knows no --container-image (pyxis is not installed): jobs will run in the host environment"
        hint = "Ask for pyxis, or set python to one that has what the step needs, and drop the image."
        yield Note("run.env.container_image", what, hint=hint)
    for words in () if image and facts.get("pyxis") else facts.get("python", []):
        hint = "Set python to one that has them (a virtual environment's bin/python), or container_image."
        yield Problem("run.env.python", f"{_python(env)} on {shell}: {words}", hint=hint)


def read_partitions(text: str) -> dict[str, Partition]:
    """Lines of `sinfo --noheader --format _SINFO_FORMAT`; one partition may have several."""
    partitions: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 6:
            continue
        name, up, limit, nodes, size, gres = fields
        most = size.rpartition("-")[2]
        seen = partitions.setdefault(
            name.rstrip("*"),
            Partition(
                up == "up", name.endswith("*"), minutes(limit), 0, int(most) if most.isdigit() else None, 0
            ),
        )  # fmt: skip
        seen.nodes += int(nodes)
        # gpu:8, gpu:a100:8(S:0-1): the number is the last part
        counts = [int(count) for count in re.findall(r"(?:^|,)gpu:(?:[^:,(]+:)?(\d+)", gres)]
        seen.gpus = max(seen.gpus, sum(counts))
    return partitions


def partition_problems(env: SlurmEnv, partitions: Mapping[str, Partition]) -> Iterator[Problem]:
    """Partitions that are not there, and what a job asks for beyond what they give."""
    named = [
        (key, name)
        for key in ("partition", "run_partition", "batch_partition", "build_partition")
        for name in (getattr(env, key) or "").split(",")
        if name
    ]
    if not named and not any(partition.default for partition in partitions.values()):
        what = "the cluster has no default partition"
        yield Problem("run.env.partition", what, allowed=", ".join(partitions), hint="Set partition.")
    default = [("", name) for name, partition in partitions.items() if partition.default] if not named else []
    for key, name in named + default:
        where = f"run.env.{key}" if key else "run.env.partition"
        if name not in partitions:
            hint = suggest(name, partitions)
            yield Problem(where, f"there is no partition {name!r}", allowed=", ".join(partitions), hint=hint)
            continue
        partition = partitions[name]
        if not partition.up:
            yield Problem(where, f"the partition {name!r} is closed", hint="Choose another, or wait: `sinfo`.")
        if key == "build_partition":  # one task, with its own limits
            continue
        nodes, most = env.nodes or 1, partition.most_nodes
        if nodes > min(partition.nodes, most or partition.nodes):
            allowed = f"at most {min(partition.nodes, most or partition.nodes)}"
            yield Problem("run.env.nodes", f"{name!r} has no {nodes} nodes for a job", allowed=allowed)
        if (env.gpus_per_node or 0) > partition.gpus:
            what = f"no node of {name!r} has {env.gpus_per_node} GPUs"
            yield Problem("run.env.gpus_per_node", what, allowed=f"at most {partition.gpus}")
        asked = minutes(env.time) if env.time else None
        if partition.minutes is not None and asked is not None and asked > partition.minutes:
            what = f"{env.time} is longer than jobs in {name!r} may take"
            yield Problem("run.env.time", what, allowed=f"at most {partition.minutes:g} minutes")


def minutes(limit: str) -> float | None:
    """A time limit as Slurm writes and reads it: 30, 12:00 (mm:ss), 12:00:00, 1-00, 1-00:00:00. None: without limit."""
    days, dash, rest = limit.rpartition("-")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return None
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours first
        hours, mins, seconds = (*parts, 0, 0)[:3]
        return (int(days) * 24 + hours) * 60 + mins + seconds / 60
    if len(parts) == 1:
        return float(parts[0])
    hours, mins, seconds = parts if len(parts) == 3 else (0, *parts)
    return hours * 60 + mins + seconds / 60


def _refused(env: SlurmEnv, shell: Shell) -> Iterator[Problem]:
    """Slurm's own word on such a job, without submitting it: limits of accounts and of services, features, …"""
    for partition in dict.fromkeys([env.run_partition or env.partition, env.batch_partition or env.partition]):
        options = {
            "partition": partition, "account": env.account, "qos": env.qos, "reservation": env.reservation,
            "time": env.time, "nodes": env.nodes or 1, "ntasks-per-node": 1, "gpus-per-node": env.gpus_per_node or None,
            "gpus-per-task": env.gpus_per_task, "gres": env.gres, "cpus-per-task": env.cpus_per_task,
            "cpus-per-gpu": env.cpus_per_gpu, "mem": env.mem, "mem-per-gpu": env.mem_per_gpu,
            "mem-per-cpu": env.mem_per_cpu, "constraint": env.constraint, "nodelist": env.nodelist,
            "exclude": env.exclude, "segment": env.segment, "signal": env.signal,
        }  # fmt: skip
        asked = [shlex.quote(f"--{name}={value}") for name, value in options.items() if value is not None]
        try:
            result = shell.run(f"cd /; sbatch --test-only {' '.join(asked)} --wrap=true")
        except ExecutorError as error:
            yield from error.problems
            return
        if result.returncode:
            words = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in result.stderr.splitlines()]
            where = f" in {partition}" if partition else ""
            said = "; ".join(dict.fromkeys(filter(None, words)))
            yield Problem("", f"Slurm would not take a job like this{where}: {said}", hint=hint_for(result.stderr))


def _python(env: SlurmEnv) -> str:
    return env.python or (sys.executable if env.tunnel == "local" else "python3")


def _question(env: SlurmEnv) -> str:
    """What is there: sections of lines, most of them empty where nothing is wrong."""
    root, image = layout.root(env, Path.cwd()), env.container_image or ""
    return f"""\
echo '== absent'
for program in {" ".join(_PROGRAMS)} rsync; do command -v "$program" >/dev/null || echo "$program"; done
echo '== partitions'
partitions=$(sinfo --noheader --format={shlex.quote(_SINFO_FORMAT)} 2>&1) && printf '%s\\n' "$partitions" || {{
    echo '== controller'
    printf '%s\\n' "$partitions"
}}
echo '== accounts'
accounts=$(sacctmgr --noheader --parsable2 show associations user="$(id -un)" format=account 2>/dev/null) &&
    printf '%s\\n' "$accounts"
echo '== pyxis'
srun --help 2>&1 | grep -e --container-image
echo '== image'
[ -e {shlex.quote(image)} ] || echo missing
echo '== directory'
directory={shlex.quote(root)}
while [ ! -e "$directory" ]; do directory=$(dirname "$directory"); done
if [ ! -d "$directory" ]; then echo "$directory is no directory"
elif [ ! -w "$directory" ]; then echo "$directory cannot be written to"
else
    room=$(df -Pk "$directory" | awk 'END {{print int($4 / 1024)}}')
    [ "${{room:-{_ROOM_MB}}}" -ge {_ROOM_MB} ] || echo "only $room MB are left there"
fi
echo '== python'
python={shlex.quote(_python(env))}
if ! command -v "$python" >/dev/null; then echo 'not found'
else
    said=$("$python" - 2>&1 <<'END'
{_imports()}
END
    )
    [ "$said" = fine ] || printf '%s\n' "${{said:-is no Python}}" | tail -n 1
fi
"""


def _imports() -> str:
    """A program for the job's Python that says what it lacks. Any Python 3 can read it."""
    return f"""\
import importlib.util, sys
absent = [name for name in {_MODULES!r} if importlib.util.find_spec(name) is None]
if sys.version_info < {_PYTHON!r}:
    print("it is Python %d.%d, and steps need {".".join(map(str, _PYTHON))}" % sys.version_info[:2])
elif absent:
    print("it lacks " + ", ".join(absent))
else:
    print("fine")"""
