"""`run.env` of a job on DGX Cloud Lepton, in the words of NeMo-Run's LeptonExecutor and of the model project."""

from typing import Any

from pydantic import Field

from steps.config.base import RunEnv, Section, Text


class Mount(Section):
    """A storage that the job sees. `from` names it: node-nfs:NAME, node-local, or a volume of the workspace."""

    path: str = Field(description="Path inside the storage")
    mount_path: str = Field(description="Where the job sees it")
    source: str | None = Field(None, alias="from", description="The storage, as node-nfs:NAME")


class LeptonEnv(RunEnv):
    """Everything that a profile may say about a Lepton workspace and about a job in it."""

    nemo_run_dir: str | None = Field(None, description="Directory on shared storage for job directories")
    remote_job_dir: str | None = Field(None, description="The model project's name for where outputs go: see workspace")
    workspace: str | None = Field(
        None, description="Where relative paths of a configuration start (default: remote_job_dir, or nemo_run_dir)"
    )
    node_group: str | None = Field(None, description="Dedicated node group, by name")
    node_reservation: str | None = Field(None, description="Reservation in it")
    resource_shape: str | None = Field(None, description="Machine: gpu.8xh100-80gb, cpu.small")
    shared_memory_size: int = Field(65536, ge=0, description="Shared memory in MiB")
    mounts: list[Mount] = Field(default_factory=list, description="Storage: {path, mount_path, from}")
    image_pull_secrets: list[str] = Field(default_factory=list, description="Secrets of the workspace that pull images")
    secret_vars: dict[str, str] = Field(
        default_factory=dict, description="Environment variable -> secret of the workspace"
    )
    pre_launch_commands: list[str] = Field(
        default_factory=list, description="Shell commands before everything else (NeMo-Run's word)"
    )
    custom_spec: dict[str, Any] = Field(default_factory=dict, description="Further fields of Lepton's own job")
    can_be_preempted: bool = Field(False, description="Whether jobs of higher priority may take the nodes")
    can_preempt: bool = Field(False, description="Whether this job may take nodes from jobs of lower priority")
    queue_priority: str | None = Field(None, description="Priority class: low-1000, mid-4000, high-7000")
    python: str = Field("python", description="Python in the image")
    head_resource_shape: str | None = Field(None, description="For Ray clusters; no step here uses one")
    ray_version: Text | None = Field(None, description="For Ray clusters; no step here uses one")
