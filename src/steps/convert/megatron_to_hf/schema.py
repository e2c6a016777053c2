"""Configuration of convert/megatron_to_hf."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from steps.artifacts.opening import Artifact, is_hub_id
from steps.config.base import StepConfig
from steps.errors import Problem
from steps.shapes import hf_config


class Config(StepConfig):
    """Where from, where to."""

    megatron_path: str = Field(description="The checkpoint_megatron, or one of its iter_NNNNNNN folders")
    hf_path: str = Field(description="Where the checkpoint_hf goes")
    hf_model_id: str | None = Field(
        None,
        description="Model to take config.json, generation_config.json and tokenizer from (default: its own)",
    )

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """The model that config.json is taken from is there, and one that is supported. Its weights are not needed."""
        if self.hf_model_id is None or is_hub_id(self.hf_model_id):
            return []
        path = Path(self.hf_model_id).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return []
        file = path / "config.json"
        if not file.is_file():
            what = f"{path} has no config.json" if path.is_dir() else f"there is no model at {path}"
            allowed = "a model's directory, a .gguf file or a Hub id (org/name)"
            return [Problem(where="hf_model_id", what=what, allowed=allowed, name="missing_checkpoint_hf")]
        return hf_config.faults(file)
