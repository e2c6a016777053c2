"""A whole training run, from artifacts to artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steps import machine
from steps.artifacts.record import Record
from steps.config.peft import Peft
from steps.engine.adapters import base as adapters
from steps.engine.checkpoint import mapping, megatron
from steps.engine.data.batches import MicroBatch, Order
from steps.engine.data.shards import PackedSplit
from steps.engine.model.decoder import Decoder
from steps.engine.model.quantization import QuantizedWeight
from steps.engine.progress import Progress
from steps.engine.train import recompute
from steps.engine.train.bases import load_base
from steps.engine.train.compiling import compiled, pays
from steps.engine.train.distributed import World, world
from steps.engine.train.loop import Trainer, read_known
from steps.engine.train.loss import batch_loss
from steps.engine.train.optim import AdamW
from steps.engine.train.plan import Plan
from steps.engine.train.resume import find, too_far
from steps.engine.train.saving import Position, Saver, finished, place, restore, settled_before, source
from steps.engine.train.trained import Trained, WholeModel
from steps.errors import ArtifactError, ConfigError, Problem
from steps.shapes import targets
from steps.shapes.account import misfits
from steps.shapes.model_config import ModelConfig
from steps.shapes.run_config import model_config


@dataclass(frozen=True)
class Result:
    """What a run came to.

    facts: of the adapter's record: iteration, loss_first, loss_last, valid_loss_first, valid_loss_last, parameters (of
           the base), trainable_parameters, ….
    tokens_per_second: None when there was nothing left to train.
    peak_bytes: the most memory that this process had, on its GPU where it computes on one; None as above.
    """

    facts: Mapping[str, Any]
    tokens_per_second: float | None
    peak_bytes: int | None

    def told(self) -> dict[str, Any]:
        """What the person who started the run wants to read."""
        shown = {name: value for name, value in self.facts.items() if name in _REPORTED}
        measured = {"tokens_per_second": self.tokens_per_second, "peak_bytes": self.peak_bytes}
        return {**shown, **{name: value for name, value in measured.items() if value is not None}}


_REPORTED = (
    "iteration", "loss_first", "loss_last", "valid_loss_first", "valid_loss_last", "parameters", "trainable_parameters",
)  # fmt: skip


def finetune(plan: Plan, record: Record, progress: Progress) -> Result:
    """Train as `plan` says, into the checkpoint at checkpoint.save, going on from what is there.

    record: the artifact's record, with what is known before the start. Called on every process of a torchrun launch.
    Raises ConfigError, ArtifactError and StepFailed with the names of the step's manifest.
    """
    with world() as here, place(plan, is_main=here.is_main):
        here.barrier()
        if complete := finished(plan):
            progress.log(f"nothing to do: {plan.save_dir} has all {plan.train.train_iters} iterations of this run")
            return Result(complete.facts, None, None)
        base = megatron.Checkpoint.open(plan.base_dir)
        train_split, valid_split = (PackedSplit(plan.packed_dir, split) for split in ("train", "valid"))
        _check_sizes(plan, here, len(train_split))
        plan, _ = recompute.settled(plan, _shape(base), train_split, here, progress)
        found, position = source(plan), Position()
        trained, documents = _trained(plan, base, found, train_split, here, progress)
        optimizer = AdamW(trained, plan.optimizer, offload=plan.optimizer.offload and here.device.type != "cpu")
        if plan.optimizer.offload and here.device.type == "cpu":
            progress.log("optimizer.offload has no effect: on a CPU the optimizer's state is in its memory anyway")
        if found is not None:
            position = restore(found, plan, trained, optimizer)
        elif isinstance(trained, adapters.Adapters):
            _start(plan, trained, train_split, here)
        counts = _counts(trained)
        saver = Saver(plan, base, record, counts, documents)
        _announce(plan, trained, counts["trainable_parameters"], position, found, progress)

        def save(position: Position) -> None:
            if here.is_main:
                saver.save(position, trained, optimizer)
            here.barrier()

        here.barrier()  # every process has found and read what this one now clears away
        trainer = Trainer(plan, trained, optimizer, train_split, valid_split, here, progress)
        by_itself = _compiled_by_itself(plan, trained, position, train_split, here)
        with compiled(plan.train.compile, by_itself=by_itself, device=here.device, progress=progress):
            if here.is_main:
                saver.go_back(position, trained, optimizer)
            if position.iteration < plan.train.train_iters:
                trainer.run(position, save)
            elif found is not None and found.folder.parent != plan.save_dir:
                save(position)
        if here.is_main:
            saver.finish(position, trained)
            if told := trained.summary():
                progress.log(told)
        return Result(record.facts, trainer.tokens_per_second, _peak_bytes(here.device))


#: Optimizer steps of a probe, after one that is not counted: it makes caches, kernels and the optimizer's state.
_PROBED_STEPS = 2


@dataclass(frozen=True)
class Probed:
    """What a few optimizer steps came to.

    tokens_per_second: over all processes.   iterations: optimizer steps that are left of the run.
    peak_bytes, expected_bytes: of process 0 (of its GPU, where it computes on one), and what was estimated.
    """

    tokens_per_second: float
    seconds_per_step: float
    iterations: int
    peak_bytes: int
    expected_bytes: int


def probe(plan: Plan, progress: Progress) -> Probed:
    """Take the first steps of a run as it would take them, and measure. Nothing is written, nothing evaluated.

    A method that settles its settings by a search is taken with what it has before.
    """
    with world() as here:
        base = megatron.Checkpoint.open(plan.base_dir)
        train_split, valid_split = (PackedSplit(plan.packed_dir, split) for split in ("train", "valid"))
        _check_sizes(plan, here, len(train_split))
        found = find(plan)
        plan, estimate = recompute.settled(plan, _shape(base), train_split, here, progress)
        trained = _unsettled(plan, base, here.device, progress)
        optimizer = AdamW(trained, plan.optimizer, offload=plan.optimizer.offload and here.device.type != "cpu")
        if isinstance(trained, adapters.Adapters):
            _start(plan, trained, train_split, here)
        trainer = Trainer(plan, trained, optimizer, train_split, valid_split, here, progress)
        by_itself = _compiled_by_itself(plan, trained, Position(), train_split, here)
        with compiled(plan.train.compile, by_itself=by_itself, device=here.device, progress=progress):
            speed, seconds = trainer.probe(_PROBED_STEPS)
        return Probed(
            speed,
            seconds,
            max(0, plan.train.train_iters - (0 if found is None else found.iteration)),
            _peak_bytes(here.device),
            estimate.peak(recompute=plan.train.recompute_granularity == "full"),
        )


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else machine.peak_bytes()


def _trained(
    plan: Plan,
    base: megatron.Checkpoint,
    found: megatron.Checkpoint | None,
    split: PackedSplit,
    here: World,
    progress: Progress,
) -> tuple[Trained, Mapping[str, str]]:
    """What the run trains, as it is before its first step, and the documents of how its method settled."""
    if plan.peft is None:
        return _unsettled(plan, base, here.device, progress), {}
    method, documents = _method(plan, plan.peft, base, found, split, here, progress)
    return _model(plan, base, method, here.device, progress), documents


def _unsettled(plan: Plan, base: megatron.Checkpoint, device: torch.device, progress: Progress) -> Trained:
    """The model, or the adapters of a method with what it has before any search of its own."""
    if plan.peft is None:
        return WholeModel.of(_decoder(plan, base, device, progress))
    return _model(plan, base, adapters.create(plan.peft, _shape(base)), device, progress)


def _method(
    plan: Plan,
    section: Peft,
    base: megatron.Checkpoint,
    found: megatron.Checkpoint | None,
    split: PackedSplit,
    here: World,
    progress: Progress,
) -> tuple[adapters.Method[Any], Mapping[str, str]]:
    """The method with nothing left open (as asked, as `found` was trained, or as it settles now), and its documents."""
    shape = _shape(base)
    if problems := list(misfits(section, shape)):
        raise ConfigError(problems)
    method = adapters.create(section, shape)
    if not section.open:
        return method, {}
    if found is not None:
        settled = settled_before(found, plan, method)
    else:
        calibration = adapters.Calibration(
            decoder=lambda: _decoder(plan, base, here.device, progress),
            batches=lambda rows: _first(plan, split, rows, shape, here.device),
            loss=batch_loss,
            seed=plan.rng.seed,
            progress=progress,
        )
        settled = here.same(method.settle(calibration))
    return adapters.create(settled.section, shape), settled.documents


def _shape(base: megatron.Checkpoint) -> ModelConfig:
    return model_config(base.run_config, str(base.folder / megatron.RUN_CONFIG))


def _decoder(
    plan: Plan,
    base: megatron.Checkpoint,
    device: torch.device,
    progress: Progress,
    section: Peft | None = None,
) -> Decoder:
    """The base model, frozen; held as a section says, or as it is."""
    shape = _shape(base)
    try:
        return load_base(
            shape,
            mapping.unpadded(shape, base.tensors),
            progress,
            precision=plan.train.precision,
            device=device,
            section=section,
            recompute=plan.train.recompute_granularity == "full",
        )
    except ValueError as error:
        raise ArtifactError(Problem(where="checkpoint.pretrained_checkpoint", what=str(error))) from error


def _model(
    plan: Plan, base: megatron.Checkpoint, method: adapters.Method[Any], device: torch.device, progress: Progress
) -> adapters.Adapters:
    """The base model, held as the method's section says, with fresh adapters on the targets."""
    decoder = _decoder(plan, base, device, progress, method.section)
    if told := _held(decoder):
        progress.log(told)
    names = targets.chosen(method.section, decoder.config.num_layers)
    return adapters.attach(decoder, method, names, plan.rng.seed)


def _held(decoder: Decoder) -> str:
    """What a quantized base takes; '' for one that is not."""
    weights = [weight for weight in decoder.weights().values() if isinstance(weight, QuantizedWeight)]
    if not weights:
        return ""
    names = " and ".join(sorted({weight.code_name for weight in weights}))
    bytes_, numel = sum(weight.nbytes for weight in weights), sum(weight.shape.numel() for weight in weights)
    return f"base held in {names}: {bytes_ / 1e6:,.1f} MB, {bytes_ / numel / 2:.2f} of its bf16 size (embeddings apart)"


def _start(plan: Plan, trained: adapters.Adapters, split: PackedSplit, here: World) -> None:
    """The start of a fresh run: what the method wants to see of the data, and the same adapters on every process."""
    rows = trained.method.calibration_rows
    trained.method.start(trained, _first(plan, split, rows, trained.decoder.config, here.device))
    # Where the tensors live, not `trained.tensors()`: what stands for them in a checkpoint may be made on the spot.
    for module in (trained.shared, *trained.modules.values()):
        for tensor in () if module is None else module.state_dict().values():
            here.broadcast(tensor)


def _first(plan: Plan, split: PackedSplit, rows: int, shape: ModelConfig, device: torch.device) -> list[MicroBatch]:
    """The first rows that the run trains on, one a batch."""
    order = Order(len(split), plan.rng.seed)
    return [read_known(split, [order[row]], shape.vocab_size).to(device) for row in range(min(rows, len(split)))]


def _compiled_by_itself(plan: Plan, trained: Trained, position: Position, split: PackedSplit, here: World) -> bool:
    """What train.compile=auto comes to: as the run did so far, or as its length says."""
    if position.compiled is not None:
        return position.compiled
    row = plan.facts.get("pack_size") or len(split[0].input_ids)
    tokens = plan.train.train_iters * plan.train.global_batch_size * row // here.size
    return pays(trained.decoder.config.parameters, tokens, here.device)


def _check_sizes(plan: Plan, here: World, rows: int) -> None:
    train = plan.train
    if train.global_batch_size % (train.micro_batch_size * here.size):
        raise ConfigError(
            Problem(
                where="train.global_batch_size",
                what=f"{train.global_batch_size} is no multiple of micro_batch_size {train.micro_batch_size} times "
                f"{here.size} processes",
            )
        )
    if not rows:
        raise ArtifactError(Problem(where="dataset.nano3_packed_sft_dir", what="the train split has no rows"))


def _counts(trained: Trained) -> dict[str, int]:
    trainable = sum(value.numel() for value in trained.parameters().values())
    return {"parameters": trained.decoder.config.parameters, "trainable_parameters": trainable}


def _announce(
    plan: Plan,
    trained: Trained,
    trainable: int,
    position: Position,
    found: megatron.Checkpoint | None,
    progress: Progress,
) -> None:
    if problem := too_far(plan, position.iteration):
        raise ConfigError(problem)
    if found is None:
        dtype = str(trained.decoder.output_weight.dtype).removeprefix("torch.")
        if plan.peft is None or not isinstance(trained, adapters.Adapters):
            progress.log(f"the whole model: {trainable:,} trainable parameters, computed in {dtype}")
        else:
            progress.log(
                f"{plan.peft.type}: {trainable:,} trainable parameters on {len(trained.modules)} linears, "
                f"base computed in {dtype}"
            )
    else:
        progress.log(f"going on from {found.folder}, iteration {position.iteration} of {plan.train.train_iters}")
