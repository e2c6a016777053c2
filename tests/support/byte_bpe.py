"""Byte-level BPE tokenizers as models have them, trained on what is at hand, and with the oddities of some."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from steps.engine.data.tokenizer import Tokenizer
from steps.engine.data.tokenizer_files import Source
from support.chat import CHATML

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(digits: str) -> Any:
    pattern = Regex(_WORDS % digits)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated", invert=False), _BYTES])


#: (how words are cut, normalizer) of models.
KINDS: dict[str, tuple[Any, Any]] = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        None,
    ),
    "llama3": (_split(r"\p{N}{1,3}"), None),
    "qwen": (_split(r"\p{N}"), normalizers.NFC()),
}
_TEXT = (
    "The quick brown fox jumps over the lazy dog, don't you think?  I'll say: it's 1234 o'clock in 2024!\n\n",
    "def f(x):\n    return {'a': [x ** 2, 0.5]}  # naïve café, über, señor\n\tif x != y: pass\n",
    "Привет, как дела? 日本語の文章です。中文也可以。 안녕하세요 🙂 ١٢٣ ½\r\n",
)


def _train(kind: str, texts: Iterable[str], vocab_size: int) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, normalizer = KINDS[kind]
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str())


@cache
def _small(kind: str) -> str:
    return _train(kind, _TEXT * 20, 700)


def description(kind: str) -> dict[str, Any]:
    """tokenizer.json of a tokenizer of some 700 tokens, to be changed at will."""
    return dict(json.loads(_small(kind)))


def trained(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of this kind trained on `texts`."""
    return tokenizer(json.loads(_train(kind, texts, vocab_size)))


def tokenizer(described: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return Tokenizer(Source(backend, named, {"default": CHATML}))


def with_all_splits(described: dict[str, Any], words: Iterable[str] = ()) -> dict[str, Any]:
    """As Llama 3's: every way to join two tokens to a third is a merge, and a word is looked up before all of them.
    words: tokens that no merge makes."""
    model = described["model"]
    vocab: dict[str, int] = model["vocab"]
    vocab.update({word: len(vocab) + at for at, word in enumerate(words)})
    made = dict.fromkeys("".join(merge) for merge in model["merges"])
    merges: list[Sequence[str]] = []
    for token in made:
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [split for split in splits if split[0] in vocab and split[1] in vocab]
        merges += sorted(known, key=lambda split: (vocab[split[0]], vocab[split[1]]))
    model.update(ignore_merges=True, merges=[list(merge) for merge in merges])
    return described
