"""The sections that training steps share, in Megatron-Bridge's names.

Defaults are Megatron-Bridge's where it has one, so that a user's knowledge carries over.
"""

from typing import Literal

from pydantic import Field

from steps.config.base import Section

Precision = Literal["auto", "float32", "bfloat16"]


class Recipe(Section):
    """The model recipe and its parallel sizes."""

    target: str | None = Field(
        None, alias="_target_", description="Megatron-Bridge recipe function (engine megatron_bridge)"
    )
    seq_length: int | None = Field(None, ge=2, description="Tokens in a row; must equal pack_size of the data")
    tensor_model_parallel_size: int = Field(1, ge=1, description="Tensor parallel size")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="Pipeline parallel size")
    context_parallel_size: int = Field(1, ge=1, description="Context parallel size")
    expert_model_parallel_size: int = Field(1, ge=1, description="Expert parallel size")
    sequence_parallel: bool = Field(False, description="Sequence parallelism (with tensor parallelism)")


class Dataset(Section):
    """The packed data."""

    nano3_packed_sft_dir: str = Field(description="The packed_parquet directory")
    num_workers: int = Field(0, ge=0, description="Loader processes (engine megatron_bridge)")


class Train(Section):
    """How long and in which batches. A sample is one packed row."""

    train_iters: int = Field(ge=1, description="Optimizer steps")
    global_batch_size: int = Field(ge=1, description="Packed rows in one optimizer step, over all processes")
    micro_batch_size: int = Field(1, ge=1, description="Packed rows in one forward pass of one process")
    eval_interval: int = Field(1000, ge=0, description="Optimizer steps between evaluations (0: only at the end)")
    eval_iters: int = Field(10, ge=0, description="Global batches of one evaluation (0: none)")
    log_interval: int = Field(10, ge=1, description="Optimizer steps between log lines")
    precision: Precision = Field(
        "auto",
        description="Dtype the base computes in; auto: bfloat16 where the base is stored so and the hardware is fast",
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Compile chains of elementwise operations with torch.compile (engine torch); auto: in runs so long "
        "that it pays, where there is a compiler",
    )
    recompute_granularity: Literal["auto", "full"] | None = Field(
        "auto",
        description="full: keep only each layer's input for the backward pass and compute the rest again; auto: full "
        "where the expected memory is not there without it (engine torch)",
    )


class Optimizer(Section):
    """AdamW."""

    lr: float = Field(1e-4, gt=0, description="Peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay (matrices only)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment decay")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second moment decay")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_grad: float = Field(1.0, ge=0, description="Global gradient norm is clipped to this (0: never)")
    offload: bool = Field(
        False, description="Keep Adam's moments in CPU memory and make the update there (no effect without a GPU)"
    )


class Scheduler(Section):
    """The learning rate over the optimizer steps."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = Field("cosine", description="Shape of the decay")
    lr_warmup_iters: int = Field(0, ge=0, description="Optimizer steps of linear warmup from 0")
    lr_decay_iters: int | None = Field(None, ge=1, description="Optimizer steps until min_lr (default: train_iters)")


class Checkpoint(Section):
    """What is loaded and saved."""

    pretrained_checkpoint: str = Field(description="The base model, a checkpoint_megatron")
    save: str = Field(description="Where the trained checkpoint goes")
    load: str | None = Field(None, description="A checkpoint to resume from (default: `save`, if it holds one)")
    save_interval: int = Field(50, ge=1, description="Optimizer steps between saves")
    ckpt_step: int | None = Field(None, ge=0, description="Resume from this iteration instead of the latest")


class Logger(Section):
    """Where numbers go besides metrics.jsonl, which is always written."""

    tensorboard_dir: str | None = Field(None, description="Write TensorBoard events here")
    wandb_project: str | None = Field(None, description="Log to this Weights & Biases project")
    wandb_exp_name: str | None = Field(None, description="Name of the W&B run")


class Rng(Section):
    """Randomness."""

    seed: int = Field(1234, ge=0, description="Seed of an adapter's init, the data order and dropout")
