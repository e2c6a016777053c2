"""Configuration of convert/hf_to_lora."""

from collections.abc import Iterable, Mapping

from pydantic import Field

from steps.artifacts import bases
from steps.artifacts.checkpoint import ADAPTER_CONFIG
from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.errors import Problem
from steps.shapes.hf_adapter_config import faults


class Config(StepConfig):
    """The Hugging Face adapter, its base, and where the adapter goes."""

    hf_adapter_path: str = Field(description="The checkpoint_hf_adapter: a directory as peft saves it")
    base_megatron_path: str = Field(description="Its base as checkpoint_megatron")
    lora_checkpoint: str = Field(description="Where the checkpoint_lora goes")

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """Whether all that the adapter says is understood, and whether it is for this base, where its record tells."""
        adapter = inputs["hf_adapter_path"]
        if adapter.path is not None:
            yield from faults(adapter.path / ADAPTER_CONFIG)
        yield from bases.mismatch(adapter, inputs["base_megatron_path"])
