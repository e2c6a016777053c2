"""Variants of a common training configuration, as configurations of ordinary training steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from steps.config import dotlist
from steps.config.base import of_its_kind, section
from steps.config.peft import Peft
from steps.config.training import Optimizer
from steps.config.validate import keys, validate
from steps.engine.train.settings import TrainingConfig
from steps.errors import ConfigError, Problem, UsageError

ADAPTERS, WHOLE = "peft/megatron_bridge", "sft/megatron_bridge"
_DEFAULT_LR: float = Optimizer.model_fields["lr"].default
#: Keys that the comparison itself decides.
_OURS = ("rng.seed", "checkpoint.save", "checkpoint.load", "checkpoint.ckpt_step", "run")


class _Torch(TrainingConfig):
    engine: Literal["torch"] = Field("torch", description="Who trains")

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        if self.adapter is not None:
            yield from self.adapter.check(self.train.train_iters)
        yield from self.check_torch()


class WholeRun(_Torch):
    """One run that trains the model itself."""


class AdapterRun(_Torch):
    """One run of an adapter method."""

    peft: of_its_kind(Peft) = section("The adapter method")  # type: ignore[valid-type]


@dataclass(frozen=True)
class Trial:
    """One training run: a variant, at one learning rate, from one seed.

    config: of the step.   directory: its own, named by everything that decides its result.
    """

    variant: str
    lr: float
    seed: int
    step: str
    config: Mapping[str, Any]
    directory: Path

    @property
    def checkpoint(self) -> Path:
        """Where it saves."""
        return self.directory / "checkpoint"


@dataclass(frozen=True)
class Variant:
    """What is compared. settings: a dotlist over the common configuration; lrs: the learning rates that are tried."""

    name: str
    settings: Sequence[str]
    lrs: Sequence[float]

    def trial(
        self, common: Mapping[str, Any], lr: float | None, seed: int, runs: Path, made_of: Sequence[str] = ()
    ) -> Trial:
        """Its run. Raises ConfigError.

        common:  sections of a training step.   runs: where all runs go.
        made_of: digests of base and data: a run on what was made anew at the same path is another one.
        """
        data = _applied(common, self.settings)
        if lr is not None:
            data.setdefault("optimizer", {})["lr"] = lr
        step = ADAPTERS if "peft" in data else WHOLE
        data["rng"] = {**data.get("rng", {}), "seed": seed}
        # Whatever decides the result is in the directory's name: other settings never go on from what they find.
        decides = {name: value for name, value in data.items() if name != "checkpoint"}
        decides["base"] = data["checkpoint"]["pretrained_checkpoint"]
        decided = json.dumps([step, decides, *made_of], sort_keys=True, default=str)
        digest = hashlib.sha256(decided.encode()).hexdigest()
        used = data.get("optimizer", {}).get("lr", _DEFAULT_LR)
        lr = float(used) if isinstance(used, int | float) else _DEFAULT_LR  # `typed` refuses anything else
        directory = runs / self.name / f"lr-{lr:g}-seed-{seed}-{digest[:8]}"
        data["checkpoint"] = {**data["checkpoint"], "save": str(directory / "checkpoint")}
        return Trial(self.name, lr, seed, step, data, directory)


def typed(trial: Trial) -> TrainingConfig:
    """The run's configuration, checked. Raises ConfigError."""
    kind: type[_Torch] = AdapterRun if trial.step == ADAPTERS else WholeRun
    return validate(kind, trial.config)[0]


def _applied(common: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The common sections with a variant's settings in them. `peft=null` takes the adapter away. Raises ConfigError."""
    data: dict[str, Any] = json.loads(json.dumps(common))
    try:
        overrides = dotlist.parse(settings)
    except UsageError as error:
        raise ConfigError(error.problems) from error
    if ours := [one.dotted for one in overrides if _decided(one.dotted)]:
        hint = "Use seeds, checkpoint.save or profile."
        raise ConfigError([Problem(key, "is decided by the comparison", hint=hint) for key in ours])
    dotlist.apply(data, {}, overrides)
    given = {one.dotted for one in overrides}
    peft = data.get("peft", {})
    if peft is None:
        del data["peft"]
    elif isinstance(peft, Mapping) and "peft.type" in given:
        # What the common section says for another method is not for this one.
        known = keys(Peft.variant(peft))
        data["peft"] = {name: value for name, value in peft.items() if name in known or f"peft.{name}" in given}
    return data


def _decided(key: str) -> bool:
    """Whether a key is, lies in, or holds one that the comparison itself decides."""
    return any(f"{one}.".startswith(f"{other}.") for name in _OURS for one, other in ((key, name), (name, key)))


def check(
    variants: Sequence[Variant], common: Mapping[str, Any], seeds: Sequence[int], runs: Path
) -> Iterator[Problem]:
    """Everything that is wrong with the variants' configurations, each told with the variant's name."""
    for number, variant in enumerate(variants):
        told: set[str] = set()
        for lr in variant.lrs or (None,):
            try:
                typed(variant.trial(common, lr, seeds[0], runs))
            except ConfigError as error:
                for problem in error.problems:
                    if problem.what not in told:
                        told.add(problem.what)
                        yield replace(problem, where=f"variants.{number} ({variant.name}): {problem.where}", source="")
