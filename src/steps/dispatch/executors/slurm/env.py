"""`run.env` of a Slurm job, in the words of NeMo-Run's SlurmExecutor and of the model project's profiles."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from steps.config.base import RunEnv, Text

#: minutes, mm:ss, hh:mm:ss, d-hh, d-hh:mm, d-hh:mm:ss: what sbatch --time reads.
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


class SlurmEnv(RunEnv):
    """Everything that a profile may say about a Slurm cluster and about a job on it."""

    tunnel: Literal["local", "ssh"] = Field("local", description="local: sbatch runs here (a login node); ssh: on host")
    host: str | None = Field(None, description="Login node (tunnel ssh)")
    user: str | None = Field(None, description="User there (default: as ssh decides)")
    port: int | None = Field(None, ge=1, le=65535, description="Port of its ssh server")
    identity: str | None = Field(None, description="Private key file (default: as ssh decides)")
    remote_job_dir: str | None = Field(
        None, description="Directory on the cluster for job directories (default for tunnel local: ./.steps)"
    )
    workspace: str | None = Field(
        None, description="Where relative paths start on the cluster (default: here, or remote_job_dir behind ssh)"
    )
    python: str | None = Field(None, description="Python of a job without a container")

    account: str | None = Field(None, description="Account that is charged")
    partition: str | None = Field(None, description="Partition")
    run_partition: str | None = Field(None, description="Partition of attached jobs (-r)")
    batch_partition: str | None = Field(None, description="Partition of detached jobs (-b)")
    time: Text | None = Field(None, description="Time limit, as sbatch reads it: 30, 12:00:00, 1-00:00:00")
    qos: str | None = Field(None, description="Quality of service")
    cpus_per_task: int | None = Field(None, ge=1, description="CPUs of a task; one task a node starts all processes")
    cpus_per_gpu: int | None = Field(None, ge=1, description="CPUs for each GPU")
    gpus_per_task: int | None = Field(None, ge=0, description="GPUs of each task")
    gres: str | None = Field(None, description="Generic resources, where gpus_per_node does not fit")
    mem: Text | None = Field(None, description="Memory of a node: 0 for all, 64G")
    mem_per_gpu: Text | None = Field(None, description="Memory for each GPU")
    mem_per_cpu: Text | None = Field(None, description="Memory for each CPU")
    exclusive: bool | str | None = Field(None, description="Nodes of one's own")
    constraint: str | None = Field(None, description="Features that the nodes must have")
    nodelist: str | None = Field(None, description="Nodes to run on")
    exclude: str | None = Field(None, description="Nodes to keep away from")
    reservation: str | None = Field(None, description="Reservation to run in")
    comment: str | None = Field(None, description="Comment of the job")
    signal: str | None = Field(None, description="Signal before the time limit: [B:]NAME[@seconds]")
    segment: int | None = Field(None, ge=1, description="Nodes of a segment (topology/block)")
    network: str | None = Field(None, description="Network")
    dependency: str | None = Field(None, description="A dependency in sbatch's own words (--after adds to it)")
    job_name_prefix: str = Field("", description="What the job's name in the queue begins with")
    additional_parameters: dict[str, Any] = Field(
        default_factory=dict, description="Further sbatch options: {mail-type: END}; true for an option without a value"
    )
    srun_args: list[str] = Field(default_factory=list, description="Further options of srun")
    setup_lines: str | list[str] = Field(
        default_factory=list, description="Shell lines of the batch script, before srun (module load …)"
    )

    mounts: list[str] = Field(default_factory=list, description="host:container[:flags] mounts")
    container_mounts: list[str] = Field(default_factory=list, description="The same, in NeMo-Run's word")
    lustre_mount: str | None = Field(None, description="One more mount, by the model project's name")
    container_env: list[str] = Field(
        default_factory=list, description="Variables that win over the image's own (pyxis --container-env)"
    )
    squash_dir: str | None = Field(
        None, description="Where imported images are kept on the cluster (default: remote_job_dir/squash)"
    )
    build_partition: str | None = Field(None, description="Partition that imports the image (default: the job's)")
    build_include_gpus: bool = Field(True, description="Whether that job asks for GPUs")
    build_gpus_per_node: int | None = Field(None, ge=0, description="How many")
    build_time: Text | None = Field(None, description="Its time limit")

    @field_validator("time", "build_time")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.fullmatch(value):
            raise ValueError(f"{value!r} is no time limit (30, 12:00:00, 1-00:00:00)")
        return value

    @property
    def setup(self) -> list[str]:
        """The lines of setup_lines."""
        lines = self.setup_lines
        return lines.splitlines() if isinstance(lines, str) else lines

    @property
    def all_mounts(self) -> list[str]:
        """Every mount that the profile asks for, once."""
        return list(dict.fromkeys([*self.mounts, *self.container_mounts, *filter(None, [self.lustre_mount])]))
