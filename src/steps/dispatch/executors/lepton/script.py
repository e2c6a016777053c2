"""The texts of a Lepton job, pure: the script that each worker runs, and the request that asks for the workers.

On the storage of the workspace, D = <nemo_run_dir>/<job id>:

    D/launch_script.sh  what each worker runs
    D/code/steps/       our package as it is at submission
    D/config.yaml, job.yaml, lepton.json
    D/work/             where the job starts
    D/metrics.jsonl, progress.json, summary.json    by the step
    D/failed            exit code and index of the first worker that failed by itself
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from steps.dispatch.executors.lepton import trailer
from steps.dispatch.executors.lepton.env import LeptonEnv
from steps.dispatch.job import JobSpec, quote, setup_commands, step_arguments
from steps.errors import ExecutorError, Problem

SCRIPT, REQUEST = "launch_script.sh", "lepton.json"
_LONGEST_STEP = 16  # a job's name has at most 36 characters; "-", the moment (12), "-" and the random part (6) follow


def render(spec: JobSpec) -> dict[str, str]:
    """Both texts. Raises ExecutorError for a job without an image."""
    return {SCRIPT: launch_script(spec), REQUEST: json.dumps(request(spec), indent=2, ensure_ascii=False) + "\n"}


def directory(spec: JobSpec) -> str:
    """D, the job's directory as its workers see it."""
    return posixpath.join(environment(spec).nemo_run_dir or "", spec.id)


def environment(spec: JobSpec) -> LeptonEnv:
    """The job's run.env, in Lepton's type."""
    assert isinstance(spec.environment, LeptonEnv)
    return spec.environment


def name(job_id: str, word: str = "") -> str:
    """The name of a job in the workspace, of small letters, digits and '-', at most 36. word: instead of the step's."""
    match = re.fullmatch(r"\d\d(\d{6})-(\d{6})-(.+)-([0-9a-f]{6})", job_id)
    if match is None:
        return f"{word or 'job'}-{zlib.crc32(job_id.encode()):08x}"
    day, time, step, random = match.groups()
    step = step.rpartition("-")[2]  # without its category
    step = re.sub("[^a-z0-9]+", "-", step.lower())[:_LONGEST_STEP].strip("-")
    return f"{word or step}-{day}{time}-{random}"


def secrets(spec: JobSpec) -> dict[str, str]:
    """Variable -> secret of the workspace, for the secrets that are made for this job."""
    return {variable: f"{name(spec.id, 'env')}-{index}" for index, variable in enumerate(spec.secret_env)}


def request(spec: JobSpec) -> dict[str, Any]:
    """The job as Lepton's API takes it, its node group by name: ids are looked up when it is submitted.

    It says what NeMo-Run's own LeptonExecutor says, and what `custom_spec` adds.
    """
    env = environment(spec)
    if not spec.image:
        hint = "Set it in the profile, or on the command line: run.env.container_image=IMAGE."
        raise ExecutorError(Problem("run.env.container_image", "is missing, and a Lepton job needs one", hint=hint))
    references = {**secrets(spec), **env.secret_vars}
    wanted: dict[str, Any] = {
        "resource_shape": env.resource_shape,
        "affinity": {"allowed_dedicated_node_groups": [env.node_group]},
        "container": {"image": spec.image, "command": ["/bin/bash", posixpath.join(directory(spec), SCRIPT)]},
        "shared_memory_size": env.shared_memory_size,
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        "envs": [
            *({"name": variable, "value": value} for variable, value in spec.env.items()),
            *({"name": key, "value_from": {"secret_name_ref": secret}} for key, secret in references.items()),
        ],
        "mounts": [mount.model_dump(by_alias=True, exclude_none=True) for mount in env.mounts],
        "image_pull_secrets": env.image_pull_secrets,
        "ttl_seconds_after_finished": None,
        "intra_job_communication": True,
    }
    if env.can_be_preempted or env.can_preempt or env.queue_priority:
        queue = {"can_be_preempted": env.can_be_preempted or None, "can_preempt": env.can_preempt or None}
        wanted["queue_config"] = {"priority_class": env.queue_priority or "mid-4000", **queue}
    if env.node_reservation:
        wanted["reservation_config"] = {"reservation_id": env.node_reservation}
    return {"metadata": {"id": name(spec.id)}, "spec": _merged(wanted, env.custom_spec)}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge, everything else is replaced."""
    both = {
        key: _merged(under[key], value) if isinstance(value, Mapping) and isinstance(under.get(key), Mapping) else value
        for key, value in over.items()
    }
    return {**under, **both}


def launch_script(spec: JobSpec) -> str:
    """What each worker runs: the profile's commands, the step or torchrun with its processes, then word of its end."""
    env = environment(spec)
    python = shlex.quote(env.python)
    # Kubernetes replaces $(NAME) in the values of a container's variables: these are set again as they were meant.
    literal = [f"export {name}={shlex.quote(value)}" for name, value in spec.env.items() if "$(" in value]
    main = [
        'mkdir -p "$job/work" && cd "$job/work"',
        *env.pre_launch_commands,
        *setup_commands(env, python),
        *_launch(spec, python),
    ]
    head = [
        "#!/bin/bash",
        f"# {spec.step}, on each worker",
        f"job={shlex.quote(directory(spec))}",
        f"mark={shlex.quote(trailer.mark(spec.id))}",
        *literal,
    ]
    return "\n".join([*head, _BEFORE.strip("\n"), *main, _AFTER.strip("\n"), ""])


def _launch(spec: JobSpec, python: str) -> Iterator[str]:
    arguments = quote(step_arguments(spec, directory(spec)))
    launcher = ""
    if spec.torchrun:
        launcher = f"-m steps.runtime.torchrun --nproc-per-node={spec.nprocs} "
        if spec.nodes == 1:
            launcher += "--standalone "
        else:
            # Below the ports that are given to outgoing connections, and another for each job: workers may share a
            # machine's network. Ranks go by the worker's index, so that the first one, whose log is read, has rank 0.
            port = 15_000 + zlib.crc32(spec.id.encode()) % 15_000
            meeting = f'--node-rank="$worker" --master-addr="$MASTER_ADDR" --master-port={port}'
            launcher += f"--nnodes={spec.nodes} {meeting} --rdzv-id={shlex.quote(spec.id)} "
            yield _MEETING.strip("\n").format(python=python)
    yield f"exec {python} {launcher}{arguments}"


_BEFORE = r"""
exec 2>&1
now() { date -u +%Y-%m-%dT%H:%M:%S+00:00; }
worker=${LEPTON_JOB_WORKER_INDEX:-0}
started=$(now)
export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

main() {
set -e
"""

_MEETING = r"""
MASTER_ADDR=${{LEPTON_JOB_SERVICE_PREFIX:-$LEPTON_JOB_NAME}}-0.${{LEPTON_SUBDOMAIN:-$LEPTON_JOB_NAME-job-svc}}
for _ in {{1..150}}; do # its name is known once it has started, which may be later than here
    {python} -c 'import socket, sys; socket.getaddrinfo(sys.argv[1], None)' "$MASTER_ADDR" 2> /dev/null && break
    sleep 2
done
"""

_AFTER = r"""
}

# Lepton's SIGTERM comes to this shell alone: it is passed on, and the step's own end waited for.
child= stopped=
trap 'stopped=1; again=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM INT
main & child=$!
[ -z "$stopped" ] || kill -TERM "$child"
again=1
while [ -n "$again" ]; do
    again=
    wait "$child"
    code=$?
done

# What is on this storage cannot be read from outside; the log can. Its last lines are for `steps`, which hides them.
tell() { while IFS= read -r line || [ -n "$line" ]; do printf '%s %s %s\n' "$mark" "$1" "$line"; done; }
kind=exit end="$code $worker"
if [ "$code" != 0 ]; then
    # The first that fails by itself says why the job failed; the others are stopped then, or lose sight of it.
    [ -n "$stopped" ] && kind=stopped || (set -C; echo "$end" > "$job/failed") 2> /dev/null
    [ -s "$job/failed" ] && kind=exit end=$(cat "$job/failed")
fi
if [ "$worker" = 0 ]; then
    [ ! -f "$job/summary.json" ] || tell summary < "$job/summary.json"
    [ ! -f "$job/metrics.jsonl" ] || tell metrics < "$job/metrics.jsonl"
fi
echo "$end $started $(now)" | tell "$kind"
exit "$code"
"""
