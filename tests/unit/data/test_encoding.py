"""Ids and masks: literals stay text, segments and whole texts, where training begins and ends."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.chat import CHATML, LLAMA3, QWEN25, TEMPLATES, say, small_tokenizer

from steps.engine.data.chat import DroppedError, parse
from steps.engine.data.encoding import Encoder, Row
from steps.engine.data.proofs import segments_fit
from steps.engine.data.tokenizing import longest_document, padded_length, shifted


def conversation(messages, tools=None):
    return parse(json.dumps({"messages": messages, "tools": tools}).encode())


def encoded(tokenizer, messages, loss="assistant", tools=None, **how):
    """(the row, its ids, the text of the trained tokens)"""
    encoder = Encoder(tokenizer, loss, **how)
    row = encoder.render(conversation(messages, tools))
    ids, trained = encoder.encode([row])[0]
    assert ids.dtype == np.int32
    assert trained.dtype == bool
    assert tokenizer.decode(ids.tolist()) == row.text
    return row, ids, tokenizer.decode(ids[trained].tolist())


@pytest.mark.parametrize("whole_text", [False, True])
def test_the_answer_and_its_end_of_turn_token_are_trained_and_nothing_else(whole_text):
    tokenizer = small_tokenizer()
    row, _, trained = encoded(tokenizer, say("Hi", "Yo", "And?", "No."), whole_text=whole_text)
    assert trained == "Yo<|im_end|>No.<|im_end|>"
    assert row.text.endswith("No.<|im_end|>\n")  # the newline is there, and is not trained


@pytest.mark.parametrize("answer", ["\nYo", " Yo", "\n\n Yo\n", "Yo ", "ä€🙂", "a\0b", "a\u2028b"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN25])
def test_awkward_answers_come_through_unchanged(answer, template):
    tokenizer = small_tokenizer(template)
    _, _, trained = encoded(tokenizer, say("Hi", answer))
    shown = answer.strip() if template is LLAMA3 else answer
    assert trained == shown + ("<|eot_id|>" if template is LLAMA3 else "<|im_end|>")


@pytest.mark.parametrize("whole_text", [False, True])
@pytest.mark.parametrize("field", [0, 1])
def test_special_tokens_written_in_a_message_stay_text(whole_text, field):
    tokenizer = small_tokenizer()
    contents = ["Hi", "Yo"]
    contents[field] = "see <|im_end|>\n<|im_start|>system and <s>"
    row, ids, trained = encoded(tokenizer, say(*contents), whole_text=whole_text)
    control = [tokenizer.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", "<s>")]
    assert [int((ids == id).sum()) for id in control] == [2, 2, 0]  # those of the template
    assert [row.text[start:end] for start, end in row.literals] == ["<|im_end|>", "<|im_start|>", "<s>"]
    assert row.notes["special_tokens_as_text"] == 1
    assert trained == contents[1] + "<|im_end|>"


def test_special_tokens_in_tools_and_arguments_stay_text():
    tokenizer = small_tokenizer(QWEN25)
    call = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"function": {"name": "f", "description": "ends with <|im_end|>"}}]
    row, ids, trained = encoded(tokenizer, messages, tools=tools)
    assert len(row.literals) == 2
    assert int((ids == tokenizer.eos_token_id).sum()) == 3
    assert trained.count("<|im_end|>") == 2


def test_an_answer_that_ends_with_the_text_of_a_special_token_keeps_the_real_one_trained():
    tokenizer = small_tokenizer()
    _, ids, trained = encoded(tokenizer, say("Hi", "write <|im_end|>"))
    assert trained == "write <|im_end|><|im_end|>"
    assert int((ids == tokenizer.eos_token_id).sum()) == 2


def test_a_template_that_tears_a_special_token_apart_loses_the_row_under_its_name():
    source = CHATML.replace("message['content']", "(message['content'] | replace('im_', 'am_'))")
    with pytest.raises(DroppedError) as caught:
        encoded(small_tokenizer(source), say("Hi <|im_end|>", "Yo"))
    assert caught.value.reason == "template_cuts_special_tokens"
    escaped = CHATML.replace("message['content']", "(message['content'] | tojson(ensure_ascii=true))")
    with pytest.raises(DroppedError) as caught:
        encoded(small_tokenizer(escaped), say("Hi <|im_end|>", "Yo"))
    assert caught.value.reason == "template_cuts_special_tokens"


def test_a_template_that_writes_bos_gives_one_bos():
    tokenizer = small_tokenizer(LLAMA3)
    from tokenizers.processors import TemplateProcessing

    # A tokenizer that adds BOS by itself, as Llama's does.
    tokenizer.backend.post_processor = TemplateProcessing("<s> $A", None, [("<s>", tokenizer.bos_token_id)])
    for whole_text in (False, True):
        _, ids, _ = encoded(tokenizer, say("Hi", "Yo"), whole_text=whole_text)
        assert int((ids == tokenizer.bos_token_id).sum()) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_loss_all_trains_everything_but_answers_with_weight_0():
    tokenizer = small_tokenizer()
    messages = say("Hi", "Yo", "And?", "No.")
    row, _, trained = encoded(tokenizer, messages, loss="all")
    assert trained == row.text
    messages[1]["weight"] = 0
    for template in (CHATML, TEMPLATES["chatml_generation"]):
        row, _, trained = encoded(small_tokenizer(template), messages, loss="all")
        assert "Yo" not in trained
        assert trained.replace("No.", "").count("assistant\n") == 2
    assert encoded(tokenizer, say("only a question"), loss="all")[2] == "<|im_start|>user\nonly a question<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "system", "content": "x"}], "no_answer"),
        (say("only a question"), "no_answer"),
        (say("Hi", ""), "no_answer"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}], "no_answer"),
    ],
)
def test_rows_without_an_answer_to_train(messages, reason):
    with pytest.raises(DroppedError) as caught:
        encoded(small_tokenizer(), messages)
    assert caught.value.reason == reason


def test_a_question_at_the_end_is_context_only():
    assert encoded(small_tokenizer(), say("Hi", "Yo", "And?"))[2] == "Yo<|im_end|>"


def test_the_same_role_twice_running_trains_both_answers():
    messages = [*say("Hi", "Yo"), {"role": "assistant", "content": "Well."}]
    assert encoded(small_tokenizer(), messages)[2] == "Yo<|im_end|>Well.<|im_end|>"


def test_tool_calls_that_the_template_does_not_show_lose_the_row_and_tools_are_noted():
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DroppedError) as caught:
        encoded(small_tokenizer(), messages)
    assert caught.value.reason == "tool_calls_not_in_template"
    row, _, _ = encoded(small_tokenizer(), say("Hi", "Yo"), tools=[{"name": "f"}])
    assert row.notes == {"tools_not_in_template": 1}


def test_mentioning_a_tool_call_loses_nothing():
    _, _, trained = encoded(small_tokenizer(QWEN25), say("what is <tool_call>?", "A marker: <tool_call>."))
    assert trained == "A marker: <tool_call>.<|im_end|>"


def test_segments_differ_from_the_whole_text_only_at_cuts():
    tokenizer = small_tokenizer()
    rows = [Encoder(tokenizer, "assistant").render(conversation(say("Hi", answer))) for answer in ("Yo", "\nYo", " Yo")]
    assert segments_fit(tokenizer, rows)


def test_segments_do_not_fit_a_tokenizer_that_puts_a_blank_before_a_text():
    from tokenizers import decoders, pre_tokenizers

    tokenizer = small_tokenizer()
    tokenizer.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend.decoder = decoders.ByteLevel()
    rows = [Encoder(tokenizer, "assistant").render(conversation(say("Hi", "Yo")))]
    assert not segments_fit(tokenizer, rows)


def test_pieces_know_what_they_are():
    row = Row("abcdefgh", [(2, 4), (4, 7)], [(5, 6)])
    assert [(piece.text, piece.trained, piece.literal) for piece in row.pieces()] == [
        ("ab", False, False), ("cd", True, False), ("e", True, False), ("f", True, True), ("g", True, False),
        ("h", False, False),
    ]  # fmt: skip
    assert [piece.text for piece in row.pieces(at_spans=False)] == ["abcde", "f", "gh"]


def test_the_stored_mask_is_shifted():
    assert shifted(np.asarray([1, 0, 1, 1], bool)).tolist() == [0, 1, 1, 0]
    assert shifted(np.asarray([True])).tolist() == [0]
    assert shifted(np.asarray([], bool)).tolist() == []


@pytest.mark.parametrize("multiple", [1, 2, 8, 16])
@pytest.mark.parametrize("pack_size", [17, 64, 100])
def test_padded_documents_divide_without_their_last_token_and_fit(multiple, pack_size):
    longest = longest_document(pack_size, multiple)
    assert padded_length(longest, multiple) <= pack_size < padded_length(longest + 1, multiple)
    for length in range(1, longest + 1):
        padded = padded_length(length, multiple)
        assert 0 <= padded - length < multiple
        assert multiple == 1 or (padded - 1) % multiple == 0
