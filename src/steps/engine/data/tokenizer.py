"""A tokenizer with its chat template: one object for every place it can come from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from steps.engine.data.segments import TokenizersSegments
from steps.engine.data.template import ChatTemplate, Message
from steps.engine.data.tokenizer_files import EXTRA_TEMPLATES, Source, read
from steps.errors import ConfigError, Problem


class Tokenizer:
    """Text to ids and back, conversations to text.

    backend:        the tokenizers.Tokenizer that does the work.
    special_tokens: bos_token, eos_token, pad_token, … by name, those that the model has.
    now:            the time that templates see (`strftime_now`); None for the present.
    """

    def __init__(self, source: Source, now: datetime | None = None) -> None:
        self._source, self._now = source, now
        self.backend: tokenizers.Tokenizer = source.backend
        self.special_tokens: Mapping[str, str] = dict(source.special_tokens)

    @classmethod
    def load(cls, model: str, chat_template: str | None = None) -> Tokenizer:
        """Load the tokenizer that `model` names.

        model:         a Hugging Face directory, a tokenizer.json, a .gguf file, a checkpoint with a `tokenizer` folder,
                       or a Hub id.
        chat_template: the path of a file with a template, or the template itself; used instead of the model's own.
        Raises ArtifactError (unsupported_tokenizer), ConfigError for a template that cannot be read.
        """
        source = read(model)
        if chat_template is not None:
            source = replace(source, templates={"default": template_text(chat_template)})
        return cls(source)

    def at(self, now: datetime) -> Tokenizer:
        """This tokenizer with its templates' clock stopped at `now`."""
        return Tokenizer(self._source, now)

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled templates cannot travel to another process; what they are compiled from can.
        return Tokenizer, (self._source, self._now)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens among them."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The special tokens, longest first: what must never come out of a user's text."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(sorted((token.content for token in added if token.special), key=lambda text: (-len(text), text)))

    @cached_property
    def digest(self) -> str:
        """sha256 of what decides which ids a text gets: model, normalizer, pre-tokenizer, added tokens.

        The same for a GGUF file and the directory saved from it; padding, post-processor and decoder do not count.
        """
        return _digest(self.description)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What stands in its tokenizer.json."""
        described: dict[str, Any] = json.loads(self.backend.to_str())
        return described

    @cached_property
    def segments(self) -> TokenizersSegments:
        """What tokenizes pieces of text."""
        return TokenizersSegments(self.backend)

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template."""
        return self._source.templates.get("default")

    @property
    def templates(self) -> dict[str, str]:
        """The sources of all chat templates, by name."""
        return dict(self._source.templates)

    @cached_property
    def chat_template_digest(self) -> str:
        """sha256 of the default chat template's source ('' without one)."""
        return "" if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    @cached_property
    def template(self) -> ChatTemplate:
        """The default chat template, compiled. Raises ConfigError (`missing_chat_template`) when there is none."""
        if self.chat_template is None:
            what, hint = "the tokenizer has no chat template", "Give one: a file with Jinja2, or its text."
            raise ConfigError(Problem(where="chat_template", what=what, hint=hint, name="missing_chat_template"))
        return ChatTemplate(self.chat_template, self.special_tokens, self._now)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        source = self._source.templates.get("tool_use")
        return ChatTemplate(source, self.special_tokens, self._now) if source else self.template

    def template_for(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """The template for a conversation: the model's `tool_use` one, where it has one and there are tools."""
        return self._tool_template if tools else self.template

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the model sees it. Raises one of template.TEMPLATE_ERRORS where the template does."""
        return self.template_for(tools).render(messages, tools, add_generation_prompt)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens written in it become control tokens, none are added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on several threads unless TOKENIZERS_PARALLELISM is false."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def save(self, directory: Path) -> None:
        """Write what transformers.AutoTokenizer loads. Files of a Hugging Face directory are copied as they are.

        A template given on loading goes along, as chat_template.jinja.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if self._source.files:
            for path in self._source.files:
                extra = path.parent.name == EXTRA_TEMPLATES
                target = directory / EXTRA_TEMPLATES / path.name if extra else directory / path.name
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        if not (directory / "tokenizer.json").is_file():
            self.backend.save(str(directory / "tokenizer.json"))
        if not (directory / "tokenizer_config.json").is_file():
            config = {**self._source.config, **self.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
            config.pop("chat_template", None)
            text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
            (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (directory / "chat_template.jinja").write_bytes(self.chat_template.encode("utf-8"))


def template_text(value: str) -> str:
    """The template that a config value names: the contents of a file, or the value itself when it is Jinja."""
    if "{{" in value or "{%" in value:
        return value
    path = Path(value).expanduser()
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{value} cannot be read: {getattr(error, 'strerror', None) or error}"
        allowed = "the path of a Jinja2 file, or template text with {{ … }} or {% … %} in it"
        raise ConfigError(Problem(where="chat_template", what=what, allowed=allowed)) from error


def _digest(description: Mapping[str, Any]) -> str:
    """The digest of a tokenizer.json's contents, however a library version happens to spell them."""
    model = dict(description["model"])
    vocab = model.pop("vocab", {})
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.pop("merges", None) or ()]
    parts: dict[str, Any] = {
        "model": _told(model),
        "vocab": sorted(vocab.items(), key=lambda entry: (entry[1], entry[0])) if isinstance(vocab, dict) else vocab,
        "merges": merges,
        "normalizer": _told(description.get("normalizer")),
        "pre_tokenizer": _told(description.get("pre_tokenizer")),
        "added": sorted(
            (token["id"], token["content"], token["special"]) for token in description.get("added_tokens", ())
        ),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _told(part: Any) -> Any:
    """A part of the description without what is absent, false or empty: versions differ in whether they say it."""
    if isinstance(part, Mapping):
        # trim_offsets moves character positions, never ids.
        told = {key: value for key, value in part.items() if key != "trim_offsets"}
        return {key: _told(value) for key, value in told.items() if value not in (None, False, "", [], {})}
    return [_told(entry) for entry in part] if isinstance(part, list) else part
