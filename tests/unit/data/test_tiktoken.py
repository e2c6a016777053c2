"""tiktoken's ids are those of the tokenizer, or it is not used."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_bpe import KINDS, description, tokenizer, with_all_splits
from support.chat import small_tokenizer

from steps.engine.data.proofs import NASTY, prove_tiktoken
from steps.engine.data.reading import Chunk
from steps.engine.data.segments import CUT, same_ids
from steps.engine.data.tiktoken_ranks import UnfitError, rebuild
from steps.engine.data.tiktoken_segments import TiktokenSegments
from steps.engine.data.tokenizing import ChunkTokenizer, Settings
from steps.errors import StepFailed

WORD = "\u0120zebra"  # " zebra", a token that no merge makes


def both(of):
    return TiktokenSegments(rebuild(of), of.segments), of.segments


TOKENIZERS = {
    **{kind: tokenizer(description(kind)) for kind in KINDS},
    "all splits": tokenizer(with_all_splits(description("llama3"), [WORD])),
}
PAIRS = {name: both(of) for name, of in TOKENIZERS.items()}
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("aeThxfo '\n\t12½éе́日🙂ſ!.-_<|im_end>\u0301\u00a0\u1e9b"), max_size=60),
    st.lists(st.sampled_from(["the", " The", "'S", "  ", "\r\n", "2024", " zebra", "<|im_end|>", "über", "!?"])).map(
        "".join
    ),
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(TEXTS, max_size=4))
@settings(max_examples=250, deadline=None)
def test_the_ids_are_those_of_the_tokenizer(name, pieces):
    tiktoken, plain = PAIRS[name]
    assert same_ids(tiktoken.encode([pieces]), plain.encode_apart(pieces))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_is_tiktoken_that_gives_them(name):
    """Nothing of this goes the slow way, so that the test above compares two libraries."""
    tiktoken, plain = PAIRS[name]
    pieces = ["The quick fox, don't 1234\n\n  über zebra", "日本語 🙂 привет", "", "<|im_start|>user\nHi<|im_end|>"]
    direct = tiktoken._encode(pieces)
    assert direct.ids.min() >= 0
    assert same_ids(direct, plain.encode([pieces]))
    assert all(tiktoken._is_alike(piece) for piece in pieces)


def test_every_character_of_this_unicode_gets_the_same_ids():
    tiktoken, plain = PAIRS["llama3"]
    known = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co", "Lo")]
    for at in range(0, len(known), 2048):
        pieces = [f"a{character}b {character}1" for character in known[at : at + 2048]]
        assert same_ids(tiktoken.encode([pieces]), plain.encode([pieces]))


def test_an_empty_list_of_normalizers_changes_nothing():
    described = {**description("gpt2"), "normalizer": {"type": "Sequence", "normalizers": []}}
    assert rebuild(tokenizer(described)).normalized is False


def test_nasty_texts_prove_nothing_wrong():
    for of in TOKENIZERS.values():
        assert prove_tiktoken(of, []).cut == rebuild(of).cut
    assert any(not unicodedata.is_normalized("NFC", text) for text in NASTY)


def test_text_that_is_not_in_normal_form_goes_the_way_of_the_tokenizer():
    tiktoken, plain = PAIRS["qwen"]
    pieces = ["cafe\u0301", "cafe", "café", "e\u0301"]
    found = tiktoken.encode([pieces])
    assert same_ids(found, plain.encode_apart(pieces))
    assert not same_ids(found, tiktoken._encode(pieces))


def test_bytes_that_the_vocabulary_lacks_go_the_way_of_the_tokenizer():
    described = description("gpt2")
    lacking = {"\u0122", "\u00f3"}  # how byte-level vocabularies write 0x02 and 0xf3
    vocab = {token: id for token, id in described["model"]["vocab"].items() if not lacking & set(token)}
    assert len(vocab) < len(described["model"]["vocab"])
    described["model"].update(
        vocab=vocab, merges=[m for m in described["model"]["merges"] if not lacking & set("".join(m))]
    )
    tiktoken, plain = both(tokenizer(described))
    pieces = ["the fox", "a\x02b", "", "x \U000e0001", "again", "th\x02e"]
    found = tiktoken.encode([pieces[:3], pieces[3:]])
    assert same_ids(found, plain.encode_apart(pieces))
    assert tiktoken._encode(pieces).ids.min() == -1


def test_a_text_with_the_code_point_that_cuts():
    tiktoken, plain = PAIRS["gpt2"]
    pieces = [f"the{CUT}fox", "jumps"]
    assert same_ids(tiktoken.encode([pieces]), plain.encode_apart(pieces))


def test_a_pattern_that_gives_up_over_a_long_run_of_blanks():
    tiktoken, plain = PAIRS["gpt2"]
    pieces = [" " * 1_500_000, "x"]
    assert tiktoken._encode(pieces) is None
    assert same_ids(tiktoken.encode([pieces]), plain.encode([pieces]))


def test_characters_that_the_libraries_see_differently_go_the_way_of_the_tokenizer():
    """As if the tokenizer's Unicode knew é as a letter, and tiktoken's did not."""
    of = TOKENIZERS["gpt2"]
    ranks = rebuild(of)
    older = replace(ranks, pattern=ranks.pattern.replace(r" ?\p{L}+", r" ?(?:(?!é)\p{L})+|é"))
    tiktoken = TiktokenSegments(older, of.segments)
    pieces = ["café über", "the café", "über"]
    assert not same_ids(tiktoken._encode(pieces), of.segments.encode([pieces]))
    assert same_ids(tiktoken.encode([pieces]), of.segments.encode([pieces]))
    assert [tiktoken._is_alike(piece) for piece in pieces] == [False, False, True]
    with pytest.raises(UnfitError, match="cuts words differently at 'q'"):
        TiktokenSegments(
            replace(ranks, pattern=ranks.pattern.replace(r" ?\p{L}+", r" ?(?:(?!q)\p{L})+|q")), of.segments
        )
    with pytest.raises(UnfitError, match="does not understand its pattern"):
        TiktokenSegments(replace(ranks, pattern="("), of.segments)


def changed(kind="gpt2", **model):
    described = description(kind)
    described["model"].update(model)
    return described


def added(**flags):
    described = description("gpt2")
    described["added_tokens"] += [{**described["added_tokens"][0], "id": 999, "content": "<extra>", **flags}]
    return described


def merges(*more):
    """Two tokens get merges of their own behind all others."""
    described = description("gpt2")
    described["model"]["merges"] += [list(merge) for merge in more]
    described["model"]["vocab"].update({"".join(merge): 5000 + at for at, merge in enumerate(more)})
    return described


def words_before_merges():
    """A word that is no join of tokens, but two tokens long: tiktoken would join them elsewhere, too."""
    described = changed(ignore_merges=True)
    described["model"]["vocab"]["xq"] = 5000
    return described


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = description("llama3")["pre_tokenizer"]["pretokenizers"][0]


def cut_by(*steps):
    return {**description("gpt2"), "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


UNFIT = {
    "dropout": (changed(dropout=0.1), "its model has dropout"),
    "suffix": (changed(end_of_word_suffix="</w>"), "its model has end_of_word_suffix"),
    "normalizer": ({**description("gpt2"), "normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase"),
    "no bytes": (cut_by({"type": "Whitespace"}), "its pre-tokenizer does not end with bytes as they are"),
    "prefix space": (cut_by(SPLIT, {**BYTES, "add_prefix_space": True}), "does not end with bytes as they are"),
    "two patterns": (cut_by(SPLIT, SPLIT, BYTES), "one pattern cannot say (Split, Split, ByteLevel)"),
    "merged with what follows": (cut_by({**SPLIT, "behavior": "MergedWithNext"}, BYTES), "one pattern cannot say"),
    "stripping token": (added(lstrip=True), "'<extra>' takes its surroundings into account"),
    "prefix token": (added(content="<|im_"), "'<|im_' overlaps with another"),
    "touching token": (added(content=">x<"), "overlaps with another"),
    "merges apart": (
        merges(("q", "z"), ("x", "qz"), ("x", "q"), ("xq", "z")), "the merges of 'xqz' do not stand together",
    ),
    "joined otherwise": (merges(("xq", "z"), ("x", "q")), "'xqz' is joined from other tokens than its merges say"),
    "word of two tokens": (words_before_merges(), "'xq' is joined from other tokens than its merges say"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_tiktoken_cannot_do_is_refused(name):
    described, words = UNFIT[name]
    with pytest.raises(UnfitError, match=re.escape(words)):
        rebuild(tokenizer(described))


def test_another_kind_of_model_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    of = small_tokenizer()
    of.backend = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    with pytest.raises(UnfitError, match="its model is WordLevel, not BPE"):
        rebuild(of)


def test_ranks_go_by_merges_whatever_the_ids_are():
    """Ids in another order than the merges: tiktoken would join in theirs."""
    described = description("gpt2")
    vocab = described["model"]["vocab"]
    turned = dict(zip(vocab, reversed(vocab.values()), strict=True))
    described["model"]["vocab"] = turned
    for token in described["added_tokens"]:
        token["id"] = turned[token["content"]]
    tiktoken, plain = both(tokenizer(described))
    pieces = ["The quick brown fox jumps over the lazy dog", "<|im_end|>", "don't"]
    assert same_ids(tiktoken.encode([pieces]), plain.encode_apart(pieces))


def test_a_wrong_id_stops_the_run_and_names_the_row():
    of = TOKENIZERS["gpt2"]
    ranks = rebuild(of)
    ids = ranks.ids.copy()
    wrong = int(np.flatnonzero(ids == of.encode("fox")[0])[0])
    ids[wrong] += 1
    chunk = Chunk(
        0, 0, [(7, b'{"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "a"}]}')], 0, 1
    )
    names = ["chat.jsonl"]
    right = ChunkTokenizer(of, Settings(64), [1.0], names, ranks)(chunk)
    plain = ChunkTokenizer(of, Settings(64), [1.0], names)(chunk)
    assert np.array_equal(right.tokens, plain.tokens)
    with pytest.raises(StepFailed, match=r"chat\.jsonl:7: tiktoken gives other ids") as caught:
        ChunkTokenizer(of, Settings(64), [1.0], names, replace(ranks, ids=ids))(chunk)
    assert caught.value.name == "tiktoken_differs"
    assert "tokenizer.library=tokenizers" in str(caught.value)
