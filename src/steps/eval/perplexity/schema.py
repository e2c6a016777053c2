"""Configuration of eval/perplexity."""

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field

from steps.artifacts import bases, packed_parquet
from steps.artifacts.opening import Artifact
from steps.config.evaluated import EvaluatedModel
from steps.config.training import Dataset
from steps.errors import Problem

DATA = "dataset.nano3_packed_sft_dir"


class Config(EvaluatedModel):
    """Which model, on which packed rows."""

    dataset: Dataset = Field(description="The packed data")
    split: Literal["train", "valid", "test"] = Field("valid", description="Which split is scored")
    max_rows: int | None = Field(None, ge=1, description="Score at most this many packed rows (default: all)")
    micro_batch_size: int = Field(1, ge=1, description="Packed rows in one forward pass; no influence on the result")
    confidence: float = Field(0.95, gt=0, lt=1, description="Of the intervals: how often they hold the true value")

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterator[Problem]:
        yield from super().check_inputs(inputs)
        data, model = inputs[DATA], self.base(inputs)
        if bases.disagree(data, model, "tokenizer_digest"):
            what = "the data were packed with another tokenizer than the model has"
            hint = "Pack them again with the model's tokenizer."
            yield Problem(where=DATA, what=what, hint=hint, name="tokenizer_mismatch")
        if data.path is not None and not packed_parquet.shards(data.path, self.split):
            have = [split for split in packed_parquet.SPLITS if packed_parquet.shards(data.path, split)]
            what = f"the data have no split {self.split}"
            yield Problem(where="split", what=what, allowed=", ".join(have), name="missing_split")
