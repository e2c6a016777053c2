"""The configuration of sft/megatron_bridge: that of peft/megatron_bridge without `peft`."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from steps.engine.train.settings import BASE, DATA, TrainingConfig
from steps.errors import Problem

__all__ = ["BASE", "DATA", "Config"]


class Config(TrainingConfig):
    """One fine-tuning run of all weights of a model."""

    engine: Literal["torch"] = Field("torch", description="Who trains: the built-in torch engine")

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        yield from self.check_torch()
