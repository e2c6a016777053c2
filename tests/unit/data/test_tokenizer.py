"""A tokenizer is the same wherever it is loaded from, and what cannot be loaded exactly is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFWriter
from support.chat import CHATML, LLAMA3, save_small_tokenizer, say, small_tokenizer

from steps.engine.data.tokenizer import Tokenizer
from steps.errors import ArtifactError, ConfigError

WORDS = "the lazy dog's 2024 cats, DON'T  run\n\n\tüber 12345!!"


def write_gguf(path, pre="smollm", kind="gpt2", **more):
    """A small GGUF file with nothing but a tokenizer."""
    description = json.loads(small_tokenizer().backend.to_str())
    special = {token["content"]: token["special"] for token in description["added_tokens"]}
    vocab = small_tokenizer().backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer = GGUFWriter(path, "llama")
    if kind:
        writer.add_tokenizer_model(kind)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([{True: 3, False: 4, None: 1}[special.get(token)] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    writer.add_bos_token_id(vocab["<s>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_chat_template(CHATML)
    writer.add_context_length(512)
    for name, value in more.items():
        getattr(writer, name)(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_tokenizer_and_the_directory_saved_from_it_are_one(tmp_path):
    original = Tokenizer.load(str(write_gguf(tmp_path / "m.gguf")))
    original.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for place in (tmp_path, tmp_path / "saved", tmp_path / "saved/tokenizer.json"):
        again = Tokenizer.load(str(place))
        assert again.digest == original.digest
        assert again.chat_template_digest == original.chat_template_digest
        assert again.special_tokens == original.special_tokens
        assert again.encode(WORDS + "<|im_end|>") == original.encode(WORDS + "<|im_end|>")
    assert original.decode(original.encode(WORDS)) == WORDS
    assert (original.eos_token, original.pad_token, original.pad_token_id) == ("<|im_end|>", None, None)
    assert original.encode("<|im_end|>") == [original.eos_token_id]
    assert original.backend.id_to_token(original.encode("<think>")[0]) == "<think>"
    assert original.vocab_size == small_tokenizer().vocab_size
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["model_max_length"] == 512


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        ("smollm", "In 1984 we'd", ["In", "Ġ", "1", "9", "8", "4", "Ġwe", "'d"]),
        ("gpt-2", "In 1984 we'd", ["In", "Ġ1984", "Ġwe", "'d"]),
        ("llama-bpe", "In 1984 WE'D", ["In", "Ġ", "198", "4", "ĠWE", "'D"]),
        ("qwen2", "In 1984 WE'D", ["In", "Ġ", "1", "9", "8", "4", "ĠWE", "'D"]),
        ("tekken", "HelloWorld 12/\n", ["Hello", "World", "Ġ", "1", "2", "/Ċ"]),
        ("smollm", "a  b\n\n c", ["a", "Ġ", "Ġb", "ĊĊ", "Ġc"]),
        ("llama-bpe", "a  b\n\n c", ["a", "Ġ", "Ġb", "ĊĊ", "Ġc"]),
        ("qwen2", "!!\n\nok", ["!!ĊĊ", "ok"]),
        ("gpt-2", "!!\n\nok", ["!!", "Ċ", "Ċ", "ok"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(tmp_path, pre, text, cuts):
    tokenizer = Tokenizer.load(str(write_gguf(tmp_path / "m.gguf", pre)))
    assert [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)] == cuts


def test_a_whole_vocabulary_entry_needs_no_merges_where_the_model_says_so(tmp_path):
    digests = set()
    for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken"):
        tokenizer = Tokenizer.load(str(write_gguf(tmp_path / "m.gguf", pre)))
        assert json.loads(tokenizer.backend.to_str())["model"]["ignore_merges"] == (pre in ("llama-bpe", "tekken"))
        digests.add(tokenizer.digest)
    assert len(digests) == 5
    composed = Tokenizer.load(str(write_gguf(tmp_path / "m.gguf", "qwen2"))).encode("u\u0308")
    assert composed == Tokenizer.load(str(tmp_path / "m.gguf")).encode("ü")  # Qwen normalizes to NFC


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pre": "mystery"}, "tokenizer.ggml.pre is 'mystery'"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"kind": "llama"}, "kind 'llama'"),
        ({"kind": None}, "holds no tokenizer"),
    ],
)
def test_a_gguf_tokenizer_that_is_not_known_exactly_is_refused(tmp_path, how, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        Tokenizer.load(str(write_gguf(tmp_path / "m.gguf", **how)))
    assert caught.value.name == "unsupported_tokenizer"
    assert "Hugging Face directory" in str(caught.value)


def test_bos_is_in_the_saved_file_where_the_model_adds_it(tmp_path):
    tokenizer = Tokenizer.load(str(write_gguf(tmp_path / "m.gguf", add_add_bos_token=True)))
    assert tokenizer.encode("a") == tokenizer.backend.encode("a").ids[1:]
    assert tokenizer.backend.encode("a").ids[0] == tokenizer.bos_token_id


def test_files_of_a_directory_are_copied_as_they_are(tmp_path):
    source = save_small_tokenizer(tmp_path / "a")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "Odd",  "bos_token": {"content": "<s>"}}')
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\r\nend")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("tools: {{ tools }}")
    tokenizer = Tokenizer.load(str(source))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|im_end|>")
    assert tokenizer.render(say("x"), tools=[1]) == "tools: [1]"
    tokenizer.save(tmp_path / "b")
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    for name in names:
        if name.name != "chat_template.jinja":
            assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes(), name
    assert Tokenizer.load(str(tmp_path / "b")).chat_template_digest == tokenizer.chat_template_digest


def test_a_given_template_wins_and_is_saved(tmp_path):
    source = save_small_tokenizer(tmp_path / "a")
    (tmp_path / "t.jinja").write_text(LLAMA3)
    by_path = Tokenizer.load(str(source), str(tmp_path / "t.jinja"))
    by_text = Tokenizer.load(str(source), LLAMA3)
    assert by_path.chat_template == by_text.chat_template == LLAMA3
    assert by_path.digest == Tokenizer.load(str(source)).digest
    by_path.save(tmp_path / "b")
    assert Tokenizer.load(str(tmp_path / "b")).chat_template_digest == by_path.chat_template_digest
    with pytest.raises(ConfigError, match="nowhere.jinja cannot be read"):
        Tokenizer.load(str(source), "nowhere.jinja")


def test_templates_in_older_places(tmp_path):
    source = save_small_tokenizer(tmp_path / "a", None)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(str(source)).template  # noqa: B018
    assert caught.value.name == "missing_chat_template"
    assert Tokenizer.load(str(source)).chat_template_digest == ""
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    for name, data in (
        ("chat_template.json", {"chat_template": "j"}),
        ("tokenizer_config.json", {"chat_template": "c"}),
        ("tokenizer_config.json", {"chat_template": named}),
    ):
        (source / name).write_text(json.dumps(data))
        expected = data["chat_template"] if isinstance(data["chat_template"], str) else "d"
        assert Tokenizer.load(str(source)).chat_template == expected


def test_tokens_that_only_tokenizer_config_knows_are_added(tmp_path):
    source = save_small_tokenizer(tmp_path / "a")
    size = Tokenizer.load(str(source)).vocab_size
    added = {str(size): {"content": "<|new|>", "special": True}}
    (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "pad_token": "<pad>"}))
    tokenizer = Tokenizer.load(str(source))
    assert tokenizer.encode("<|new|>") == [size]
    assert tokenizer.pad_token_id == size + 1
    assert {"<|new|>", "<pad>"} <= set(tokenizer.control_tokens)
    (source / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"7000": {"content": "<|new|>", "special": True}}})
    )
    with pytest.raises(ArtifactError, match="the id 7000"):
        Tokenizer.load(str(source))


def test_a_checkpoint_with_a_tokenizer_folder(tmp_path):
    save_small_tokenizer(tmp_path / "ckpt/tokenizer")
    assert Tokenizer.load(str(tmp_path / "ckpt")).digest == small_tokenizer().digest
    (tmp_path / "torch_dist/iter_0000003").mkdir(parents=True)
    (tmp_path / "torch_dist/iter_0000003/.metadata").write_text("")
    (tmp_path / "torch_dist/latest_checkpointed_iteration.txt").write_text("3")
    shutil.move(tmp_path / "ckpt/tokenizer", tmp_path / "torch_dist/iter_0000003/tokenizer")
    assert Tokenizer.load(str(tmp_path / "torch_dist")).digest == small_tokenizer().digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("m.gguf", "not a gguf", "cannot be read as GGUF"),
        ("config.json", "{}", "holds no tokenizer"),
    ],
)
def test_broken_sources_are_told(tmp_path, name, content, message):
    if name == "tokenizer_config.json":
        save_small_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        Tokenizer.load(str(tmp_path))


def test_nothing_there_and_too_much_there(tmp_path):
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        Tokenizer.load(str(tmp_path / "nowhere"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("")
    with pytest.raises(ArtifactError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        Tokenizer.load(str(tmp_path))


def test_the_digest_notices_what_matters_and_nothing_else(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.backend.enable_padding()
    assert tokenizer.digest == small_tokenizer().digest
    other = small_tokenizer()
    other.backend.add_tokens(["<tool>"])
    assert other.digest != small_tokenizer().digest
    description = json.loads(small_tokenizer().backend.to_str())
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]  # the older spelling
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert Tokenizer.load(str(tmp_path)).digest == small_tokenizer().digest
