"""What lies where on the cluster.

<root>/jobs/<job id>     the job's directory: everything about it, secrets apart
<root>/secrets/<job id>  its secrets, from submission until the job has read them
<root>/squash/           imported container images, shared by all jobs
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.job import JobSpec

SCRIPT, NODE_SCRIPT, SQUASH_SCRIPT = "sbatch.sh", "run.sh", "squash.sh"
#: Written by the batch script, in this order.
JOB_ID, STARTED, ENDED, EXIT_CODE = "slurm_job_id", "started_at", "ended_at", "exit_code"

#: A shell command that prints what Slurm calls the cluster; nothing when its controller does not answer.
NAME_IN_CONFIG = "sed -n 's/^ClusterName *= *//p'"
CLUSTER_NAME = f"scontrol show config 2>/dev/null | {NAME_IN_CONFIG}"


def root(env: SlurmEnv, base: Path) -> str:
    """Where everything of ours lies on the cluster. base: where the command was given."""
    return posixpath.normpath(env.remote_job_dir or str(base / ".steps"))


def directory(spec: JobSpec) -> str:
    """The job's directory on the cluster; the local one where the profile names no other place."""
    assert isinstance(spec.environment, SlurmEnv)
    return posixpath.join(root(spec.environment, spec.base), "jobs", spec.id)


def secrets(job_directory: str) -> str:
    """The file of the secrets of the job with that directory on the cluster."""
    jobs, name = posixpath.split(job_directory)
    return posixpath.join(posixpath.dirname(jobs), "secrets", name)


def job_name(env: SlurmEnv, job_id: str) -> str:
    """The job's name in the queue: no other job has it."""
    return env.job_name_prefix + job_id


def image_job_name(env: SlurmEnv, job_id: str) -> str:
    """The name of the job that imports its container image."""
    return job_name(env, job_id) + "-image"


def workspace(env: SlurmEnv, base: Path) -> str:
    """Where the relative paths of a configuration start on the cluster."""
    if env.workspace:
        return env.workspace
    return str(base) if env.tunnel == "local" else root(env, base)


def reference(image: str) -> str:
    """A container image as pyxis and enroot read it: REGISTRY#NAME. A file's path, or what is in that form, stays.

    As for docker, a first part with a dot or a colon, or localhost, is a registry.
    """
    image = image.removeprefix("docker://")
    registry, slash, name = image.partition("/")
    if is_file(image) or "#" in image or "://" in image or not slash:
        return image
    return f"{registry}#{name}" if registry == "localhost" or re.search(r"[.:]", registry) else image


def is_file(image: str) -> bool:
    """Whether a container image is a file on the cluster, not a name in a registry."""
    return image.startswith(("/", ".", "~")) or image.endswith(".sqsh")


def squash_file(spec: JobSpec) -> str:
    """Where the job's image lies once it is imported; '' when there is none to import."""
    env = spec.environment
    assert isinstance(env, SlurmEnv)
    if not spec.image or is_file(spec.image):
        return ""
    # Neither + nor = can stand in an image's name: two images never share a file.
    name = re.sub(r"[^\w.@+=-]", "_", reference(spec.image).translate(str.maketrans("/#:", "++=")))
    return posixpath.join(env.squash_dir or posixpath.join(root(env, spec.base), "squash"), f"{name}.sqsh")
