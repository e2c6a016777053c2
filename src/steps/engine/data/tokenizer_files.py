"""Where a tokenizer's files are and what stands in them: Hugging Face directories, tokenizer.json, GGUF, Hub ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from steps.artifacts.opening import is_hub_id
from steps.engine.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from steps.engine.data.tokenizer_place import locate
from steps.errors import ArtifactError, Problem

#: Files that make up a tokenizer beside tokenizer.json. They are copied as they are.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json",
)  # fmt: skip
EXTRA_TEMPLATES = "additional_chat_templates"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass
class Source:
    """A tokenizer as it was found.

    templates: chat templates by name; "default" is the usual one, some models have a "tool_use" beside it.
    files:     what to copy when the tokenizer is saved; empty when it must be written anew (GGUF).
    config:    what a tokenizer_config.json written anew says besides the special tokens.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    templates: dict[str, str]
    files: list[Path] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)


def read(model: str) -> Source:
    """Find and read the tokenizer that `model` names (see `Tokenizer.load`). Raises ArtifactError."""
    if is_hub_id(model):
        return _read_directory(_download(model), model)
    try:
        place = locate(model)
    except ValueError as error:
        raise _error(model, str(error)) from error
    if place.suffix == ".gguf":
        return _read_gguf(place)
    if place.is_file():
        return _read_directory(place.parent, model, tokenizer_json=place)
    return _read_directory(place, model)


def _read_gguf(path: Path) -> Source:
    found = read_gguf_tokenizer(path)
    templates = {"default": found.chat_template} if found.chat_template else {}
    config: dict[str, Any] = {"add_bos_token": found.add_bos_token}
    if found.model_max_length:
        config["model_max_length"] = int(found.model_max_length)
    return Source(found.backend, found.special_tokens, templates, config=config)


def _read_directory(folder: Path, model: str, tokenizer_json: Path | None = None) -> Source:
    config = _json(folder / "tokenizer_config.json")
    tokenizer_json = tokenizer_json or folder / "tokenizer.json"
    if tokenizer_json.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # tokenizers raises bare Exception for whatever its parser meets
            raise _error(model, f"{tokenizer_json.name} cannot be read: {error}") from error
        backend.no_padding()
        backend.no_truncation()
    else:
        backend = _through_transformers(folder, model)
    special = {**_json(folder / "special_tokens_map.json"), **config}
    named = {name: text for name in NAMED_TOKENS if (text := _content(special.get(name)))}
    _complete(backend, config, named, model)
    # A JSON file under another name is the tokenizer then, whatever lies beside it.
    own = tokenizer_json.name == "tokenizer.json"
    files = [folder / name for name in FILES if (folder / name).is_file() and (own or name != "tokenizer.json")]
    files += sorted((folder / EXTRA_TEMPLATES).glob("*.jinja"))
    return Source(backend, named, _templates(folder, config), files, config)


def _complete(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str], model: str) -> None:
    """Add the tokens that tokenizer_config.json knows and tokenizer.json lacks, as transformers does on loading."""
    declared = config.get("added_tokens_decoder", {})
    known = {int(id): entry for id, entry in declared.items()} if isinstance(declared, Mapping) else {}
    for id, entry in sorted(known.items()):
        flags = {
            name: entry[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in entry
        }
        token = AddedToken(entry["content"], **flags)
        # Adding what is there already changes nothing but its flags.
        (backend.add_special_tokens if entry.get("special") else backend.add_tokens)([token])
        if backend.token_to_id(entry["content"]) != id:
            raise _error(model, f"tokenizer_config.json gives {entry['content']!r} the id {id}, tokenizer.json another")
    missing: Iterable[str] = (text for text in dict.fromkeys(named.values()) if not _is_added(backend, text))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _is_added(backend: tokenizers.Tokenizer, text: str) -> bool:
    return any(token.content == text for token in backend.get_added_tokens_decoder().values())


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    stored = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(stored, str):
        templates["default"] = stored
    elif isinstance(stored, list):
        templates.update({entry["name"]: entry["template"] for entry in stored})
    for path in (folder / EXTRA_TEMPLATES).glob("*.jinja"):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return templates


def _through_transformers(folder: Path, model: str) -> tokenizers.Tokenizer:
    """A tokenizer that has no tokenizer.json: transformers knows how to convert its SentencePiece model."""
    try:
        import sentencepiece  # noqa: F401
        from transformers import AutoTokenizer
    except ImportError as error:
        hint = "pip install 'peft-steps[sentencepiece]'"
        raise _error(model, f"has no tokenizer.json, and converting it needs the package {error.name}", hint) from error
    try:
        backend = getattr(AutoTokenizer.from_pretrained(folder), "backend_tokenizer", None)
    except Exception as error:  # whatever transformers meets in a stranger's files
        raise _error(model, f"transformers cannot load this tokenizer: {error}") from error
    if backend is None:
        raise _error(model, "transformers has no fast version of this tokenizer")
    fresh: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(backend.to_str())
    return fresh


def _download(model: str) -> Path:
    import huggingface_hub

    patterns = [*FILES, f"{EXTRA_TEMPLATES}/*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # network, authorization, offline mode: the hub's errors have no common root
        hint = "Check the name and the network, or give a local directory."
        raise _error(model, f"cannot be fetched from the Hugging Face Hub: {error}", hint) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _error(str(path), f"cannot be read: {error}") from error
    return data if isinstance(data, dict) else {}


def _content(token: Any) -> str | None:
    """The text of a special token, which is written as text or as a table with its flags."""
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) and value else None


def _error(where: str, what: str, hint: str = "") -> ArtifactError:
    return ArtifactError(Problem(where=where, what=what, hint=hint, name="unsupported_tokenizer"))
