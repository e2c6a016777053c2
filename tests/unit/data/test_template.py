"""Rendering in the sandbox, and the marks around `{% generation %}` blocks."""

from __future__ import annotations

import pickle
from datetime import datetime

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat import CHATML_GENERATION, say, small_tokenizer

from steps.engine.data.template import ChatTemplate, free_marks, take_marks
from steps.errors import ConfigError


def test_generation_blocks_are_found_and_leave_no_trace_in_the_text():
    template = ChatTemplate(CHATML_GENERATION)
    messages = say("Hi", "Yo", "And?", "No.")
    rendered = template.render_spans(messages)
    assert rendered.text == template.render(messages)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Yo<|im_end|>", "No.<|im_end|>"]


def test_generation_blocks_are_found_inside_a_macro_and_a_set_block():
    source = (
        "{% macro turn(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
        "{% set all %}{% for m in messages %}{{ turn(m) }}{% endfor %}{% endset %}>{{ all }}<"
    )
    rendered = ChatTemplate(source).render_spans([{"role": "assistant", "content": text} for text in ("ab", "", "c")])
    assert rendered.text == ">[ab][][c]<"
    assert rendered.spans == [(2, 4), (6, 6), (8, 9)]


def test_text_with_the_private_use_characters_themselves_is_kept():
    text = "".join(chr(code) for code in range(0x100000, 0x100008))
    rendered = ChatTemplate(CHATML_GENERATION).render_spans(say("q" + text, text))
    assert rendered.text[slice(*rendered.spans[0])] == text + "<|im_end|>"


@given(st.lists(st.text(alphabet="ab\n", max_size=4)), st.text(alphabet="abc\U00100000\U00100001", max_size=5))
def test_marks_come_out_where_they_went_in(parts, rest):
    start, end = free_marks("".join(parts) + rest, 2)
    marked = rest + "".join(start + part + end for part in parts)
    text, spans = take_marks(marked, start, end)
    assert text == rest + "".join(parts)
    assert [text[a:b] for a, b in spans] == parts


@pytest.mark.parametrize("marked", ["<a", "a>", "<a<b>>", ">a<"])
def test_marks_that_are_no_pairs_are_an_error(marked):
    with pytest.raises(ValueError, match="generation block"):
        take_marks(marked, "<", ">")


def test_the_sandbox_holds():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}")
    with pytest.raises(jinja2.exceptions.SecurityError):
        template.render(say("x"))
    with pytest.raises(jinja2.exceptions.SecurityError):
        ChatTemplate("{% set _ = messages.append(1) %}").render(say("x"))


def test_helpers_of_transformers_are_there():
    template = ChatTemplate(
        "{{ {'a': '<ä>'} | tojson }}{% for i in [1, 2] %}{% break %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    assert template.render([]) == '{"a": "<ä>"}' + str(datetime.now().year)
    with pytest.raises(jinja2.TemplateError, match="take turns"):
        ChatTemplate("{{ raise_exception('take turns') }}").render([])


def test_the_clock_can_be_stopped():
    template = ChatTemplate("{{ strftime_now('%d.%m.%Y') }}", now=datetime(2020, 2, 29))
    assert template.render([]) == "29.02.2020"


def test_null_keys_are_absent_keys():
    template = ChatTemplate("{{ messages[0].tool_calls is defined }}")
    assert template.render([{"role": "assistant", "content": "x", "tool_calls": None}]) == "False"


def test_a_broken_template_is_told_with_its_line():
    with pytest.raises(ConfigError, match=r"no valid Jinja2.*line 2"):
        ChatTemplate("ok\n{% for %}")


def test_what_a_template_reads_is_known():
    assert "tools" in ChatTemplate("{% if tools %}{% endif %}").reads
    assert "tools" not in ChatTemplate(CHATML_GENERATION).reads
    assert ChatTemplate(CHATML_GENERATION).has_generation
    assert not ChatTemplate("{{ messages }}").has_generation


def test_a_tokenizer_travels_to_another_process():
    tokenizer = small_tokenizer(CHATML_GENERATION)
    tokenizer.template  # noqa: B018, compiled before it travels
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.render(say("Hi", "Yo")) == tokenizer.render(say("Hi", "Yo"))
    assert copy.digest == tokenizer.digest
