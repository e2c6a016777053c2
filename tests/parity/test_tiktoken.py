"""tiktoken against tokenizers and transformers: a real tokenizer, and the kinds that models have, on real texts."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from functools import cache
from itertools import chain, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_bpe import KINDS, trained
from support.chat import CHATML, smollm_gguf, write_jsonl
from support.packing_runs import configure, documents, pack, report

from steps.engine.data import dialogues
from steps.engine.data.chat import parse
from steps.engine.data.encoding import Encoder
from steps.engine.data.proofs import prove_tiktoken
from steps.engine.data.segments import same_ids
from steps.engine.data.tiktoken_segments import TiktokenSegments
from steps.engine.data.tokenizer import Tokenizer


@cache
def conversations():
    """Real ones: `messages` of the first dialogues of chitchat-dataset."""
    spec = importlib.util.find_spec("chitchat_dataset")
    assert getattr(spec, "origin", None), "pip install --no-deps chitchat-dataset==0.9.0"
    data = dialogues.load(Path(spec.origin).parent / "dataset.json")
    return list(islice(dialogues.conversations(data, Counter()), 400))


@cache
def load(name):
    if name == "smollm2":
        return Tokenizer.load(smollm_gguf(), CHATML)
    return trained(name, [message["content"] for messages in conversations() for message in messages], 8000)


@cache
def both(name):
    return TiktokenSegments(prove_tiktoken(load(name), []), load(name).segments), load(name).segments


NAMES = ("smollm2", *KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_real_conversations_get_the_same_ids(name):
    encoder = Encoder(load(name), "assistant")
    rows = [encoder.render(parse(json.dumps({"messages": messages}).encode())) for messages in conversations()]
    pieces = [[piece.text for piece in row.pieces()] for row in rows]
    tiktoken, plain = both(name)
    for at in range(0, len(pieces), 64):
        found = tiktoken.encode(pieces[at : at + 64])
        assert same_ids(found, plain.encode(pieces[at : at + 64]))
        assert same_ids(found, plain.encode_apart(list(chain.from_iterable(pieces[at : at + 64]))))
    assert same_ids(tiktoken._encode([row.text for row in rows]), plain.encode([[row.text for row in rows]]))


@pytest.mark.parametrize("name", NAMES)
@given(
    st.lists(st.text(max_size=30) | st.text("the aAI'sST\n\r\t 0123.,;!?-_é中🙂\u00a0\u0301ſ", max_size=50), max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_any_text_gets_the_same_ids(name, pieces):
    tiktoken, plain = both(name)
    assert same_ids(tiktoken.encode([pieces]), plain.encode_apart(pieces))


def test_transformers_gives_the_ids_that_tiktoken_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    load("smollm2").save(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [auto.apply_chat_template(messages, tokenize=False) for messages in conversations()[:100]]
    ids, lengths = both("smollm2")[0].encode([texts])
    expected = auto(texts, add_special_tokens=False)["input_ids"]
    assert lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == list(chain.from_iterable(expected))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_step_writes_the_same_rows_with_either(tmp_path, workers):
    load("smollm2").save(tmp_path / "tokenizer")
    found = {}
    write_jsonl(tmp_path / "chat.jsonl", ({"messages": messages} for messages in conversations() * 2))
    for library in ("tiktoken", "tokenizers"):
        tokenizer = {"model": "tokenizer", "library": library}
        pack(tmp_path, configure(tmp_path, tokenizer=tokenizer, pack_size=8192, num_workers=workers, force=True))
        assert report(tmp_path)["library"] == library
        found[library] = documents(tmp_path)
    assert len(found["tiktoken"]) == report(tmp_path)["rows"]["kept"] > 700
    assert found["tiktoken"] == found["tokenizers"]


def test_a_large_input_is_tokenized_by_tiktoken_without_being_asked(tmp_path):
    load("smollm2").save(tmp_path / "tokenizer")
    rows = [{"messages": messages} for messages in conversations()]
    config = configure(tmp_path, rows, pack_size=8192)
    assert (tmp_path / "chat.jsonl").stat().st_size < 100 * load("smollm2").vocab_size
    done = pack(tmp_path, config)
    assert report(tmp_path)["library"] == "tokenizers"
    write_jsonl(tmp_path / "chat.jsonl", rows * 4)
    done = pack(tmp_path, config)
    assert report(tmp_path)["library"] == "tiktoken"
    assert "tokenizing with tiktoken, which was found to give the same ids" in done.stdout + done.stderr


def test_asking_for_tiktoken_where_it_does_not_fit_says_why(tmp_path):
    config = configure(tmp_path, [{"messages": messages} for messages in conversations()[:5]])
    path = tmp_path / "tokenizer/tokenizer.json"
    described = json.loads(path.read_text())
    described["added_tokens"][-1]["lstrip"] = True
    path.write_text(json.dumps(described))
    done = pack(tmp_path, {**config, "tokenizer": {"model": "tokenizer", "library": "tiktoken"}}, expect=1)
    said = done.stdout + done.stderr
    for words in (
        "tiktoken_unfit",
        "tiktoken does not fit this tokenizer: the added token '</think>' takes",
        "tokenizer.library",
    ):
        assert words in said
