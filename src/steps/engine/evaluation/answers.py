"""Answers of a model to prompts: conversations in, the same conversations with the model's answer out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steps.engine.checkpoint.hf import Source
from steps.engine.data import blend
from steps.engine.data.chat import Conversation, DroppedError, parse
from steps.engine.data.reading import chunks, examine
from steps.engine.data.template import TEMPLATE_ERRORS
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.model.decoder import Decoder
from steps.engine.model.generate import GREEDY, Sampling, generate
from steps.engine.progress import SILENT, Progress
from steps.errors import Problem, StepFailed

#: Bad rows that one message names.
_NAMED = 5


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    reference: the answer that the data have there, which the model is not shown; None where they end with the question.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    reference: str | None


@dataclass(frozen=True)
class Answer:
    """What a model said. prompt_tokens, tokens: of the prompt as the model saw it, and of the answer.

    ended: the model ended it by itself, before max_new_tokens.
    """

    prompt: Prompt
    text: str
    prompt_tokens: int
    tokens: int
    ended: bool

    def row(self) -> dict[str, Any]:
        """As a row of JSON lines: the conversation with the answer, and what was counted."""
        said = {"role": "assistant", "content": self.text}
        row: dict[str, Any] = {"messages": [*self.prompt.messages, said]}
        if self.prompt.tools:
            row["tools"] = self.prompt.tools
        if self.prompt.reference is not None:
            row["reference"] = self.prompt.reference
        return {**row, "prompt_tokens": self.prompt_tokens, "answer_tokens": self.tokens, "ended": self.ended}


def read_prompts(path: str, messages_field: str, max_rows: int | None) -> list[Prompt]:
    """The prompts in a file, glob or directory of chat data; a text in place of messages is one user message.

    Raises StepFailed (bad_prompts) naming the rows that are none, ConfigError where there are no files.
    """
    found, bad = [], []
    files = examine(blend.resolve(path))
    for chunk in chunks(files, max_rows, messages_field, "tools"):
        for line, data in chunk.rows:
            try:
                found.append(_prompt(parse(_as_messages(data, messages_field), messages_field)))
            except DroppedError as error:
                bad.append(Problem(f"{files[chunk.file].path}:{line}", str(error), name="bad_prompts"))
    if bad:
        if len(bad) > _NAMED:
            bad[_NAMED:] = [Problem("", f"{len(bad) - _NAMED} more rows like these", name="bad_prompts")]
        raise StepFailed(bad)
    if not found:
        raise StepFailed(f"{path} holds no prompt", name="bad_prompts")
    return found


def _as_messages(data: bytes, field: str) -> bytes:
    """The row with a text under `field` made one user message; everything else as it is."""
    try:
        row = json.loads(data)
    except ValueError:
        return data
    if isinstance(row, dict) and isinstance(row.get(field), str):
        return json.dumps({**row, field: [{"role": "user", "content": row[field]}]}).encode()
    return data


def _prompt(conversation: Conversation) -> Prompt:
    messages, reference = conversation.messages, None
    if messages[-1]["role"] == "assistant":
        reference = str(messages[-1].get("content") or "")
        messages = messages[:-1]
    if not messages:
        raise DroppedError("messages_empty", "there is nothing before the answer")
    return Prompt(messages, conversation.tools, reference)


def as_text(tokenizer: Tokenizer, prompt: Prompt, *, asking: bool = True) -> str:
    """The prompt as the model sees it: by the chat template, ready for the answer; without one, the bare text.

    asking: False for a conversation that waits for no answer.
    Raises StepFailed (template_error) where the template refuses it.
    """
    if tokenizer.chat_template is None:
        return "\n".join(str(message.get("content") or "") for message in prompt.messages)
    try:
        return tokenizer.render(prompt.messages, prompt.tools, add_generation_prompt=asking)
    except TEMPLATE_ERRORS as error:
        what = f"the chat template refuses {json.dumps(prompt.messages)[:80]}…: {error}"
        raise StepFailed(what, name="template_error") from error


def stop_tokens(tokenizer: Tokenizer, source: Source) -> set[int]:
    """What ends an answer: the tokenizer's eos token and those that the model's generation_config names."""
    ends = json.loads(source.files.get("generation_config.json", "{}")).get("eos_token_id")
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def answers(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    stop: set[int],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    sampling: Sampling = GREEDY,
    progress: Progress = SILENT,
) -> Iterator[Answer]:
    """The model's answers, in the order of the prompts.

    batch_size: prompts that are answered at a time; memory grows with it, answers do not depend on it.
    """
    longest, told = decoder.config.max_position_embeddings, False
    with progress.task("generate", len(prompts), "answers") as task:
        for first in range(0, len(prompts), batch_size):
            some = prompts[first : first + batch_size]
            ids = [tokenizer.encode(as_text(tokenizer, prompt)) for prompt in some]
            if not told and (length := max(map(len, ids)) + max_new_tokens) > longest:
                told = True
                progress.log(f"warning: texts of {length:,} tokens; the model was made for {longest:,}")
            found = generate(decoder, ids, max_new_tokens, stop, sampling, first)
            for prompt, asked, said in zip(some, ids, found, strict=True):
                text = tokenizer.decode(said).strip()
                yield Answer(prompt, text, len(asked), len(said), len(said) < max_new_tokens)
            task.advance(len(some))


def summary(found: Sequence[Answer]) -> Mapping[str, int]:
    """How much was said."""
    return {
        "answers": len(found),
        "answer_tokens": sum(answer.tokens for answer in found),
        "cut_short": sum(not answer.ended for answer in found),
    }
