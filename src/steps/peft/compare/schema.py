"""Configuration of peft/compare: that of a training step, and the variants of it that are compared."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from steps import machine
from steps.artifacts import record
from steps.artifacts.opening import Artifact
from steps.config.base import Section, of_its_kind, section
from steps.config.peft import Peft
from steps.engine.comparison.variants import Variant as Compared
from steps.engine.comparison.variants import check, typed
from steps.engine.train.settings import BASE, DATA, TrainingConfig, installed, shape_of
from steps.errors import ArtifactError, ConfigError, Problem
from steps.shapes.account import Account, misfits

__all__ = ["BASE", "DATA", "Config"]

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
#: Sections of a training step that all variants share.
_COMMON = ("recipe", "dataset", "train", "optimizer", "scheduler", "peft", "checkpoint", "rng")


class Variant(Section):
    """What is compared."""

    # A typing error here would silently compare the wrong thing.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    name: str = Field(description="Its name in tables, plots and directories")
    set: list[str] = Field(
        [], description="Dotlist over the common settings (key=value, ~key); peft=null trains the whole model"
    )
    lr: list[float] | None = Field(None, description="Learning rates that are tried (default: lr_grid)")


class Classification(Section):
    """eval/classify of every trained model."""

    examples_path: str = Field(description="Chat data whose last assistant message is the right label")
    labels: list[str] | None = Field(None, description="The label words (default: all that the data have)")
    max_examples: int | None = Field(None, ge=1, description="Score at most this many")
    batch_size: int = Field(16, ge=1, description="Examples scored at a time")


class Config(TrainingConfig):
    """One base, one data set, and what is compared on them."""

    engine: Literal["torch"] = Field("torch", description="Who trains: the built-in torch engine")
    peft: of_its_kind(Peft) = section("What the adapter methods share")  # type: ignore[valid-type]
    variants: list[Variant] = Field(min_length=1, description="What is compared, each by its name")
    lr_grid: list[float] | None = Field(
        None, description="Learning rates that every variant is tried at; the best by valid loss counts"
    )
    seeds: list[int] | None = Field(None, description="Seeds: every variant is trained from each (default: rng.seed)")
    classify: Classification | None = Field(None, description="Measure every trained model by eval/classify too")
    parallel: int = Field(1, ge=1, description="Runs at a time")
    profile: str | None = Field(None, description="Run them as jobs of this profile (default: on this machine)")
    env_file: str | None = Field(None, description="The env.toml that holds the profile")
    output_dir: str = Field(description="Where the comparison_report goes")

    @property
    def compared(self) -> list[Compared]:
        """The variants, with their learning rates."""
        return [Compared(one.name, one.set, one.lr or self.lr_grid or ()) for one in self.variants]

    @property
    def used_seeds(self) -> list[int]:
        """The seeds, the first of which chooses the learning rates."""
        return self.seeds or [self.rng.seed]

    @property
    def runs(self) -> Path:
        """Where all runs go."""
        return Path(self.checkpoint.save).expanduser().absolute()

    def common(self) -> dict[str, Any]:
        """What the variants share, as sections of a training step; paths are absolute."""
        found = {
            name: getattr(self, name).model_dump(by_alias=True, exclude_unset=True)
            for name in _COMMON
            if isinstance(getattr(self, name), Section)
        }
        found["checkpoint"]["pretrained_checkpoint"] = _absolute(self.checkpoint.pretrained_checkpoint)
        found["dataset"]["nano3_packed_sft_dir"] = _absolute(self.dataset.nano3_packed_sft_dir)
        return {"engine": self.engine, **found}

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        for name, count in Counter(one.name for one in self.variants).items():
            if count > 1:
                what = f"{count} variants are named {name!r}: their runs and rows could not be told apart"
                yield Problem("variants", what, hint="Give each a name of its own.")
            elif not _NAME.fullmatch(name):
                yield Problem(
                    "variants", f"{name!r} is no name", allowed="letters, digits, and _ . + - behind the first"
                )
        if self.seeds is not None and len(set(self.seeds)) < max(1, len(self.seeds)):
            yield Problem("seeds", f"{self.seeds} holds a seed twice")
        if self.seeds == []:
            yield Problem("seeds", "holds no seed", hint="Leave it out to use rng.seed.")
        for key in ("load", "ckpt_step"):
            if getattr(self.checkpoint, key) is not None:
                yield Problem(f"checkpoint.{key}", "has no meaning for a comparison: each run goes on by itself")
        yield from check(self.compared, self.common(), self.used_seeds, self.runs)

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterator[Problem]:
        yield from super().check_inputs(inputs)
        available = None if self.profile or machine.has_gpu() else machine.available_bytes()
        peaks = []
        for where, _, run in self._runs():
            if run.adapter is not None and (model := shape_of(inputs)) is not None:
                told = misfits(run.adapter, model)
                yield from (Problem(f"{where}: {p.where}", p.what, allowed=p.allowed) for p in told)
            account = run.account(inputs)
            if account is not None and available is not None:
                peaks.append((account.nbytes, where))
                if account.nbytes > available and account.warnings:
                    yield Problem(where, account.warnings[0], name="not_enough_memory")
        together = sum(peak for peak, _ in sorted(peaks, reverse=True)[: self.parallel])
        if available is not None and self.parallel > 1 and together > available and max(peaks)[0] <= available:
            what = (
                f"{self.parallel} runs at a time may need {together / 1e9:.1f} GB, {available / 1e9:.1f} are available"
            )
            yield Problem("parallel", what, hint="Lower parallel.", name="not_enough_memory")

    def _runs(self) -> Iterator[tuple[str, str, TrainingConfig]]:
        """Of each variant where it stands, its name and a run; those with faults, told elsewhere, left out."""
        for number, variant in enumerate(self.compared):
            try:
                run = typed(variant.trial(self.common(), None, self.used_seeds[0], self.runs))
            except ConfigError:
                continue
            yield f"variants.{number} ({variant.name})", variant.name, run

    def _check_destination(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """Runs have directories of their own below checkpoint.save, which may be no artifact itself."""
        try:
            known = record.read(self.runs)
        except ArtifactError as error:
            return [Problem(where="checkpoint.save", what=str(error))]
        if known is None:
            return []
        what = f"{self.checkpoint.save} is a {known.type}; the runs need a directory of their own"
        return [Problem("checkpoint.save", what)]

    def accounts(self, inputs: Mapping[str, Artifact]) -> Mapping[str, Account]:
        found = {name: run.account(inputs) for _, name, run in self._runs()}
        return {name: account for name, account in found.items() if account is not None}

    def unprobed(self) -> str:
        return "it only starts other steps (probe one of its variants with peft/megatron_bridge)"

    def launch_here(self) -> Iterator[Problem]:
        yield from super().launch_here()
        if not installed("matplotlib"):
            what, hint = "the package matplotlib is not installed, which draws the plots", "pip install matplotlib"
            yield Problem(where="output_dir", what=what, hint=hint, name="matplotlib_missing")

    def path_keys(self) -> tuple[str, ...]:
        return ("checkpoint.save", "env_file", "classify.examples_path")


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
