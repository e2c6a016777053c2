"""Answers in a rendered conversation: the one-pass way against rendering every prefix, and what is refused."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat import CHATML, LLAMA3, MISTRAL, QWEN3, QWEN25, TEMPLATES, say

from steps.engine.data.chat import DroppedError, parse
from steps.engine.data.spans import _streamed, find_answers
from steps.engine.data.template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def conversation(messages, tools=None):
    return parse(json.dumps({"messages": messages, "tools": tools}).encode())


@cache
def template(source):
    return ChatTemplate(source, SPECIAL)


def answers(source, messages, tools=None, **how):
    found = find_answers(template(source), conversation(messages, tools), **how)
    return [found.text[start:end] for start, end in found.spans]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, ["Yo<|im_end|>\n", "No.<|im_end|>\n"]),
        (LLAMA3, ["Yo<|eot_id|>", "No.<|eot_id|>"]),
        (QWEN25, ["Yo<|im_end|>\n", "No.<|im_end|>\n"]),
        (MISTRAL, [" Yo</s>", " No.</s>"]),
    ],
)
def test_answers_reach_from_the_prompt_to_the_end_of_the_turn(source, expected):
    assert answers(source, say("Hi", "Yo", "And?", "No.")) == expected


def test_content_that_the_template_trims_is_found_trimmed():
    assert answers(LLAMA3, say("Hi", "\n Yo \n", "And?", " No.")) == ["Yo<|eot_id|>", "No.<|eot_id|>"]


def test_an_answer_that_is_shown_differently_later_is_context_only():
    messages = say("Hi", "<think>\nhm\n</think>\n\nYo", "And?", "<think>\nwell\n</think>\n\nNo.")
    found = find_answers(template(QWEN3), conversation(messages))
    assert [found.text[start:end] for start, end in found.spans] == ["<think>\nwell\n</think>\n\nNo.<|im_end|>\n"]
    assert found.rewritten == 1
    assert "hm" not in found.text


def test_weight_0_is_context_only_with_and_without_generation_blocks():
    messages = say("Hi", "Yo", "And?", "No.")
    messages[1]["weight"] = 0
    assert answers(CHATML, messages) == ["No.<|im_end|>\n"]
    assert answers(TEMPLATES["chatml_generation"], messages) == ["No.<|im_end|>"]


def test_weights_need_one_block_for_each_answer():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}!{% endgeneration %}{% endif %}{% endfor %}"
    )
    messages = say("Hi", "Yo", "And?", "No.")
    assert answers(source, messages) == ["Yo", "!", "No.", "!"]
    messages[1]["weight"] = 0
    with pytest.raises(DroppedError) as caught:
        answers(source, messages)
    assert caught.value.reason == "weights_need_one_span_per_answer"


def test_tool_calls_and_neighbouring_results():
    calls = [{"function": {"name": "weather", "arguments": {"city": city}}} for city in ("Paris", "Berlin")]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "cloudy"},
        {"role": "assistant", "content": "Mixed."},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    found = answers(QWEN25, messages, tools)
    assert found[1:] == ["Mixed.<|im_end|>\n"]
    assert found[0].startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}')
    assert found[0].endswith('"Berlin"}}\n</tool_call><|im_end|>\n')


def test_an_assistant_that_speaks_first_is_trained_where_the_empty_prompt_is_its_prefix():
    first = [{"role": "assistant", "content": "Hello!"}, *say("Hi", "Yo")]
    assert answers(CHATML, first) == ["Hello!<|im_end|>\n", "Yo<|im_end|>\n"]
    greeting = "{% for m in messages %}{% if loop.first %}Dear {% endif %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    greeting += "{% if add_generation_prompt %}assistant: {% endif %}"
    found = find_answers(template(greeting), conversation(first))
    assert [found.text[start:end] for start, end in found.spans] == ["Yo|"]
    assert found.rewritten == 1


def test_a_refusing_template_drops_the_row_with_its_words():
    with pytest.raises(DroppedError, match="take turns") as caught:
        answers(MISTRAL, [*say("Hi"), *say("Hi", "Yo")])
    assert caught.value.reason == "template_error"


TEXTS = st.text(alphabet="ab \n<>|", max_size=6)
TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXTS, st.booleans()), min_size=1, max_size=7
)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chatml_generation"])
@given(turns=TURNS)
@settings(max_examples=60, deadline=None)
def test_one_pass_finds_what_rendering_every_prefix_finds(name, turns):
    messages = [{"role": role, "content": text, "weight": int(weight)} for role, text, weight in turns]
    row = conversation(messages)
    try:
        slow = find_answers(template(TEMPLATES[name]), row, stream=False)
    except DroppedError:
        with pytest.raises(DroppedError):
            find_answers(template(TEMPLATES[name]), row)
        return
    assert find_answers(template(TEMPLATES[name]), row) == slow


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen25"])
def test_the_one_pass_way_is_really_taken(name):
    row = conversation(say("Hi", "Yo", "And?", "No.", system="Be kind."))
    assert _streamed(template(TEMPLATES[name]), row) == find_answers(template(TEMPLATES[name]), row, stream=False)


@pytest.mark.parametrize(
    "ahead",
    [
        "{% if loop.last %}.{% endif %}", "{{ loop.length }}", "{{ loop['revindex'] }}", "{{ messages | length }}",
        "{{ messages[-1].content }}", "{{ (messages[loop.index] or message).content }}",
        "{% if loop.nextitem is defined %}+{% endif %}",
        "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ messages[1:2] | length }}",
    ],
)  # fmt: skip
def test_a_template_that_looks_ahead_is_not_taken_in_one_pass(ahead):
    source = "{% for message in messages %}" + ahead + "{{ message.role + message.content }}{% endfor %}"
    row = conversation(say("Hi", "Yo", "And?", "No."))
    assert _streamed(template(source), row) is None
    assert find_answers(template(source), row) == find_answers(template(source), row, stream=False)
