"""The growing checkpoint of a run: saved whole, resumed to the same bits, finished with a digest.

Whatever moment a kill hits, the directory is either absent or a valid artifact whose `latest` names a whole iteration.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps.artifacts import record as records
from steps.artifacts.checkpoint import iterations
from steps.artifacts.record import Record
from steps.engine.adapters.base import Method, Settled
from steps.engine.checkpoint import convert, megatron
from steps.engine.checkpoint.fingerprint import fingerprint
from steps.engine.model import fusion
from steps.engine.train.optim import AdamW
from steps.engine.train.plan import Plan, differences, mismatches, other_precision
from steps.engine.train.resume import find
from steps.engine.train.trained import Trained
from steps.errors import ArtifactError


@dataclass
class Position:
    """How far a run has come; with the seed it determines the data order and every random number ahead.

    history:  numbers of the run that its end reports: loss_first, loss_last, valid_loss_first, valid_loss_last.
    compiled: whether it has been computed with compiled pieces so far; None before the start.
    """

    iteration: int = 0
    consumed_samples: int = 0
    history: dict[str, float] = field(default_factory=dict)
    compiled: bool | None = None


@contextmanager
def place(plan: Plan, *, is_main: bool) -> Iterator[None]:
    """Hold checkpoint.save for this run; clear away what a killed one left unfinished."""
    path = plan.save_dir
    with records.lock(path) if is_main else nullcontext():
        if is_main:
            records.check_replaceable(path, plan.produces)
            for old in path.glob(".iter_*.old"):  # killed while an iteration was saved a second time
                whole = path / old.name[1:].removesuffix(".old")
                shutil.rmtree(old) if whole.exists() else old.rename(whole)
            for rest in (_beside(path), *path.glob(".*.partial"), *path.glob(".*.tmp")):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)
        yield


def finished(plan: Plan) -> Record | None:
    """The record of checkpoint.save where this very run is already complete; None where there is something to do.

    Raises ArtifactError when what is there belongs to another run, or is complete and damaged.
    """
    known = records.read(plan.save_dir)
    if known is None or not known.facts.get("finished"):
        return None
    if plan.checkpoint.ckpt_step is not None and known.facts.get("rollback") != plan.rollback():
        return None
    if problems := list(mismatches(plan, known.facts, str(plan.save_dir))):
        raise ArtifactError(problems)
    if known.facts["iteration"] != plan.train.train_iters:
        return None
    if gone := records.missing_files(plan.save_dir, known):
        raise ArtifactError(
            f"{plan.save_dir} is complete, but {gone[0]} is missing or has another size",
            hint="Remove the directory to train again.",
            name="damaged_artifact",
        )
    return known


def source(plan: Plan) -> megatron.Checkpoint | None:
    """The checkpoint that `resume.find` finds, opened; None for a fresh start."""
    found = find(plan)
    return None if found is None else megatron.Checkpoint.open(found.folder)


def settled_before(checkpoint: megatron.Checkpoint, plan: Plan, method: Method[Any]) -> Settled:
    """What the method of a run settled on when the run began, as its checkpoint says; method: with it still open.

    Raises ArtifactError when the checkpoint belongs to another run.
    """
    where = checkpoint.folder.parent
    if problems := list(differences(plan.identity(), checkpoint.training_state()["identity"], str(where))):
        raise ArtifactError(problems)
    section = type(method.section).model_validate(checkpoint.run_config["adapter"])
    files = (where / name for name in method.documents)
    return Settled(section, {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()})


def restore(checkpoint: megatron.Checkpoint, plan: Plan, trained: Trained, optimizer: AdamW) -> Position:
    """Fill what is trained and the optimizer from a checkpoint. Raises ArtifactError when it belongs to another run."""
    state = checkpoint.training_state()
    where, dtype = str(checkpoint.folder.parent), _compute_dtype(trained)
    problems = list(differences(plan.identity(), state["identity"], where))
    if state["compute_dtype"] != dtype:
        problems.append(other_precision(dtype, state["compute_dtype"], where))
    if problems:
        raise ArtifactError(problems)
    try:
        trained.load({name: tensor.load() for name, tensor in checkpoint.tensors.items()})
        trained.load_memory(state.get("method", {}))
        optimizer.load(state["optimizer"])
    except ValueError as error:
        raise ArtifactError(f"{checkpoint.folder} does not fit: {error}") from error
    return Position(state["iteration"], state["consumed_samples"], dict(state["history"]), state.get("compiled"))


@dataclass
class Saver:
    """Writes iterations of one run.

    base:   the checkpoint whose run_config.yaml describes the model.
    counts: parameters and trainable_parameters, for the record.
    documents: what the method wrote when it settled, by file name.
    rollback: what `Plan.rollback` says, once checkpoint.save has been brought there.
    """

    plan: Plan
    base: megatron.Checkpoint
    record: Record
    counts: Mapping[str, int]
    documents: Mapping[str, str] = field(default_factory=dict)
    rollback: Mapping[str, Any] | None = None

    def go_back(self, position: Position, trained: Trained, optimizer: AdamW) -> None:
        """Make `position`, where the run goes on from, the end of what checkpoint.save holds; nothing else may mix.

        Only then does the record name the rollback: killed before, the same command goes back again; killed after, it
        goes on from what it has saved since.
        """
        home = self.plan.save_dir
        saved = iterations(home)
        if saved and position.iteration not in saved:  # it comes from checkpoint.load
            self.save(position, trained, optimizer)
        if saved and saved[-1] > position.iteration:
            self._unseal(position, trained)
            self.record.write(home)
            megatron.rewind(home, position.iteration)
        self.rollback = self.plan.rollback()

    def save(self, position: Position, trained: Trained, optimizer: AdamW) -> None:
        """Add `iter_NNNNNNN`; then the record knows of it."""
        home = self.plan.save_dir
        fresh = not home.exists() or not any(home.iterdir())
        directory = _beside(home) if fresh else home
        self._unseal(position, trained)
        if not fresh:
            self.record.write(directory)
        megatron.write(
            directory,
            trained.tensors(),
            num_layers=trained.decoder.config.num_layers,
            run_config=trained.run_config(self.base.run_config, self.plan.base_dir),
            iteration=position.iteration,
            consumed_samples=position.consumed_samples,
            training_state={
                "identity": self.plan.identity(),
                "compute_dtype": _compute_dtype(trained),
                "compiled": fusion.active(),
                "iteration": position.iteration,
                "consumed_samples": position.consumed_samples,
                "history": position.history,
                "method": {name: tensor.detach() for name, tensor in trained.memory().items()},
                "optimizer": optimizer.state(),
            },
            beside=self._beside,
        )
        if fresh:
            for name, text in self.documents.items():
                records.write_text(directory / name, text)
            self.record.write(directory)
            if home.exists():
                home.rmdir()
            directory.rename(home)

    def _unseal(self, position: Position, trained: Trained) -> None:
        # An older digest would call the files that come now damage.
        self.record.digest, self.record.files = "", {}
        self.record.facts.update(self._facts(position, trained, finished=False))

    def finish(self, position: Position, trained: Trained) -> None:
        """Seal the artifact: digest and sizes of all files, so that damage is noticed from now on."""
        home = self.plan.save_dir
        self.record.facts.update(self._facts(position, trained, finished=True))
        if self.plan.peft is None:
            model = convert.megatron_source(home)
            found = convert.converted(model.config, model.tensors, fingerprint(model.tensors))
            self.record.facts.update({**found.facts(), "compute_dtype": _compute_dtype(trained)})
        self.record.digest, self.record.files = records.digest_files(home)
        self.record.write(home)

    def _facts(self, position: Position, trained: Trained, *, finished: bool) -> dict[str, Any]:
        return {
            **self.plan.record_facts(), **trained.report(), "iteration": position.iteration, "finished": finished,
            **position.history, **self.counts, "identity": self.plan.identity(),
            "compute_dtype": _compute_dtype(trained), **({"rollback": self.rollback} if self.rollback else {}),
        }  # fmt: skip

    def _beside(self, folder: Path) -> None:
        """A model takes along what the base has beside its weights: tokenizer and Hugging Face's own files."""
        if self.plan.peft is None:
            for name in ("tokenizer", "hf"):
                if (self.base.folder / name).is_dir():
                    shutil.copytree(self.base.folder / name, folder / name)


def _compute_dtype(trained: Trained) -> str:
    return str(trained.decoder.output_weight.dtype).removeprefix("torch.")


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.partial"
