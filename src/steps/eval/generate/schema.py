"""Configuration of eval/generate."""

from collections.abc import Iterator

from pydantic import Field

from steps.config.evaluated import EvaluatedModel
from steps.errors import Problem


class Config(EvaluatedModel):
    """Which model, which prompts, and how the answers are drawn."""

    prompts_path: str = Field(
        description="Chat data: a file, a glob or a directory. A row's last assistant message is taken off and kept as "
        "its reference"
    )
    messages_field: str = Field("messages", description="Field of a row that holds the conversation, or a text to ask")
    max_prompts: int | None = Field(None, ge=1, description="Answer at most this many, in the order of the data")
    max_new_tokens: int = Field(256, ge=1, description="Tokens of an answer at most")
    batch_size: int = Field(8, ge=1, description="Prompts answered at a time: memory; no influence on the answers")
    temperature: float = Field(0.0, ge=0, description="Logits are divided by it; 0: the likeliest token always")
    top_k: int | None = Field(None, ge=1, description="Draw from the k likeliest tokens only")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw from the likeliest tokens that together have this probability"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the draws")

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        if self.temperature == 0:
            for key in ("top_k", "top_p"):
                if (value := getattr(self, key)) is not None:
                    what = f"{value} has no effect: with temperature=0 the likeliest token is taken always"
                    yield Problem(where=key, what=what, hint=f"Set a temperature, or {key}=null.")
