"""What the conversions share: a tokenizer that goes along where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steps.engine.data.tokenizer import Tokenizer
from steps.errors import ArtifactError


def tokenizer_of(path: Path, log: Callable[[str], None]) -> Tokenizer | None:
    """The tokenizer of a model; None, with a warning, where it has none: its weights are converted all the same."""
    try:
        return Tokenizer.load(str(path))
    except ArtifactError as error:
        log(f"warning: written without a tokenizer: {error}")
        return None


def tokenizer_facts(tokenizer: Tokenizer | None) -> dict[str, str]:
    """What an artifact's record says of its tokenizer."""
    if tokenizer is None:
        return {}
    return {"tokenizer_digest": tokenizer.digest, "chat_template_digest": tokenizer.chat_template_digest}
