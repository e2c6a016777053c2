"""The configuration that training steps share, in Megatron-Bridge's names. Free of torch.

A step's Config subclasses it; whether it has a section `peft` decides whether adapters are trained or the model itself.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from steps import machine
from steps.artifacts import bases, record
from steps.artifacts.opening import Artifact
from steps.config import training
from steps.config.base import StepConfig, lookup, section
from steps.config.peft import Peft
from steps.engine.train import resume
from steps.engine.train.plan import Plan, mismatches
from steps.errors import ArtifactError, Problem
from steps.shapes.account import Account, misfits
from steps.shapes.estimate import Batch
from steps.shapes.model_config import ModelConfig

BASE, DATA = "checkpoint.pretrained_checkpoint", "dataset.nano3_packed_sft_dir"
PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


class TrainingConfig(StepConfig):
    """One training run over packed data."""

    recipe: training.Recipe = Field(description="Model recipe and parallel sizes")
    dataset: training.Dataset = Field(description="The packed data")
    train: training.Train = Field(description="How long and in which batches")
    optimizer: training.Optimizer = section("AdamW")
    scheduler: training.Scheduler = section("Learning rate")
    checkpoint: training.Checkpoint = Field(description="What is loaded and saved")
    logger: training.Logger = section("Where numbers go")
    rng: training.Rng = section("Randomness")

    @property
    def adapter(self) -> Peft | None:
        """The adapter method; None where the model itself is trained."""
        found = getattr(self, "peft", None)
        return found if isinstance(found, Peft) else None

    @property
    def chosen_engine(self) -> str:
        """Who trains: torch, megatron_bridge, or auto where only the machine of the job can tell."""
        return "torch"

    @property
    def elsewhere(self) -> bool:
        """Whether the job runs on another machine than this one."""
        return lookup(self, "run.env.executor") not in (None, "local")

    def check_values(self) -> Iterator[Problem]:
        scheduler, train, optimizer = self.scheduler, self.train, self.optimizer
        decay = scheduler.lr_decay_iters or train.train_iters
        if scheduler.lr_warmup_iters >= decay:
            yield Problem(
                where="scheduler.lr_warmup_iters", what=f"{scheduler.lr_warmup_iters} leaves no step to decay in",
                allowed=f"below {'lr_decay_iters' if scheduler.lr_decay_iters else 'train_iters'} ({decay})",
            )  # fmt: skip
        if optimizer.min_lr > optimizer.lr:
            what = f"{optimizer.min_lr} is above optimizer.lr ({optimizer.lr})"
            yield Problem(where="optimizer.min_lr", what=what)

    #: What to do about a parallel size above 1.
    more_than_one_part: ClassVar[str] = "Start more processes instead (run.env.nprocs_per_node): data parallel."

    def check_torch(self) -> Iterator[Problem]:
        """What the torch engine cannot do, or not with these sizes."""
        for name in PARALLEL:
            if (size := getattr(self.recipe, name)) > 1:
                yield Problem(
                    where=f"recipe.{name}", what=f"{size} needs the engine megatron_bridge",
                    allowed="1", hint=self.more_than_one_part,
                )  # fmt: skip
        env, train = self.run.env, self.train
        processes = env.processes * (env.nodes or 1)
        if train.global_batch_size % (train.micro_batch_size * processes):
            of = f" times {processes} processes" if processes > 1 else ""
            what = f"{train.global_batch_size} is no multiple of micro_batch_size ({train.micro_batch_size}){of}"
            yield Problem(where="train.global_batch_size", what=what)

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterator[Problem]:
        length, size = self.recipe.seq_length, inputs[DATA].facts.get("pack_size")
        if length is not None and size is not None and length != size:
            yield Problem(
                where="recipe.seq_length", what=f"{length} is not the pack_size of the data, {size}",
                name="seq_length_mismatch", hint=f"Set recipe.seq_length={size}, or pack with pack_size {length}.",
            )  # fmt: skip
        if bases.disagree(inputs[BASE], inputs[DATA], "tokenizer_digest"):
            yield Problem(
                where=DATA, what="the data were packed with another tokenizer than the base model has",
                name="tokenizer_mismatch", hint="Pack them again with the base model's tokenizer.",
            )  # fmt: skip
        if self.adapter is not None and (model := shape_of(inputs)) is not None:
            yield from misfits(self.adapter, model)
        yield from self._check_destination(inputs)

    def _check_destination(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """What is at checkpoint.save already must be of this same run, or nothing."""
        save = Path(self.checkpoint.save).expanduser()
        try:
            record.check_replaceable(save, self.produces)
            known = record.read(save)
        except ArtifactError as error:
            return [Problem(where="checkpoint.save", what=str(error))]
        if self.chosen_engine != "torch":
            return []
        plan = self.plan(inputs)
        ours = known is not None and ("identity" in known.facts or self.adapter is None)
        theirs = known.facts if known is not None and ours else None
        if theirs is not None and (problems := list(mismatches(plan, theirs, str(save)))):
            return problems
        try:
            found = resume.find(plan)
        except ArtifactError as error:
            return error.problems
        problem = None if found is None else resume.too_far(plan, found.iteration)
        return [] if problem is None else [problem]

    @property
    def produces(self) -> str:
        """The type of checkpoint that the run writes."""
        return "checkpoint_megatron" if self.adapter is None else "checkpoint_lora"

    def accounts(self, inputs: Mapping[str, Artifact]) -> Mapping[str, Account]:
        account = self.account(inputs)
        return {} if account is None else {"": account}

    def account(self, inputs: Mapping[str, Artifact]) -> Account | None:
        """What the run comes to, or None."""
        model, adapter = shape_of(inputs), self.adapter
        if model is None or (adapter is not None and any(misfits(adapter, model))):
            return None
        train, env = self.train, self.run.env
        length = self.recipe.seq_length or inputs[DATA].facts.get("pack_size") if DATA in inputs else None
        available = None if self.elsewhere or machine.has_gpu() else machine.available_bytes()
        return Account.of(
            adapter,
            model,
            # What Megatron-Bridge holds depends on its own settings, and on how it divides the model.
            train.precision if self.chosen_engine == "torch" else None,
            None if length is None else Batch(length, train.micro_batch_size),
            asked=train.recompute_granularity,
            available=None if available is None else available // env.processes,
            rows_per_step=train.global_batch_size,
        )

    def unprobed(self) -> str:
        return ""

    def launch_here(self) -> Iterator[Problem]:
        for key, package in (("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")):
            if getattr(self.logger, key) and not installed(package):
                what, hint = f"the package {package} is not installed", f"pip install {package}"
                yield Problem(where=f"logger.{key}", what=what, hint=hint, name="logger_package_missing")

    def path_keys(self) -> tuple[str, ...]:
        return ("checkpoint.load", "logger.tensorboard_dir")

    def plan(self, inputs: Mapping[str, Artifact]) -> Plan:
        """What the torch engine is told."""
        base, data = inputs[BASE], inputs[DATA]
        facts = {
            name: data.facts[name]
            for name in ("tokenizer_digest", "chat_template_digest", "pack_size")
            if name in data.facts
        }
        if "base_fingerprint" in base.facts:
            facts["base_fingerprint"] = base.facts["base_fingerprint"]
        if data.record is not None and data.record.digest:
            facts["data_digest"] = data.record.digest
        return Plan(
            packed_dir=data.path or Path(data.value),
            base_dir=base.path or Path(base.value),
            train=self.train,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            peft=self.adapter,
            checkpoint=self.checkpoint,
            rng=self.rng,
            facts=facts,
        )


def shape_of(inputs: Mapping[str, Artifact]) -> ModelConfig | None:
    """The base's shape, where its record tells it."""
    model = inputs[BASE].facts.get("model") if BASE in inputs else None
    return ModelConfig(**model) if model and "num_layers" in model else None


def installed(package: str) -> bool:
    """Whether a package can be imported. A mere folder of its name (W&B writes its runs to ./wandb) is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
