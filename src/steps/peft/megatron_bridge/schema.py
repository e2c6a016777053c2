"""The configuration of peft/megatron_bridge, in Megatron-Bridge's names."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from steps import machine
from steps.artifacts import record
from steps.artifacts.opening import Artifact
from steps.config import training
from steps.config.base import Adopted, Section, StepConfig, of_its_kind, section
from steps.config.peft import Peft
from steps.config.validate import keys
from steps.engine.train import resume
from steps.engine.train.plan import Plan, mismatches
from steps.errors import ArtifactError, Problem
from steps.preflight import lookup
from steps.shapes import targets
from steps.shapes.account import Account, misfits
from steps.shapes.estimate import Batch
from steps.shapes.model_config import ModelConfig

BASE, DATA = "checkpoint.pretrained_checkpoint", "dataset.nano3_packed_sft_dir"
_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


class Config(StepConfig):
    """One fine-tuning run of adapters on a frozen base."""

    engine: Literal["auto", "torch", "megatron_bridge"] = Field(
        "auto", description="auto: megatron_bridge where it is installed or recipe asks for parallelism, else torch"
    )
    recipe: training.Recipe = Field(description="Model recipe and parallel sizes")
    dataset: training.Dataset = Field(description="The packed data")
    train: training.Train = Field(description="How long and in which batches")
    optimizer: training.Optimizer = section("AdamW")
    scheduler: training.Scheduler = section("Learning rate")
    peft: of_its_kind(Peft) = section("The adapter method")  # type: ignore[valid-type]
    checkpoint: training.Checkpoint = Field(description="What is loaded and saved")
    logger: training.Logger = section("Where numbers go")
    rng: training.Rng = section("Randomness")

    # Megatron-Bridge's ConfigContainer has more sections and more keys in each than are typed here.
    open_sections: ClassVar[frozenset[str]] = frozenset(
        ("recipe", "dataset", "train", "optimizer", "scheduler", "peft", "checkpoint", "logger", "rng")
    )

    @classmethod
    def adopt(cls, data: Mapping[str, Any], sources: Mapping[str, str]) -> Adopted:
        """NeMo-RL's `policy` and Megatron-Bridge's `peft._target_` as our `peft` section, and none of another method's
        settings where a stronger layer chose the method."""
        adopted, peft = Adopted(data, sources), data.get("peft")
        if "policy" in data or (isinstance(peft, Mapping) and "_target_" in peft):
            from steps.config import foreign, nemo_rl

            readings = [foreign.bridge_target(data, sources), nemo_rl.read(data, sources)]
            adopted = foreign.adopt(data, sources, readings)
        peft = adopted.data.get("peft")
        if isinstance(peft, Mapping) and not peft.keys() <= keys(Peft.variant(peft)).keys():
            from steps.config import foreign

            adopted = foreign.outgrown(adopted, "peft", Peft)
        return adopted

    @property
    def chosen_engine(self) -> str:
        """`engine` with auto decided for this machine: Megatron-Bridge where it is installed or only it can do it.

        For a job that will run on another machine, auto stays auto where only looking there would tell.
        """
        if self.engine != "auto":
            return self.engine
        if _parallel(getattr(self, "recipe", None)):
            return "megatron_bridge"
        if self._elsewhere:
            return "auto"
        return "megatron_bridge" if bridge_installed() else "torch"

    @property
    def _elsewhere(self) -> bool:
        return lookup(self, "run.env.executor") not in (None, "local")

    def accepts_unknown(self, key: str) -> str:
        section, _, rest = key.partition(".")
        open_here = section in self.open_sections if rest else section not in type(self).model_fields
        if section == "run" or not open_here:
            return ""
        told = {"megatron_bridge": "", "auto": ", where it is installed"}
        return "passed to Megatron-Bridge" + told[self.chosen_engine] if self.chosen_engine in told else ""

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
        yield from self.peft.check(train.train_iters)
        yield from targets.other_words(self.peft)
        if self.chosen_engine == "torch":
            yield from self._check_torch()
        elif self.chosen_engine == "megatron_bridge":
            yield from self.peft.only_torch()
            yield from self._check_parts()
            if self.recipe.target is None:
                what, hint = (
                    "is required by the engine megatron_bridge",
                    "Name a recipe function, or choose engine=torch.",
                )
                yield Problem(where="recipe._target_", what=what, hint=hint)

    def _check_torch(self) -> Iterator[Problem]:
        for name in _PARALLEL:
            if (size := getattr(self.recipe, name)) > 1:
                yield Problem(
                    where=f"recipe.{name}", what=f"{size} needs the engine megatron_bridge",
                    allowed="1", hint="Set engine=megatron_bridge, or start more processes (run.env.nprocs_per_node).",
                )  # fmt: skip
        env, train = self.run.env, self.train
        processes = env.processes * (env.nodes or 1)
        if train.global_batch_size % (train.micro_batch_size * processes):
            of = f" times {processes} processes" if processes > 1 else ""
            what = f"{train.global_batch_size} is no multiple of micro_batch_size ({train.micro_batch_size}){of}"
            yield Problem(where="train.global_batch_size", what=what)

    def _check_parts(self) -> Iterator[Problem]:
        for pattern, missing in targets.halves(self.peft.targets_asked) if self.peft.canonical else ():
            what = f"Megatron-Bridge cannot save an adapter on {pattern!r} without one on {missing}"
            hint = "Name them all, or train with engine=torch."
            yield Problem(where="peft.target_modules", what=what, hint=hint)

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterator[Problem]:
        base, data = inputs[BASE].facts, inputs[DATA].facts
        length, size = self.recipe.seq_length, data.get("pack_size")
        if length is not None and size is not None and length != size:
            yield Problem(
                where="recipe.seq_length", what=f"{length} is not the pack_size of the data, {size}",
                name="seq_length_mismatch", hint=f"Set recipe.seq_length={size}, or pack with pack_size {length}.",
            )  # fmt: skip
        if _differ(base, data, "tokenizer_digest"):
            yield Problem(
                where=DATA, what="the data were packed with another tokenizer than the base model has",
                name="tokenizer_mismatch", hint="Pack them again with the base model's tokenizer.",
            )  # fmt: skip
        if (model := _shape(inputs)) is not None:
            yield from misfits(self.peft, model)
        yield from self._check_destination(inputs)

    def _check_destination(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """What is at checkpoint.save already must be of this same run, or nothing."""
        save = Path(self.checkpoint.save).expanduser()
        try:
            record.check_replaceable(save, "checkpoint_lora")
            known = record.read(save)
        except ArtifactError as error:
            return [Problem(where="checkpoint.save", what=str(error))]
        if self.chosen_engine != "torch":
            return []
        plan = self.plan(inputs)
        theirs = known.facts if known is not None and "identity" in known.facts else None
        if theirs is not None and (problems := list(mismatches(plan, theirs, str(save)))):
            return problems
        try:
            found = resume.find(plan)
        except ArtifactError as error:
            return error.problems
        problem = None if found is None else resume.too_far(plan, found.iteration)
        return [] if problem is None else [problem]

    def account(self, inputs: Mapping[str, Artifact]) -> Account | None:
        if (model := _shape(inputs)) is None or any(misfits(self.peft, model)):
            return None
        train, env = self.train, self.run.env
        length = self.recipe.seq_length or inputs[DATA].facts.get("pack_size") if DATA in inputs else None
        available = None if self._elsewhere or machine.has_gpu() else machine.available_bytes()
        return Account.of(
            self.peft,
            model,
            # What Megatron-Bridge holds depends on its own settings, and on how it divides the model.
            train.precision if self.chosen_engine == "torch" else None,
            None if length is None else Batch(length, train.micro_batch_size),
            asked=train.recompute_granularity,
            available=None if available is None else available // env.processes,
            rows_per_step=train.global_batch_size,
        )

    def unprobed(self) -> str:
        if self.chosen_engine == "torch":
            return ""
        return "Megatron-Bridge trains, which takes no single steps for us (engine=torch does)"

    def launch_here(self) -> Iterator[Problem]:
        for key, package in (("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")):
            if getattr(self.logger, key) and not _installed(package):
                what, hint = f"the package {package} is not installed", f"pip install {package}"
                yield Problem(where=f"logger.{key}", what=what, hint=hint, name="logger_package_missing")
        if self.chosen_engine == "megatron_bridge":
            from steps.engine.megatron_bridge import missing_packages

            yield from missing_packages()

    def wants_torchrun(self) -> bool:
        # Megatron-Bridge joins a process group even when it is alone.
        return self.chosen_engine != "torch"

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
            peft=self.peft,
            checkpoint=self.checkpoint,
            rng=self.rng,
            facts=facts,
        )


def _shape(inputs: Mapping[str, Artifact]) -> ModelConfig | None:
    """The base's shape, where its record tells it."""
    model = inputs[BASE].facts.get("model") if BASE in inputs else None
    return ModelConfig(**model) if model and "num_layers" in model else None


def _parallel(recipe: object) -> bool:
    """Whether a recipe section asks for model parallelism. It may be a plain mapping with any values: `validate` asks
    for the engine also where other keys of the configuration are wrong."""
    section = recipe if isinstance(recipe, Mapping) else vars(recipe) if isinstance(recipe, Section) else {}
    sizes = (section.get(name) for name in _PARALLEL)
    return any(isinstance(size, int) and size > 1 for size in sizes)


def _installed(package: str) -> bool:
    """Whether a package can be imported. A mere folder of its name (W&B writes its runs to ./wandb) is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def bridge_installed() -> bool:
    """Whether Megatron-Bridge can be imported here. Nothing of it is."""
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:  # not even the package megatron
        return False


def _differ(one: Mapping[str, object], other: Mapping[str, object], fact: str) -> bool:
    """Whether both know a fact and do not agree on it."""
    return fact in one and fact in other and one[fact] != other[fact]
