"""Configuration of convert/hf_to_megatron."""

import json
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.engine.checkpoint import hf_config
from steps.errors import ArtifactError, Problem


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
        file = path / "config.json"
        try:
            hf_config.model_config(json.loads(file.read_text(encoding="utf-8")), str(file), "float32")
        except ArtifactError as error:
            return error.problems
        except ValueError as error:
            return [Problem(where=str(file), what=f"is no JSON: {error}", name="damaged_artifact")]
        return []
