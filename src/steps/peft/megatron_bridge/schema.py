"""The configuration of peft/megatron_bridge, in Megatron-Bridge's names."""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from steps.config.base import Adopted, Section, of_its_kind, section
from steps.config.peft import Peft
from steps.config.validate import keys
from steps.engine.train.settings import BASE, DATA, PARALLEL, TrainingConfig
from steps.errors import Problem
from steps.shapes import targets

__all__ = ["BASE", "DATA", "Config", "bridge_installed"]


class Config(TrainingConfig):
    """One fine-tuning run of adapters on a frozen base."""

    engine: Literal["auto", "torch", "megatron_bridge"] = Field(
        "auto", description="auto: megatron_bridge where it is installed or recipe asks for parallelism, else torch"
    )
    peft: of_its_kind(Peft) = section("The adapter method")  # type: ignore[valid-type]

    more_than_one_part: ClassVar[str] = "Set engine=megatron_bridge, or start more processes (run.env.nprocs_per_node)."

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
        if self.elsewhere:
            return "auto"
        return "megatron_bridge" if bridge_installed() else "torch"

    def accepts_unknown(self, key: str) -> str:
        section, _, rest = key.partition(".")
        open_here = section in self.open_sections if rest else section not in type(self).model_fields
        if section == "run" or not open_here:
            return ""
        told = {"megatron_bridge": "", "auto": ", where it is installed"}
        return "passed to Megatron-Bridge" + told[self.chosen_engine] if self.chosen_engine in told else ""

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        yield from self.peft.check(self.train.train_iters)
        yield from targets.other_words(self.peft)
        if self.chosen_engine == "torch":
            yield from self.check_torch()
        elif self.chosen_engine == "megatron_bridge":
            yield from self.peft.only_torch()
            yield from self._check_parts()
            if self.recipe.target is None:
                what, hint = (
                    "is required by the engine megatron_bridge",
                    "Name a recipe function, or choose engine=torch.",
                )
                yield Problem(where="recipe._target_", what=what, hint=hint)

    def _check_parts(self) -> Iterator[Problem]:
        for pattern, missing in targets.halves(self.peft.targets_asked) if self.peft.canonical else ():
            what = f"Megatron-Bridge cannot save an adapter on {pattern!r} without one on {missing}"
            hint = "Name them all, or train with engine=torch."
            yield Problem(where="peft.target_modules", what=what, hint=hint)

    def unprobed(self) -> str:
        if self.chosen_engine == "torch":
            return ""
        return "Megatron-Bridge trains, which takes no single steps for us (engine=torch does)"

    def launch_here(self) -> Iterator[Problem]:
        yield from super().launch_here()
        if self.chosen_engine == "megatron_bridge":
            from steps.engine.megatron_bridge import missing_packages

            yield from missing_packages()

    def wants_torchrun(self) -> bool:
        # Megatron-Bridge joins a process group even when it is alone.
        return self.chosen_engine != "torch"


def _parallel(recipe: object) -> bool:
    """Whether a recipe section asks for model parallelism. It may be a plain mapping with any values: `validate` asks
    for the engine also where other keys of the configuration are wrong."""
    section = recipe if isinstance(recipe, Mapping) else vars(recipe) if isinstance(recipe, Section) else {}
    sizes = (section.get(name) for name in PARALLEL)
    return any(isinstance(size, int) and size > 1 for size in sizes)


def bridge_installed() -> bool:
    """Whether Megatron-Bridge can be imported here. Nothing of it is."""
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:  # not even the package megatron
        return False
