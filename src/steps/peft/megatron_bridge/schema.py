"""The configuration of peft/megatron_bridge, in Megatron-Bridge's names."""

from collections.abc import Iterator, Mapping
from typing import Any

from steps.config.base import Adopted, of_its_kind, section
from steps.config.peft import Peft
from steps.config.validate import keys
from steps.engine.train.engines import EngineConfig
from steps.engine.train.settings import BASE, DATA
from steps.errors import Problem
from steps.shapes import targets

__all__ = ["BASE", "DATA", "Config"]


class Config(EngineConfig):
    """One fine-tuning run of adapters on a frozen base."""

    peft: of_its_kind(Peft) = section("The adapter method")  # type: ignore[valid-type]

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

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        yield from self.peft.check(self.train.train_iters)
        yield from targets.other_words(self.peft)
        if self.chosen_engine == "megatron_bridge":
            yield from self.peft.only_torch()
            yield from self._check_parts()

    def _check_parts(self) -> Iterator[Problem]:
        for pattern, missing in targets.halves(self.peft.targets_asked) if self.peft.canonical else ():
            what = f"Megatron-Bridge cannot save an adapter on {pattern!r} without one on {missing}"
            hint = "Name them all, or train with engine=torch."
            yield Problem(where="peft.target_modules", what=what, hint=hint)
