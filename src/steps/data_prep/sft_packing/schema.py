"""Configuration of data_prep/sft_packing."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from steps.artifacts.opening import Artifact, is_hub_id
from steps.config.base import Section, StepConfig
from steps.engine.data import blend
from steps.engine.data.tokenizer_place import locate
from steps.errors import ConfigError, Problem


class TokenizerSection(Section):
    """Who turns text into tokens."""

    model: str = Field(description="Tokenizer: a Hugging Face directory or Hub id, a tokenizer.json or a .gguf file")
    library: Literal["auto", "tiktoken", "tokenizers"] = Field(
        "auto", description="Who tokenizes; auto: tiktoken where it pays and gives the same ids, otherwise tokenizers"
    )


class Config(StepConfig):
    """Which conversations, whose tokens, how packed."""

    blend_path: str = Field(
        description="Chat data: a file, a glob, a directory, or a .json blend of these with weights"
    )
    output_dir: str = Field(description="Where the packed_parquet goes")
    tokenizer: TokenizerSection = Field(description="Who turns text into tokens")
    chat_template: str | None = Field(
        None, description="Path or text of a Jinja2 chat template (default: the tokenizer's own)"
    )
    messages_field: str = Field("messages", description="Field of a row that holds the conversation")
    tools_field: str = Field("tools", description="Field of a row that holds its tool definitions")
    pack_size: int = Field(4096, ge=2, description="Tokens in a packed row; the training's recipe.seq_length")
    train_ratio: float = Field(0.98, gt=0, le=1, description="Share of the conversations in the train split")
    valid_ratio: float = Field(0.01, ge=0, lt=1, description="Share of the conversations in the valid split")
    test_ratio: float = Field(0.01, ge=0, lt=1, description="Share of the conversations in the test split")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the splits, of sampling by weight and of the row order")
    max_rows: int | None = Field(None, ge=1, description="Read at most this many rows")
    num_workers: int | None = Field(
        None, ge=0, description="Processes that tokenize (default: one per usable CPU); no influence on the result"
    )
    num_shards: int = Field(1, ge=1, description="Parquet files in each split")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop", description="What to do with a conversation longer than pack_size"
    )
    pad_multiple: int = Field(
        1, ge=1, description="Pad documents so that all tokens but the last divide by this (2 x context parallel size)"
    )
    max_drop_ratio: float = Field(0.05, ge=0, le=1, description="Share of the rows that may be dropped")
    loss: Literal["assistant", "all"] = Field(
        "assistant", description="Which tokens are trained: the assistant's answers, or all"
    )
    force: bool = Field(False, description="Pack again even if output_dir already holds the result")

    def check_values(self) -> Iterator[Problem]:
        ratios = (self.train_ratio, self.valid_ratio, self.test_ratio)
        if abs(sum(ratios) - 1) > 1e-6:
            what = f"with valid_ratio and test_ratio the shares add up to {sum(ratios):g}"
            yield Problem(where="train_ratio", what=what, allowed="1 together")
        if self.pad_multiple >= self.pack_size:
            what = f"{self.pad_multiple} leaves no room in a row of {self.pack_size}"
            yield Problem(where="pad_multiple", what=what, allowed="below pack_size")

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """Every file of the blend, the tokenizer and the template are there."""
        problems: list[Problem] = []
        try:
            blend.resolve(self.blend_path)
        except ConfigError as error:
            problems += error.problems
        model = self.tokenizer.model
        try:
            _ = is_hub_id(model) or locate(model)
        except ValueError as error:
            allowed = "a tokenizer's directory, a tokenizer.json, a .gguf file or a Hub id (org/name)"
            what = f"{model}: {error}"
            problems.append(Problem(where="tokenizer.model", what=what, allowed=allowed, name="unsupported_tokenizer"))
        template = self.chat_template
        if template is not None and "{" not in template and not Path(template).expanduser().is_file():
            what = f"there is no file {template}, and it is no Jinja2 text"
            problems.append(Problem(where="chat_template", what=what, name="missing_chat_template"))
        return problems

    def name_keys(self) -> tuple[str, ...]:
        return ("tokenizer.model", "chat_template")
