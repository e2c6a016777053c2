"""From rows of chat data to token ids with the trained ones marked.

A rendered conversation is cut where training begins and ends and each piece is tokenized by itself. That is the fastest
way to the mask, and it is what happens at inference: the prompt ends at a token boundary, while tokenizing the whole
text may merge the end of the prompt with the start of the answer. It only works for tokenizers that treat a piece of
text the same wherever it stands; SentencePiece ones put a blank before it. `proofs` tries on a sample of rows;
where it does not fit, the whole text is tokenized and answers are found by character positions.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from steps.engine.data.chat import Conversation, DroppedError
from steps.engine.data.segments import Encoded, Segments, merged, same_ids
from steps.engine.data.spans import Answers, Span, find_answers
from steps.engine.data.template import free_marks
from steps.engine.data.tiktoken_ranks import Ranks
from steps.engine.data.tiktoken_segments import TiktokenSegments
from steps.engine.data.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Text that is tokenized by itself. literal: it looks like a control token and must stay text."""

    text: str
    trained: bool
    literal: bool


@dataclass
class Row:
    """One conversation, rendered. spans: the trained characters. literals: what must not become a control token."""

    text: str
    spans: list[Span]
    literals: list[Span] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def pieces(self, *, at_spans: bool = True) -> list[Piece]:
        """The text cut at the literals and, unless told otherwise, at the bounds of the trained spans."""
        result: list[Piece] = []
        literals, position = [*self.literals, (len(self.text), len(self.text))], 0
        at = 0
        for start, end in (*(self.spans if at_spans else ()), (len(self.text), len(self.text))):
            for stop, trained in ((start, False), (end, True)):
                while position < stop:
                    first, last = literals[at]
                    literal = first <= position
                    piece_end = min(stop, last if literal else first)
                    result.append(Piece(self.text[position:piece_end], trained, literal))
                    position = piece_end
                    at += position == last
        return result


class Encoder:
    """Renders and tokenizes conversations.

    loss: "assistant" trains the answers, "all" every token but those of messages with weight 0.
    whole_text: tokenize a conversation in one go; see the module's text.
    stream: find answers in one rendering where the template allows it.
    ranks: tokenize with tiktoken, where it was proven to give the same ids (see tiktoken_segments).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: str,
        *,
        whole_text: bool = False,
        stream: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self._tokenizer, self._loss, self._ranks = tokenizer, loss, ranks
        self.whole_text, self.stream = whole_text, stream
        self._control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer without its added tokens: `<|im_end|>` is five characters of text to it."""
        return _stripped(self._tokenizer, "added_tokens")

    @cached_property
    def segments(self) -> Segments:
        """What tokenizes the pieces of a conversation."""
        plain = self._tokenizer.segments
        return plain if self._ranks is None else TiktokenSegments(self._ranks, plain)

    @cached_property
    def _exact(self) -> tokenizers.Tokenizer:
        """The tokenizer with character positions as they are: a post-processor may leave blanks out of them."""
        return _stripped(self._tokenizer)

    def render(self, conversation: Conversation) -> Row:
        """The conversation as text, with what is trained and what must stay text. Raises DroppedError."""
        template = self._tokenizer.template_for(conversation.tools)
        notes = Counter(conversation.notes)
        if any("tool_calls" in message for message in conversation.messages) and "tool_calls" not in template.source:
            raise DroppedError("tool_calls_not_in_template")
        if conversation.tools and "tools" not in template.reads:
            notes["tools_not_in_template"] += 1
        if self._loss == "assistant" and not any(conversation.trained):
            raise DroppedError("no_answer")
        marks = free_marks(conversation.canonical, 4)
        marked = self._control.search(conversation.canonical) is not None
        if marked:
            conversation = self._mark(conversation, marks[2], marks[3])
            notes["special_tokens_as_text"] += 1
        answers = find_answers(template, self._asked(conversation), (marks[0], marks[1]), stream=self.stream)
        if self._loss == "assistant":
            if answers.rewritten:
                notes["answers_rewritten"] += answers.rewritten
            if not answers.spans:
                raise DroppedError("answers_rewritten" if answers.rewritten else "nothing_trained")
        else:
            if answers.rewritten:
                raise DroppedError("left_out_answer_not_found")
            answers = Answers(answers.text, _without(len(answers.text), answers.spans))
        row = self._unmark(answers, marks[2], marks[3]) if marked else Row(answers.text, answers.spans)
        row.notes = notes
        row.spans = (
            [self._without_blank_tail(row, span) for span in row.spans] if self._asks_tail(template) else row.spans
        )
        return row

    def _asks_tail(self, template: Any) -> bool:
        return self._loss == "assistant" and not template.has_generation

    def _asked(self, conversation: Conversation) -> Conversation:
        """For loss "all", the spans to find are those to leave out: answers with weight 0."""
        return conversation if self._loss == "assistant" else replace(conversation, trained=conversation.left_out)

    def _mark(self, conversation: Conversation, start: str, end: str) -> Conversation:
        def mark(value: Any) -> Any:
            if isinstance(value, str):
                return self._control.sub(rf"{start}\g<0>{end}", value)
            if isinstance(value, dict):
                return {key: item if key == "role" else mark(item) for key, item in value.items()}
            return [mark(item) for item in value] if isinstance(value, list) else value

        marked = [mark(message) for message in conversation.messages]
        return replace(conversation, messages=marked, tools=mark(conversation.tools))

    def _unmark(self, answers: Answers, start: str, end: str) -> Row:
        """Take the marks out; raise DroppedError where the template has torn a pair apart or written it otherwise."""
        text = answers.text
        positions = [match.start() for match in re.finditer(f"[{start}{end}]", text)]
        pairs = list(zip(positions[::2], positions[1::2], strict=False))
        whole = len(positions) % 2 == 0 and all(
            text[opened] == start and text[closed] == end and self._control.fullmatch(text, opened + 1, closed)
            for opened, closed in pairs
        )
        if not whole or any(json.dumps(mark)[1:-1] in text for mark in (start, end)):
            raise DroppedError("template_cuts_special_tokens")

        def moved(position: int) -> int:
            return position - bisect_left(positions, position)

        plain = text.replace(start, "").replace(end, "")
        spans = [(moved(first), moved(last)) for first, last in answers.spans]
        return Row(plain, spans, [(moved(opened + 1), moved(closed)) for opened, closed in pairs])

    def _without_blank_tail(self, row: Row, span: Span) -> Span:
        """The span without the blank text behind its end-of-turn token: the model stops at that token."""
        start, end = span
        kept = start + len(row.text[start:end].rstrip())
        at_token = row.text.endswith(self._tokenizer.control_tokens, start, kept)
        return (start, kept) if at_token and not any(last == kept for _, last in row.literals) else span

    def agrees(self, row: Row) -> bool:
        """Whether tiktoken, if it is used, gives the ids of the tokenizer's own library for this row."""
        if not isinstance(self.segments, TiktokenSegments):
            return True
        pieces = [[piece.text for piece in row.pieces() if not piece.literal]]
        return same_ids(self.segments.encode(pieces), self.segments.plain.encode(pieces))

    def encode(self, rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids (int32 [tokens]) and which of them are trained (bool [tokens]) of each row."""
        return self._encode_whole(rows) if self.whole_text else self._encode_segments(rows)

    def _encode_segments(self, rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
        pieces = [row.pieces() for row in rows]
        every = list(chain.from_iterable(pieces))
        encoded = self.segments.encode([[piece.text for piece in row if not piece.literal] for row in pieces])
        if len(every) > len(encoded.lengths):
            literals = [self._literal(piece.text) for piece in every if piece.literal]
            ids, lengths = list(chain.from_iterable(literals)), [len(part) for part in literals]
            of_literals = Encoded(np.asarray(ids, np.int32), np.asarray(lengths, np.int64))
            encoded = merged(np.asarray([piece.literal for piece in every]), encoded, of_literals)
        trained = np.repeat(np.asarray([piece.trained for piece in every], bool), encoded.lengths)
        ends = np.concatenate([[0], np.cumsum(encoded.lengths)])[np.cumsum([0, *map(len, pieces)])].tolist()
        return [(encoded.ids[start:end], trained[start:end]) for start, end in pairwise(ends)]

    def _literal(self, text: str, lead: str = "") -> list[int]:
        """Ids of a control token's text, as text. `lead`: see `_after`."""
        ids = self._after(lead, text, self._plain) if lead else self._plain.encode(text, add_special_tokens=False).ids
        if self._tokenizer.backend.token_to_id(text) in ids:  # a vocabulary entry that its own text is merged into
            raise DroppedError("special_token_has_no_text")
        return list(ids)

    def _encode_whole(self, rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Whole texts; a token is trained when any of its characters is."""
        simple = [row.text for row in rows if not row.literals]
        encoded = iter(self._exact.encode_batch(simple, add_special_tokens=False))
        return [self._encode_around(row) if row.literals else _located(next(encoded), row.spans) for row in rows]

    def _encode_around(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """One row with literals: what stands between them is tokenized as following text, without a blank before it."""
        ids: list[int] = []
        trained: list[bool] = []
        position = 0
        for piece in row.pieces(at_spans=False):
            if piece.literal:
                part = self._literal(piece.text, "\n")
                flags = [any(s <= position < e for s, e in row.spans)] * len(part)
            elif position == 0:
                located = _located(self._exact.encode(piece.text, add_special_tokens=False), row.spans)
                part, flags = located[0].tolist(), located[1].tolist()
            else:
                part, flags = self._located_after("\n", piece.text, position, row.spans)
            ids += part
            trained += flags
            position += len(piece.text)
        return np.asarray(ids, np.int32), np.asarray(trained, bool)

    def _after(self, lead: str, text: str, backend: tokenizers.Tokenizer) -> list[int]:
        """Ids of `text` where it follows `lead`, without those of `lead`."""
        before = backend.encode(lead, add_special_tokens=False).ids
        ids = backend.encode(lead + text, add_special_tokens=False).ids
        if ids[: len(before)] != before:
            return list(backend.encode(text, add_special_tokens=False).ids)
        return list(ids[len(before) :])

    def _located_after(self, lead: str, text: str, position: int, spans: list[Span]) -> tuple[list[int], list[bool]]:
        backend = self._exact
        before = backend.encode(lead, add_special_tokens=False).ids
        encoding = backend.encode(lead + text, add_special_tokens=False)
        shift = position - len(lead)
        ids, trained = _located(encoding, [(start - shift, end - shift) for start, end in spans])
        cut = len(before) if encoding.ids[: len(before)] == before else 0
        return ids[cut:].tolist(), trained[cut:].tolist()


def _stripped(tokenizer: Tokenizer, *lists: str) -> tokenizers.Tokenizer:
    """A copy of the backend without its post-processor, and with the named lists empty."""
    description = {**tokenizer.description, "post_processor": None, **{name: [] for name in lists}}
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _located(encoding: Any, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    trained = np.zeros(len(offsets), bool)
    for start, end in spans:
        trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return np.asarray(encoding.ids, np.int32), trained


def _without(length: int, spans: Sequence[Span]) -> list[Span]:
    """What of [0, length) lies outside `spans`, which are in order."""
    result, position = [], 0
    for start, end in (*spans, (length, length)):
        if start > position:
            result.append((position, start))
        position = max(position, end)
    return result
