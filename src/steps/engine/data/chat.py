"""One row of chat data, checked: a conversation in OpenAI's format, or the named reason why it is none.

Nothing here knows a tokenizer. What a row's text becomes is `spans` and `encoding`'s business.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

#: Why a row is left out, by the name that the report uses.
REASONS: Mapping[str, str] = {
    "malformed_line": "the line is no JSON, or not UTF-8",
    "not_an_object": "the row is no JSON object",
    "messages_missing": "the row has no messages (or they are null)",
    "messages_not_a_list": "messages is no list",
    "messages_empty": "messages is an empty list",
    "message_not_an_object": "a message is no JSON object",
    "unknown_role": f"a role is none of {', '.join(ROLES)}",
    "unsupported_content": "content is neither text, null nor a list of text parts",
    "content_missing": "a message has no content, and no tool calls instead",
    "invalid_weight": "a message's weight is neither 0 nor 1",
    "invalid_tools": "tools is no list of objects",
    "invalid_tool_calls": "tool_calls is no list of calls, or its arguments are no JSON object",
    "invalid_unicode": "text with a lone surrogate, which has no UTF-8 form",
    "tool_calls_not_in_template": "the chat template does not show tool calls: the answer would be lost",
    "template_error": "the chat template refuses the conversation",
    "template_cuts_special_tokens": "a special token written as text does not come through the template whole",
    "special_token_has_no_text": "a special token written as text: the tokenizer knows no other tokens for it",
    "left_out_answer_not_found": "an answer with weight 0 that the template shows differently later on",
    "weights_need_one_span_per_answer": "the template's generation blocks are not one per assistant message",
    "no_answer": "no assistant message that is to be trained (weight 0 and empty ones do not count)",
    "answers_rewritten": "the template shows every answer differently from how it would be generated",
    "nothing_trained": "no trained token is left",
    "truncated_away": "no trained token is left within pack_size",
    "overlong": "longer than pack_size",
}

#: What is worth counting about rows that stay.
NOTES: Mapping[str, str] = {
    "blank_lines": "empty lines (no rows)",
    "truncated": "conversations cut at pack_size",
    "empty_answers": "assistant messages without any text: context only, not trained",
    "answers_rewritten": "answers the template shows differently later on: context only, not trained",
    "tools_not_in_template": "rows whose `tools` the chat template does not show",
    "special_tokens_as_text": "rows with special tokens written in their text, kept as text",
}


#: What an answer may hold instead of content.
_ALSO_SAID = ("tool_calls", "reasoning_content", "thinking", "reasoning")


class DroppedError(Exception):
    """This row is left out. `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or REASONS[reason])
        self.reason = reason


@dataclass
class Conversation:
    """A checked row.

    trained:   for each message whether it is an answer to train.
    left_out:  for each message whether it is an answer with weight 0.
    canonical: the same text for equal rows.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    trained: list[bool]
    left_out: list[bool]
    canonical: str
    notes: Counter[str] = field(default_factory=Counter)


def parse(line: bytes, messages_field: str = "messages", tools_field: str = "tools") -> Conversation:
    """The conversation in one line of JSON. Raises DroppedError."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DroppedError("malformed_line") from error
    if not isinstance(row, dict):
        raise DroppedError("not_an_object")
    messages = row.get(messages_field)
    if messages is None:
        raise DroppedError("messages_missing")
    if not isinstance(messages, list):
        raise DroppedError("messages_not_a_list")
    if not messages:
        raise DroppedError("messages_empty")
    notes: Counter[str] = Counter()
    checked = [_message(message) for message in messages]
    weights = [_weight(message) for message in checked]
    answers = [message["role"] == "assistant" for message in checked]
    trained = [
        answer and weight and _says_something(message, notes)
        for message, answer, weight in zip(checked, answers, weights, strict=True)
    ]
    left_out = [answer and not weight for answer, weight in zip(answers, weights, strict=True)]
    tools = _tools(row.get(tools_field))
    try:
        canonical = json.dumps([checked, tools], ensure_ascii=False, sort_keys=True)
    except RecursionError as error:
        raise DroppedError("malformed_line") from error
    if not _is_unicode(canonical):
        raise DroppedError("invalid_unicode")
    return Conversation(checked, tools, trained, left_out, canonical, notes)


def _message(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DroppedError("message_not_an_object")
    if row.get("role") not in ROLES:
        raise DroppedError("unknown_role")
    message: dict[str, Any] = {key: value for key, value in row.items() if value is not None}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise DroppedError("invalid_tool_calls")
        message["tool_calls"] = [_tool_call(call) for call in calls]
        if not calls:
            del message["tool_calls"]
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "".join(map(_part, content))
    elif content is None and "tool_calls" not in message:
        raise DroppedError("content_missing")
    elif content is not None and not isinstance(content, str):
        raise DroppedError("unsupported_content")
    return message


def _part(part: Any) -> str:
    """The text of one content part; images and sound are not for these models."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DroppedError("unsupported_content")


def _tool_call(call: Any) -> dict[str, Any]:
    """A call with its arguments as an object: OpenAI's API writes them as JSON text, templates expect the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DroppedError("invalid_tool_calls")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise DroppedError("invalid_tool_calls") from error
    if not isinstance(arguments, dict):
        raise DroppedError("invalid_tool_calls")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _weight(message: dict[str, Any]) -> bool:
    """Whether a message's weight is 1. The key is taken out: templates do not know it."""
    if "weight" not in message:
        return True
    weight = message.pop("weight")
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise DroppedError("invalid_weight")
    return bool(weight)


def _says_something(message: Mapping[str, Any], notes: Counter[str]) -> bool:
    if message.get("content") or any(message.get(key) for key in _ALSO_SAID):
        return True
    notes["empty_answers"] += 1
    return False


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions; Parquet files often keep them as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise DroppedError("invalid_tools") from error
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DroppedError("invalid_tools")
    return tools


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
