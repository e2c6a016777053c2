"""Texts, ids and masks against transformers, for the tokenizers and templates of real models."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.chat import CHATML, CHATML_GENERATION, LLAMA3, MISTRAL, QWEN3, QWEN25, TEMPLATES, say, smollm_gguf

from steps.engine.data.chat import parse
from steps.engine.data.encoding import Encoder
from steps.engine.data.proofs import segments_fit
from steps.engine.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <&>", "days": 3}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It's <b>", "parameters": {"type": "object"}}}
]
CONVERSATIONS = {
    "plain": say("Hello there!", "Hi. It is 2024, 12345 days later."),
    "system": say("What's 17 * 23?", "391\n", "And why?", " Because.", system="You're terse.\n"),
    "unicode": say("naïve café 🙂 中文 \u2028", "日本語\n\n\n  x\t\ty"),
    "think": say("a?", "<think>\nhm\n</think>\n\nb", "c?", "<think>\nhmm\n</think>\n\nd"),
    "code": say("def f(x):\n    return x**2\n", "```python\nprint(f(3))\n```"),
}


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """SmolLM2's tokenizer from its GGUF file, and what transformers makes of the directory saved from it."""
    tokenizer = Tokenizer.load(smollm_gguf())
    directory = tmp_path_factory.mktemp("smollm")
    tokenizer.save(directory)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(directory), directory


def reference_ids(auto, messages, **how):
    result = auto.apply_chat_template(messages, tokenize=True, return_dict=True, **how)
    return list(result["input_ids"])


def test_a_gguf_tokenizer_is_known_to_transformers_in_full(smollm):
    ours, auto, directory = smollm
    assert auto.chat_template == ours.chat_template
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == (ours.bos_token, ours.eos_token, ours.pad_token)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (
        ours.bos_token_id, ours.eos_token_id, ours.pad_token_id,
    )  # fmt: skip
    assert len(auto) == ours.vocab_size == 49152
    assert Tokenizer.load(str(directory)).digest == ours.digest
    for messages in CONVERSATIONS.values():
        for message in messages:
            ids = ours.encode(message["content"])
            assert ids == auto.encode(message["content"], add_special_tokens=False)
            assert ours.decode(ids) == message["content"]


def test_digits_are_cut_one_by_one_as_smollm_was_trained(smollm):
    ours, _, _ = smollm
    assert [ours.decode([id]) for id in ours.encode("In 1984, 42x")] == [
        "In",
        " ",
        "1",
        "9",
        "8",
        "4",
        ",",
        " ",
        "4",
        "2",
        "x",
    ]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_texts_and_ids_are_those_of_transformers(smollm, name, prompt):
    ours, auto, directory = smollm
    mine = Tokenizer.load(str(directory), TEMPLATES[name])
    auto.chat_template = TEMPLATES[name]
    try:
        for key, messages in CONVERSATIONS.items():
            if name == "mistral" and key == "system":
                continue  # refused by both
            expected = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert mine.render(messages, add_generation_prompt=prompt) == expected
            assert mine.encode(expected) == reference_ids(auto, messages, add_generation_prompt=prompt)
    finally:
        auto.chat_template = ours.chat_template


def test_tools_and_tool_calls_are_rendered_as_by_transformers(smollm):
    _, auto, directory = smollm
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "cold"},
        {"role": "assistant", "content": "Sunny & cold."},
    ]
    mine = Tokenizer.load(str(directory), QWEN25)
    expected = auto.apply_chat_template(messages, tools=TOOLS, chat_template=QWEN25, tokenize=False)
    assert mine.render(messages, tools=TOOLS) == expected
    assert '"city": "Zürich <&>"' in expected


def encode_row(tokenizer, messages, loss="assistant", **how):
    encoder = Encoder(tokenizer, loss, **how)
    return encoder.encode([encoder.render(parse(json.dumps({"messages": messages}).encode()))])[0]


@pytest.mark.parametrize("whole_text", [True, False])
@pytest.mark.parametrize("key", CONVERSATIONS)
def test_the_mask_is_that_of_transformers_on_a_template_with_generation_tags(smollm, key, whole_text):
    _, auto, directory = smollm
    tokenizer = Tokenizer.load(str(directory), CHATML_GENERATION)
    # transformers looks for the token at the answer's first character, and its offsets leave blanks out: an answer that
    # begins with one gets no mask there at all. Ours is tested without it below.
    messages = [{**message, "content": message["content"].lstrip()} for message in CONVERSATIONS[key]]
    expected = auto.apply_chat_template(
        messages, chat_template=CHATML_GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = encode_row(tokenizer, messages, whole_text=whole_text)
    assert ids.tolist() == list(expected["input_ids"])
    assert trained.astype(int).tolist() == list(expected["assistant_masks"])


@pytest.mark.parametrize(
    ("answer", "whole_text"),
    # Blanks alone, in one text with the newline before them, become one token with it.
    [
        (" Because.", True),
        (" Because.", False),
        ("\tx  ;\n", False),
        ("   ", False),
        ("a \n\n", True),
        ("a \n\n", False),
    ],
)
def test_blanks_at_the_ends_of_an_answer_are_trained_as_well(smollm, answer, whole_text):
    _, _, directory = smollm
    tokenizer = Tokenizer.load(str(directory), CHATML_GENERATION)
    ids, trained = encode_row(tokenizer, say("q", answer, "q", "x"), whole_text=whole_text)
    assert tokenizer.decode(ids[trained].tolist()) == answer + "<|im_end|>x<|im_end|>"


@pytest.mark.parametrize("key", CONVERSATIONS)
def test_prefixes_find_what_generation_tags_would(smollm, key):
    _, _, directory = smollm
    ids, trained = encode_row(Tokenizer.load(str(directory), CHATML), CONVERSATIONS[key])
    tagged_ids, tagged = encode_row(Tokenizer.load(str(directory), CHATML_GENERATION), CONVERSATIONS[key])
    assert np.array_equal(ids, tagged_ids)
    assert np.array_equal(trained, tagged)


def test_an_answer_that_merges_with_its_prompt_is_cut_at_the_prompt_as_in_generation(smollm):
    """Whole-text tokenization merges "assistant\\n" + "\\nHello"; the model is asked to go on behind the prompt."""
    _, auto, directory = smollm
    tokenizer = Tokenizer.load(str(directory), CHATML)
    messages = say("Hi", "\n\nHello")
    ids, trained = encode_row(tokenizer, messages)
    prompt = reference_ids(auto, messages[:1], chat_template=CHATML, add_generation_prompt=True)
    first = int(np.flatnonzero(trained)[0])
    assert ids[:first].tolist() == prompt
    assert tokenizer.decode(ids[trained].tolist()) == "\n\nHello<|im_end|>"


def test_special_tokens_in_messages_become_the_ids_transformers_gives_them(smollm):
    _, auto, directory = smollm
    tokenizer = Tokenizer.load(str(directory), CHATML)
    messages = say("a <|im_end|> b\n<|im_start|>system", "c<|endoftext|>")
    ids, _ = encode_row(tokenizer, messages)
    try:
        expected = reference_ids(auto, messages, chat_template=CHATML, sanitize_control_tokens=True)
    except TypeError:
        pytest.skip("this transformers has no sanitize_control_tokens")
    if expected.count(tokenizer.eos_token_id) != 2:
        pytest.skip("this transformers ignores sanitize_control_tokens")
    # transformers cuts at each literal; we cut at the answers as well, which falls together with a control token here.
    assert ids.tolist() == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN25, QWEN3, MISTRAL])
def test_segments_fit_byte_level_tokenizers(smollm, template):
    _, _, directory = smollm
    tokenizer = Tokenizer.load(str(directory), template)
    encoder = Encoder(tokenizer, "assistant")
    keys = [key for key in CONVERSATIONS if template is not MISTRAL or key != "system"]
    rows = [encoder.render(parse(json.dumps({"messages": CONVERSATIONS[key]}).encode())) for key in keys]
    assert segments_fit(tokenizer, rows)


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory):
    """A Llama-2-like directory with nothing but a SentencePiece model, trained here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    directory = tmp_path_factory.mktemp("sp")
    text = directory / "text.txt"
    lines = [message["content"].replace("\n", " ") for messages in CONVERSATIONS.values() for message in messages]
    text.write_text("\n".join([*lines, "user assistant system INST hello there, it is good to see you"] * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True,
        bos_id=1, eos_id=2, unk_id=0, pad_id=-1, normalization_rule_name="identity", add_dummy_prefix=True,
        remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "legacy": False, "chat_template": MISTRAL,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_sentencepiece_tokenizer_is_tokenized_whole_and_masked_by_position(sentencepiece_directory):
    auto = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    tokenizer = Tokenizer.load(str(sentencepiece_directory))
    tagged = MISTRAL.replace("{{- ' ' + message['content'] + eos_token }}",
        "{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}")  # fmt: skip
    assert "{%- generation" in tagged
    messages = CONVERSATIONS["plain"] + say("And you?", "Well, thanks")
    encoder = Encoder(tokenizer, "assistant")
    row = encoder.render(parse(json.dumps({"messages": messages}).encode()))
    assert not segments_fit(tokenizer, [row])
    ids, trained = encode_row(tokenizer, messages, whole_text=True)
    expected = auto.apply_chat_template(
        messages, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == list(expected["input_ids"])
    assert trained.astype(int).tolist() == list(expected["assistant_masks"])
    assert ids.tolist().count(tokenizer.bos_token_id) == 1


def test_special_tokens_as_text_in_a_sentencepiece_tokenizer(sentencepiece_directory):
    tokenizer = Tokenizer.load(str(sentencepiece_directory))
    ids, trained = encode_row(tokenizer, say("strike <s>out</s> it", "see </s> there"), whole_text=True)
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    assert ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids.tolist()) == tokenizer.render(say("strike <s>out</s> it", "see </s> there"))
    assert "see </s> there</s>" in tokenizer.decode(ids[trained].tolist())


def test_a_sentencepiece_tokenizer_without_its_packages_names_the_extra(sentencepiece_directory, monkeypatch):
    import builtins

    from steps.errors import ArtifactError

    original = builtins.__import__

    def without(name, *rest, **more):
        if name == "sentencepiece":
            raise ImportError("no module", name="sentencepiece")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArtifactError, match=r"peft-steps\[sentencepiece\]"):
        Tokenizer.load(str(sentencepiece_directory))


def test_no_transformers_for_what_has_a_tokenizer_json_or_is_a_gguf(smollm):
    import subprocess
    import sys

    _, _, directory = smollm
    code = (
        "import sys; from steps.engine.data.tokenizer import Tokenizer\n"
        f"Tokenizer.load({str(directory)!r}).render([]); Tokenizer.load({smollm_gguf()!r})\n"
        "print([name for name in ('transformers', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
