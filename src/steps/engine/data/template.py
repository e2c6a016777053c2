"""Chat templates: Jinja2 in a sandbox, rendered as transformers renders them, with the answers' places known.

A template comes with a model and is code of a stranger: it runs in Jinja's immutable sandbox and sees plain JSON
values.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steps.errors import ConfigError

#: What can go wrong inside a stranger's template: Jinja's own errors, and Python's on values it did not expect.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RuntimeError,
)

# Private-use characters of plane 16. A pair that occurs in the rendered values is never used (see `free_marks`).
_PRIVATE_USE = range(0x100000, 0x10FFFE)
_PLANE_16 = re.compile("[\U00100000-\U0010ffff]")

_LOOKING_AHEAD = ("last", "nextitem", "length", "revindex", "revindex0")
_OF_LOOPS = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))
_OF_DICTS = frozenset(dir(dict))

#: What the template sees the marks around a generation block as.
_MARKS = ("__generation_start__", "__generation_end__")

Message = Mapping[str, Any]


class Rendered(NamedTuple):
    """A rendered conversation. spans: (start, end) character positions of what `{% generation %}` blocks produced."""

    text: str
    spans: list[tuple[int, int]]


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what stands inside is an answer of the model.

    The block's output is wrapped in two marks which `ChatTemplate.render_spans` takes out again. Counting characters
    while the blocks come out goes wrong as soon as a template renders through a macro or a `{% set %}` block.
    """

    tags = {"generation"}  # noqa: RUF012, Jinja's own class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.Name(name, "load")]) for name in _MARKS)
        return nodes.Scope([start, *body, end]).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which notes whether a loop was asked for what is still to come (`loop.last`, `loop.length`, …)."""

    looked_ahead = False

    # Nearly all that templates read are keys of plain dicts and public facts about loops. For these the sandbox's way
    # to the same answer is most of the time that rendering takes: 5 of 8 microseconds a message of SmolLM2's template.

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTS:
            return obj[attribute]
        if isinstance(obj, LoopContext):
            self.looked_ahead |= attribute in _LOOKING_AHEAD
            if attribute in _OF_LOOPS:
                return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict:
            try:
                return obj[argument]
            except (TypeError, LookupError):
                return super().getitem(obj, argument)
        if isinstance(obj, LoopContext):
            self.looked_ahead |= argument in _LOOKING_AHEAD
        return super().getitem(obj, argument)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML pages.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled chat template.

    source:    Jinja2 text.
    variables: names the template sees besides the conversation (bos_token, eos_token, …).
    now:       what `strftime_now` tells; the present when None. Packing fixes it: a template that writes today's date
               must not give other rows after midnight.
    Raises ConfigError when the text is no Jinja2.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, now: datetime | None = None) -> None:
        self.source, self.variables, self.now = source, dict(variables or {}), now
        self._environment = environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: (self.now or datetime.now()).strftime(pattern)
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is no valid Jinja2: {error.message} (line {error.lineno})") from error
        #: Names that the template reads but does not define: "tools" among them means that it can show tools.
        self.reads: frozenset[str] = frozenset(meta.find_undeclared_variables(tree))
        self.has_generation = any(name.name in _MARKS for name in tree.find_all(nodes.Name))

    @property
    def digest(self) -> str:
        """sha256 of the source."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text. Raises one of TEMPLATE_ERRORS where the template does."""
        return self._render(messages, tools, add_generation_prompt, None)

    def render_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, marks: tuple[str, str] | None = None
    ) -> Rendered:
        """The conversation as text and where its `{% generation %}` blocks stand.

        marks: two characters that occur nowhere in the values (`free_marks`); found here when not given.
        """
        start, end = marks or free_marks(json.dumps([list(messages), tools], ensure_ascii=False), 2)
        return take_marks(self._render(messages, tools, False, (start, end)), start, end)

    def stream(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Iterator[str]:
        """`render` piece by piece, with `messages` handed to the template as it is (see `watch`)."""
        self._environment.looked_ahead = False
        yield from self._template.generate(self._context(messages, tools, False, None))

    @property
    def looked_ahead(self) -> bool:
        """Whether the last `stream` asked a loop for what is still to come."""
        return self._environment.looked_ahead

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool, marks: tuple[str, str] | None
    ) -> str:
        # A key that is null is a key that is not there, as in transformers: APIs write `tool_calls: null`.
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._template.render(self._context(present, tools, prompt, marks))

    def _context(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool, marks: tuple[str, str] | None
    ) -> dict[str, Any]:
        conversation = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        return {**self.variables, **conversation, **dict(zip(_MARKS, marks or ("", ""), strict=True))}


def free_marks(text: str, count: int) -> tuple[str, ...]:
    """`count` private-use characters that do not occur in `text`."""
    if text.isascii() or not _PLANE_16.search(text):
        return tuple(map(chr, range(_PRIVATE_USE.start, _PRIVATE_USE.start + count)))
    used = set(text)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return tuple(next(free) for _ in range(count))


def take_marks(text: str, start: str, end: str) -> Rendered:
    """Take the marks out of `text`; the spans are in the text without them.

    Raises ValueError when marks do not come in pairs: a template that cuts its own generation block in two.
    """
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    length, opened = 0, -1
    for piece in _split_keeping(text, start, end):
        if piece == start and opened < 0:
            opened = length
        elif piece == end and opened >= 0:
            spans.append((opened, length))
            opened = -1
        elif piece in (start, end):
            raise ValueError("generation blocks do not come out in pairs")
        else:
            plain.append(piece)
            length += len(piece)
    if opened >= 0:
        raise ValueError("a generation block does not end")
    return Rendered("".join(plain), spans)


def _split_keeping(text: str, start: str, end: str) -> list[str]:
    pieces: list[str] = []
    for index, part in enumerate(text.split(start)):
        if index:
            pieces.append(start)
        for position, inner in enumerate(part.split(end)):
            if position:
                pieces.append(end)
            if inner:
                pieces.append(inner)
    return pieces
