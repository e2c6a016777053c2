"""The configuration of sft/megatron_bridge: that of peft/megatron_bridge without `peft`."""

from steps.engine.train.engines import EngineConfig
from steps.engine.train.settings import BASE, DATA

__all__ = ["BASE", "DATA", "Config"]


class Config(EngineConfig):
    """One fine-tuning run of all weights of a model."""
