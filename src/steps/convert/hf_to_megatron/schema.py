"""Configuration of convert/hf_to_megatron."""

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.errors import Problem
from steps.shapes import hf_config


class Config(StepConfig):
    """Where from, where to, in which dtype."""

    hf_model_id: str = Field(description="Model directory with safetensors, a .gguf file, or a Hub id")
    megatron_path: str = Field(description="Where the checkpoint_megatron goes")
    dtype: Literal["source", "float32", "bfloat16"] = Field(
        "source", description="Dtype of the weights; source keeps it (GGUF: float32)"
    )

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """An architecture that is not supported is found before anything is read."""
        path = inputs["hf_model_id"].path
        if path is None or not path.is_dir():
            return []
        return hf_config.faults(path / "config.json")
