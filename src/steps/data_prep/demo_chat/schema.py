"""Configuration of data_prep/demo_chat."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.errors import Problem


class Config(StepConfig):
    """Where the dialogues come from and where the conversations go."""

    dataset_json: str = Field(description="dataset.json of the package chitchat-dataset")
    output_dir: str = Field(description="Where the conversations go")
    max_conversations: int | None = Field(None, ge=1, description="Write at most this many, in the order of the data")

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterator[Problem]:
        if not Path(self.dataset_json).expanduser().is_file():
            hint = "pip install chitchat-dataset==0.9.0"
            yield Problem(
                where="dataset_json", what=f"{self.dataset_json} is not there", hint=hint, name="missing_dataset"
            )
