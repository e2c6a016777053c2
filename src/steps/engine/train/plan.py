"""What a training run is told, and which of it decides whether two runs are the same one. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps.config.peft import Peft
from steps.config.training import Checkpoint, Optimizer, Rng, Scheduler, Train
from steps.errors import Problem


@dataclass(frozen=True)
class Plan:
    """One training run.

    packed_dir, base_dir: the packed_parquet and the checkpoint_megatron.
    peft: the adapter method; None to train the model itself.
    facts: what is known of these two and belongs into the adapter's record: base_fingerprint, tokenizer_digest,
           chat_template_digest, pack_size, data_digest. Absent where an input has no record.
    """

    packed_dir: Path
    base_dir: Path
    train: Train
    optimizer: Optimizer
    scheduler: Scheduler
    peft: Peft | None
    checkpoint: Checkpoint
    rng: Rng
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def save_dir(self) -> Path:
        """Where the checkpoint grows."""
        return Path(self.checkpoint.save).expanduser()

    @property
    def produces(self) -> str:
        """The type of that checkpoint."""
        return "checkpoint_megatron" if self.peft is None else "checkpoint_lora"

    def record_facts(self) -> dict[str, Any]:
        """Of `facts`, what the record of the trained checkpoint holds."""
        kept = {name: value for name, value in self.facts.items() if name != "data_digest"}
        if self.peft is None:
            # base_fingerprint names a model's own weights, which change from save to save.
            kept["trained_from"] = kept.pop("base_fingerprint", None)
        return kept

    def identity(self) -> dict[str, Any]:
        """By dotted key, everything that a run may not change when it goes on from a checkpoint.

        Not in it: train_iters (a run may go on longer), what only splits, places or repeats the same work (micro
        batches, processes, offload, recomputation), and how often it is evaluated, logged and saved. The dtype it
        computes in may not change either, but is known only where it runs: `mismatches` and `saving.restore` look at
        it.
        """
        sections: dict[str, dict[str, Any]] = {
            "peft": {} if self.peft is None else self.peft.model_dump(),
            "optimizer": self.optimizer.model_dump(exclude={"offload"}),
            "scheduler": self.scheduler.model_dump(),
            "rng": self.rng.model_dump(),
            "train": self.train.model_dump(include={"global_batch_size"}),
        }
        keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        base = self.facts.get("base_fingerprint") or str(self.base_dir.resolve())
        data = self.facts.get("data_digest") or str(self.packed_dir.resolve())
        return {"checkpoint.pretrained_checkpoint": base, "dataset.nano3_packed_sft_dir": data, **keys}

    def rollback(self) -> dict[str, Any] | None:
        """What a run that goes back is known by in the record: the same again goes on; None for one that does not."""
        checkpoint = self.checkpoint
        if checkpoint.ckpt_step is None:
            return None
        return {"ckpt_step": checkpoint.ckpt_step, "load": checkpoint.load, "train_iters": self.train.train_iters}


def mismatches(plan: Plan, facts: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """What keeps `plan` from going on in the artifact at `where`, whose record has these facts."""
    if plan.peft is None and "identity" not in facts:
        what = f"{where} holds a model that no run of this step has trained; it is not changed"
        yield Problem("checkpoint.save", what, hint="Choose another checkpoint.save.", name="run_mismatch")
        return
    yield from differences(plan.identity(), facts.get("identity", {}), where)
    asked, computed = plan.train.precision, facts.get("compute_dtype")
    if asked != "auto" and computed is not None and asked != computed:
        yield other_precision(asked, computed, where)


def other_precision(mine: str, theirs: str, where: str) -> Problem:
    """The fault of going on in another dtype than the run has computed in so far."""
    return Problem(
        where="train.precision", what=f"the base is computed in {mine}, but for the checkpoint at {where} in {theirs}",
        name="run_mismatch", hint=f"Set train.precision={theirs} to go on, or choose another checkpoint.save.",
    )  # fmt: skip


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """What keeps a run with identity `mine` from going on with the checkpoint at `where`, of identity `theirs`."""
    for key in dict.fromkeys([*mine, *theirs]):
        new, old = mine.get(key), theirs.get(key)
        if new == old:
            continue
        artifact = key in ("checkpoint.pretrained_checkpoint", "dataset.nano3_packed_sft_dir")
        what = "is not what" if artifact else f"is {new!r}, but"
        trained = "was trained with" if artifact else f"was trained with {old!r}"
        yield Problem(
            where=key, what=f"{what} the checkpoint at {where} {trained}", name="run_mismatch",
            hint="Choose another checkpoint.save for a new run, or put the value back to go on with the old one.",
        )  # fmt: skip
