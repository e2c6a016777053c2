"""The text of a Slurm job: sbatch.sh, which sbatch reads and the first node runs, and run.sh, which srun starts once on
each node. squash.sh imports the container image in a job of its own.

Everything that comes from a configuration stands quoted: a value is data for sbatch and for the shell, whatever is in
it. No `set -u` and no `set -e` around setup_lines: `module load` and conda's scripts do not survive them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from steps.dispatch.executors.slurm import layout
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.job import JobSpec, quote, setup_commands, step_arguments

#: sbatch options that are ours: a job with others could not be followed.
RESERVED = frozenset(
    {"array", "chdir", "clusters", "error", "export", "export-file", "job-name", "kill-on-invalid-dep", "no-requeue"}
    | {"ntasks", "ntasks-per-node", "nodes", "open-mode", "output", "parsable", "requeue", "wait", "wrap"}
)


def render(spec: JobSpec, python: str) -> dict[str, str]:
    """The job's scripts. python: the interpreter of a job without a container."""
    texts = {layout.SCRIPT: _batch(spec, python), layout.NODE_SCRIPT: _node(spec)}
    if squash := layout.squash_file(spec):
        texts[layout.SQUASH_SCRIPT] = _squash(spec, squash)
    return texts


def nodes(spec: JobSpec) -> int:
    """Nodes of the job: a step that no torchrun spreads would do everything once on each."""
    return spec.nodes if spec.torchrun else 1


def option_name(name: str) -> str:
    """An sbatch option as additional_parameters may spell it: mail_type, --mail-type, mail-type."""
    return name.removeprefix("--").replace("_", "-")


def directive(name: str, value: object) -> str:
    r"""An #SBATCH line. Inside double quotes sbatch reads \\ and \" and nothing else (Slurm 22.05, tried)."""
    text = str(value)
    if not re.fullmatch(r"[\w./:,=+@%-]+", text, re.ASCII):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={text}"


def _environment(spec: JobSpec) -> SlurmEnv:
    assert isinstance(spec.environment, SlurmEnv)
    return spec.environment


def _directives(spec: JobSpec) -> Iterator[str]:
    env, directory = _environment(spec), layout.directory(spec)
    yield directive("job-name", layout.job_name(env, spec.id))
    yield from _where(env, env.run_partition if spec.attached else env.batch_partition)
    yield directive("nodes", nodes(spec))
    yield directive("ntasks-per-node", 1)
    options: dict[str, Any] = {
        "time": env.time, "cpus-per-task": env.cpus_per_task, "cpus-per-gpu": env.cpus_per_gpu,
        "gpus-per-node": env.gpus_per_node or None, "gpus-per-task": env.gpus_per_task, "gres": env.gres,
        "mem": env.mem, "mem-per-gpu": env.mem_per_gpu, "mem-per-cpu": env.mem_per_cpu, "exclusive": env.exclusive,
        "constraint": env.constraint, "nodelist": env.nodelist, "exclude": env.exclude,
        "comment": env.comment, "signal": env.signal, "segment": env.segment,
        "network": env.network, "dependency": env.dependency,
        **{option_name(name): value for name, value in env.additional_parameters.items()},
    }  # fmt: skip
    for name, value in options.items():
        if value is True:
            yield f"#SBATCH --{name}"
        elif value is not None and value is not False:
            yield directive(name, value)
    yield "#SBATCH --kill-on-invalid-dep=yes"
    yield "#SBATCH --no-requeue"
    yield from _output(directory)


def _where(env: SlurmEnv, partition: str | None) -> Iterator[str]:
    partition = partition or env.partition
    named = {"account": env.account, "partition": partition, "qos": env.qos, "reservation": env.reservation}
    yield from (directive(name, value) for name, value in named.items() if value is not None)


def _output(directory: str) -> Iterator[str]:
    yield directive("chdir", directory)
    yield directive("output", directory.replace("%", "%%") + "/log")
    yield "#SBATCH --open-mode=append"


def _batch(spec: JobSpec, python: str) -> str:
    env, directory = _environment(spec), layout.directory(spec)
    head = ["#!/bin/bash", *_directives(spec), "", f"# {spec.step}, job {spec.id}", f"job={shlex.quote(directory)}"]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in spec.env.items()]
    parts = [
        *head, _FRAME.strip(),
        *([_SECRETS.format(path=shlex.quote(layout.secrets(directory))).strip()] if spec.secret_env else []),
        *(["", *exports] if exports else []),
        *(["", "# setup_lines of the profile", *env.setup] if env.setup else []),
        *(["", _HEAD.strip()] if nodes(spec) > 1 else []),
        "", *_container(spec, python),
        "", *_srun(env, nodes(spec)),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _container(spec: JobSpec, python: str) -> Iterator[str]:
    yield f"python={shlex.quote(python)}"
    yield "container=()"
    if not spec.image:
        yield 'echo "note: no container image: the job runs in the environment of its nodes"'
        return
    env, directory = _environment(spec), layout.directory(spec)
    variables = list(dict.fromkeys([*env.container_env, *spec.env, *spec.secret_env]))
    flags = [
        f"--container-mounts={','.join(_mounts(spec, directory))}",
        f"--container-workdir={directory}/work",
        *([f"--container-env={','.join(variables)}"] if variables else []),
        *filter(_is_pyxis, env.srun_args),
    ]
    yield f"image={shlex.quote(layout.reference(spec.image))}"
    if squash := layout.squash_file(spec):
        yield f"squash={shlex.quote(squash)}"
        yield '[ ! -e "$squash" ] || image=$squash'
    yield "if srun --help 2>&1 | grep -q -e --container-image; then"
    yield "    python=python"
    yield "    container=("
    yield from (f"        {flag}" for flag in ['"--container-image=$image"', *map(shlex.quote, flags)])
    yield "    )"
    yield "else"
    yield '    echo "note: this Slurm has no pyxis: the job runs in the environment of its nodes, not in $image"'
    yield "fi"


def _is_pyxis(argument: str) -> bool:
    """Whether srun knows an option only where pyxis is."""
    return argument.startswith(("--container", "--no-container"))


def _mounts(spec: JobSpec, directory: str) -> list[str]:
    """The profile's mounts, and what the job itself must see: its workspace and its directory."""
    env = _environment(spec)
    own = [layout.workspace(env, spec.base), directory]
    if directory.startswith(own[0].rstrip("/") + "/"):
        own.pop()
    return list(dict.fromkeys([*env.all_mounts, *(f"{path}:{path}" for path in own)]))


def _srun(env: SlurmEnv, count: int) -> Iterator[str]:
    options = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
    if env.cpus_per_task:  # since Slurm 22.05 srun does not take it from the batch job
        options.append(f"--cpus-per-task={env.cpus_per_task}")
    options += ["--kill-on-bad-exit=1", "--wait=60", "--unbuffered", "--export=ALL"]
    options += [argument for argument in env.srun_args if not _is_pyxis(argument)]
    yield f'srun {quote(options)} "${{container[@]}}" bash "$job/{layout.NODE_SCRIPT}" "$python"'
    if count == 1:
        yield "exit $?"
        return
    yield "code=$?"
    yield "# srun tells the highest code, which is that of a node that was ended for the sake of another's."
    yield '[ "$code" = 0 ] || read -r code 2> /dev/null < "$job/.failure"'
    yield 'exit "$code"'


_FRAME = r"""
fail() { echo "error: $1" >&2; exit 5; }
now() { date -u +%Y-%m-%dT%H:%M:%S+00:00; }
finish() {
    code=$?
    now > "$job/ended_at"
    echo "$code" > "$job/.exit_code" && mv "$job/.exit_code" "$job/exit_code"
}
# A directory that is not on this node must not be replaced by another, as Slurm does.
cd "$job/work" || fail "$job is not on $(hostname): remote_job_dir must be a directory that all nodes share"
trap finish EXIT
# Slurm ends the job (cancelled, time limit, …) and knows why: its word counts, not an exit code of ours.
trap 'trap - EXIT; exit 143' TERM
echo "$SLURM_JOB_ID" > "$job/slurm_job_id"
now > "$job/started_at"
"""

_SECRETS = """
secrets={path}
[ -f "$secrets" ] || fail "the job's secrets are gone ($secrets): submit it again"
. "$secrets" && rm "$secrets" || fail "the job's secrets cannot be read and removed ($secrets)"
"""

_HEAD = r"""
# Where the processes meet: the first node, by a name that resolves or else its address, and a port that nobody uses.
# The batch script runs on that node. Ports from 32768 on are given to outgoing connections at any time.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
getent hosts "$MASTER_ADDR" > /dev/null ||
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
while
    MASTER_PORT=$((20000 + RANDOM % 12000))
    grep -qi ":$(printf '%04X' "$MASTER_PORT") " /proc/net/tcp /proc/net/tcp6 2> /dev/null
do :; done
export MASTER_ADDR MASTER_PORT
"""


def _node(spec: JobSpec) -> str:
    """run.sh: what the profile wants done first, then the step, or torchrun with its processes."""
    directory = layout.directory(spec)
    before = setup_commands(spec.environment, '"$python"')
    command = ['"$python"', *_launcher(spec), quote(step_arguments(spec, directory))]
    several = nodes(spec) > 1
    parts = [
        "#!/bin/bash", f"# {spec.step}, on each node", f"job={shlex.quote(directory)}", "python=$1",
        'cd "$job/work" || { echo "error: $job is not in the container or on $(hostname)" >&2; exit 5; }',
        'export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1',
        *([_FIRST_FAILURE.strip()] if several else []),
        *(["set -e", *before] if before else []),
        " ".join(command if several else ["exec", *command]),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


_FIRST_FAILURE = r"""
# The first node to fail tells the job's exit code. TERM is for the step; this script stays until that has ended.
trap 'code=$?; [ "$code" = 0 ] || (set -C; echo "$code" > "$job/.failure") 2> /dev/null' EXIT
trap : TERM
"""


def _launcher(spec: JobSpec) -> Iterable[str]:
    if not spec.torchrun:
        return []
    launcher = ["-m steps.runtime.torchrun"]
    if nodes(spec) == 1:
        launcher.append("--standalone")
    else:
        rendezvous = '--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"'
        launcher += [f"--nnodes={nodes(spec)}", rendezvous, f"--rdzv-id={shlex.quote(spec.id)}"]
    return [*launcher, f"--nproc-per-node={spec.nprocs}"]


def _squash(spec: JobSpec, squash: str) -> str:
    """squash.sh: a job of one task that imports the image; its output stands in the log of the job that wants it."""
    env = _environment(spec)
    gpus = env.gpus_per_node if env.build_gpus_per_node is None else env.build_gpus_per_node
    options: Mapping[str, Any] = {
        "nodes": 1, "ntasks-per-node": 1, "time": env.build_time or env.time,
        "gpus-per-node": gpus if env.build_include_gpus and gpus else None,
    }  # fmt: skip
    image = layout.reference(spec.image)
    image = image if "://" in image else f"docker://{image}"
    head = [
        "#!/bin/bash",
        directive("job-name", layout.image_job_name(env, spec.id)),
        *_where(env, env.build_partition or (env.run_partition if spec.attached else env.batch_partition)),
        *(directive(name, value) for name, value in options.items() if value is not None),
        *_output(layout.directory(spec)),
        "",
        f"image={shlex.quote(image)}",
        f"squash={shlex.quote(squash)}",
    ]
    return "\n".join([*head, _IMPORT.strip(), ""])


_IMPORT = r"""
command -v enroot > /dev/null || {
    echo "note: no enroot on $(hostname): the image is not imported beforehand"
    exit 0
}
mkdir -p "$(dirname "$squash")" || exit 1
new=$squash.$SLURM_JOB_ID
trap 'rm -f "$new"' EXIT
echo "importing $image as $squash"
enroot import --output "$new" "$image" && mv "$new" "$squash"
"""
