"""Configuration of convert/megatron_to_hf."""

from pydantic import Field

from steps.config.base import StepConfig


class Config(StepConfig):
    """Where from, where to."""

    megatron_path: str = Field(description="The checkpoint_megatron, or one of its iter_NNNNNNN folders")
    hf_path: str = Field(description="Where the checkpoint_hf goes")
    hf_model_id: str | None = Field(
        None,
        description="Model to take config.json, generation_config.json and tokenizer from (default: its own)",
    )
