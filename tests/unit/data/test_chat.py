"""Every way a row can be wrong has its name."""

from __future__ import annotations

import json

import pytest

from steps.engine.data.chat import REASONS, DroppedError, parse

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def row(*messages, **more):
    return {"messages": list(messages), **more}


def calling(**function):
    return row(USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", **function}}]})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"messages": [', "malformed_line"),
        (b"\xff\xfe{}", "malformed_line"),
        (b"[" * 100_000, "malformed_line"),
        ([1], "not_an_object"),
        ("text", "not_an_object"),
        ({"conversation": []}, "messages_missing"),
        ({"messages": None}, "messages_missing"),
        ({"messages": "hello"}, "messages_not_a_list"),
        ({"messages": {"role": "user"}}, "messages_not_a_list"),
        ({"messages": []}, "messages_empty"),
        (row(USER, "answer"), "message_not_an_object"),
        (row({"content": "x"}), "unknown_role"),
        (row({"role": "wizard", "content": "x"}), "unknown_role"),
        (row({"role": ["user"], "content": "x"}), "unknown_role"),
        (row(USER, {"role": "assistant", "content": None}), "content_missing"),
        (row(USER, {"role": "assistant"}), "content_missing"),
        (row(USER, {"role": "assistant", "content": None, "tool_calls": []}), "content_missing"),
        (row(USER, {"role": "assistant", "content": 7}), "unsupported_content"),
        (row({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER), "unsupported_content"),
        (row({"role": "user", "content": [3]}, ANSWER), "unsupported_content"),
        (row(USER, {**ANSWER, "weight": 0.5}), "invalid_weight"),
        (row(USER, {**ANSWER, "weight": "1"}), "invalid_weight"),
        (row(USER, ANSWER, tools="{"), "invalid_tools"),
        (row(USER, ANSWER, tools=["f"]), "invalid_tools"),
        (row(USER, {"role": "assistant", "tool_calls": "f()"}), "invalid_tool_calls"),
        (row(USER, {"role": "assistant", "tool_calls": [{}]}), "invalid_tool_calls"),
        (calling(arguments="{not json"), "invalid_tool_calls"),
        (calling(arguments="[1]"), "invalid_tool_calls"),
        (calling(arguments=3), "invalid_tool_calls"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_unicode"),
    ],
)
def test_a_bad_row_is_dropped_under_its_name(data, reason):
    with pytest.raises(DroppedError) as caught:
        parse(data if isinstance(data, bytes) else json.dumps(data).encode())
    assert caught.value.reason == reason
    assert reason in REASONS


def read(*messages, **more):
    return parse(json.dumps(row(*messages, **more)).encode())


def test_arguments_become_objects_whichever_way_they_are_written():
    for arguments in ('{"x": 1}', {"x": 1}):
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        assert read(USER, message).messages[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": 1}}}]
    assert read(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}).messages[1]["tool_calls"][0][
        "function"
    ] == {"name": "f", "arguments": {}}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}]
    assert read({"role": "user", "content": parts}, ANSWER).messages[0]["content"] == "abc"


def test_weights_decide_what_is_trained_and_are_not_shown_to_templates():
    conversation = read(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1.0}, USER, ANSWER)
    assert conversation.trained == [False, False, False, True, False, True]
    assert conversation.left_out == [False, True, False, False, False, False]
    assert all("weight" not in message for message in conversation.messages)


def test_an_empty_answer_is_context_only():
    conversation = read(USER, {"role": "assistant", "content": ""}, USER, ANSWER)
    assert conversation.trained == [False, False, False, True]
    assert conversation.notes == {"empty_answers": 1}


def test_equal_conversations_have_one_canonical_text_whatever_their_weights_and_key_order():
    one = parse(b'{"messages": [{"role": "user", "content": "q"}, {"content": "a", "role": "assistant", "weight": 0}]}')
    assert one.canonical == read(USER, ANSWER, id=7).canonical
    assert one.canonical != read(USER, {**ANSWER, "content": "b"}).canonical


def test_other_field_names_and_tools_as_json_text():
    data = json.dumps({"chat": [USER, ANSWER], "functions": '[{"name": "f"}]'}).encode()
    conversation = parse(data, "chat", "functions")
    assert conversation.tools == [{"name": "f"}]
    assert read(USER, ANSWER, tools=[]).tools is None


def test_nul_and_line_separators_are_ordinary_text():
    assert read({"role": "user", "content": "a\0b\u2028c\r\n"}, ANSWER).messages[0]["content"] == "a\0b\u2028c\r\n"
