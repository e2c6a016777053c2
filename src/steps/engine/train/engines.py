"""Which engine trains, in the configuration of the steps that leave the choice. Free of torch."""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from steps.config.base import Section
from steps.engine.train.settings import PARALLEL, TrainingConfig
from steps.errors import Problem


class EngineConfig(TrainingConfig):
    """One training run, by the built-in engine or by Megatron-Bridge."""

    engine: Literal["auto", "torch", "megatron_bridge"] = Field(
        "auto", description="auto: megatron_bridge where it is installed or recipe asks for parallelism, else torch"
    )

    more_than_one_part: ClassVar[str] = "Set engine=megatron_bridge, or start more processes (run.env.nprocs_per_node)."

    # Megatron-Bridge's ConfigContainer has more sections and more keys in each than are typed here.
    open_sections: ClassVar[frozenset[str]] = frozenset(
        ("recipe", "dataset", "train", "optimizer", "scheduler", "peft", "checkpoint", "logger", "rng")
    )

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
        known = section in type(self).model_fields
        # An adapter where all weights are trained is not let through: somebody wants another step.
        open_here = known and section in self.open_sections if rest else not known and section != "peft"
        if not open_here:
            return ""
        told = {"megatron_bridge": "", "auto": ", where it is installed"}
        return "passed to Megatron-Bridge" + told[self.chosen_engine] if self.chosen_engine in told else ""

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        if self.chosen_engine == "torch":
            yield from self.check_torch()
        elif self.chosen_engine == "megatron_bridge" and self.recipe.target is None:
            what, hint = "is required by the engine megatron_bridge", "Name a recipe function, or choose engine=torch."
            yield Problem(where="recipe._target_", what=what, hint=hint)

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
