"""The tokenizer inside a GGUF file, as an object of the `tokenizers` library.

A GGUF file keeps the vocabulary and the merges, but of the pre-tokenizer (how text is cut before merging) only a name,
`tokenizer.ggml.pre`. A wrong one still decodes to the right text, with other ids than the model was trained on: so a
name that is not in the table below is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from steps.engine.checkpoint.gguf_header import read_header
from steps.errors import ArtifactError, Problem

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@dataclass(frozen=True)
class _Scheme:
    """How one `tokenizer.ggml.pre` cuts text. ignore_merges: a pre-token that is a vocabulary entry is one token."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    normalizer: Callable[[], normalizers.Normalizer] | None = None


SCHEMES: Mapping[str, _Scheme] = {
    "gpt-2": _Scheme(_gpt2),
    "smollm": _Scheme(lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])),
    "llama-bpe": _Scheme(lambda: _split(_LLAMA3), ignore_merges=True),
    "qwen2": _Scheme(lambda: _split(_QWEN2), normalizer=normalizers.NFC),
    "tekken": _Scheme(lambda: _split(_TEKKEN), ignore_merges=True),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says of its tokenizer. special_tokens: bos_token, eos_token, … by name."""

    backend: Tokenizer
    special_tokens: Mapping[str, str]
    chat_template: str | None
    add_bos_token: bool
    model_max_length: int | None


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """Build the tokenizer of a .gguf file. Raises ArtifactError when it has none, or one of another kind."""
    try:
        fields = read_header(path).metadata
    except ArtifactError as error:
        raise _refuse(path, f"cannot be read as GGUF: {error}") from error
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind is None:
        raise _refuse(path, "holds no tokenizer")
    if kind != "gpt2":
        raise _refuse(path, f"has a tokenizer of kind {kind!r}", allowed="gpt2 (byte-level BPE)")
    if not isinstance(pre, str) or pre not in SCHEMES:
        raise _refuse(path, f"cuts text in an unknown way (tokenizer.ggml.pre is {pre!r})", allowed=", ".join(SCHEMES))
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    special_tokens = {
        f"{name}_token": tokens[fields[key]]
        for name, key in {
            "bos": "tokenizer.ggml.bos_token_id",
            "eos": "tokenizer.ggml.eos_token_id",
            "unk": "tokenizer.ggml.unknown_token_id",
            "pad": "tokenizer.ggml.padding_token_id",
        }.items()
        if 0 <= fields.get(key, -1) < len(tokens)
    }
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", False))
    backend = build(
        tokens,
        fields["tokenizer.ggml.merges"],
        fields["tokenizer.ggml.token_type"],
        pre,
        bos_token=special_tokens.get("bos_token") if add_bos else None,
    )
    length = fields.get(f"{fields.get('general.architecture')}.context_length")
    return GgufTokenizer(backend, special_tokens, fields.get("tokenizer.chat_template"), add_bos, length)


def build(
    tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int], pre: str, bos_token: str | None = None
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    tokens: by id, in GPT-2's byte alphabet. merges: "left right", in order. token_types: llama.cpp's, by id.
    pre: a key of SCHEMES. bos_token: put before a text whose special tokens are asked for.
    """
    scheme = SCHEMES[pre]
    vocab = {token: id for id, token in enumerate(tokens)}
    # The byte alphabet has no space, so the one blank in a merge is the separator.
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=scheme.ignore_merges))
    if scheme.normalizer is not None:
        backend.normalizer = scheme.normalizer()
    backend.pre_tokenizer = scheme.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_added(tokens, token_types, _CONTROL))
    backend.add_tokens(_added(tokens, token_types, _USER_DEFINED))
    if bos_token is None:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A",
            pair=f"{bos_token} $A {bos_token}:1 $B:1",
            special_tokens=[(bos_token, vocab[bos_token])],
        )
    return backend


def _added(tokens: Sequence[str], token_types: Sequence[int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, type in zip(tokens, token_types, strict=True)
        if type == kind
    ]


def _refuse(path: Path, what: str, allowed: str = "") -> ArtifactError:
    hint = "Give the model's original Hugging Face directory as the tokenizer instead."
    return ArtifactError(Problem(where=str(path), what=what, allowed=allowed, hint=hint, name="unsupported_tokenizer"))
