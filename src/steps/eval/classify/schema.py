"""Configuration of eval/classify."""

from collections import Counter
from collections.abc import Iterator

from pydantic import Field

from steps.config.evaluated import EvaluatedModel
from steps.errors import Problem


class Config(EvaluatedModel):
    """Which model, which examples, which labels."""

    examples_path: str = Field(
        description="Chat data whose last assistant message is the right label: a file, a glob or a directory"
    )
    labels: list[str] | None = Field(None, description="The label words (default: all that the data have)")
    messages_field: str = Field("messages", description="Field of a row that holds the conversation")
    max_examples: int | None = Field(None, ge=1, description="Score at most this many, in the order of the data")
    batch_size: int = Field(16, ge=1, description="Examples scored at a time: memory; no influence on the result")
    confidence: float = Field(0.95, gt=0, lt=1, description="Of the interval: how often it holds the true accuracy")

    def check_values(self) -> Iterator[Problem]:
        yield from super().check_values()
        if self.labels is None:
            return
        if len(self.labels) < 2:
            yield Problem("labels", f"{self.labels} leaves nothing to tell apart", allowed="two labels or more")
        for label, count in Counter(self.labels).items():
            if count > 1 or not label or label != label.strip():
                what = f"{label!r} stands there {count} times" if count > 1 else f"{label!r} is no label word"
                yield Problem("labels", what, allowed="each word once, without blanks around it")
