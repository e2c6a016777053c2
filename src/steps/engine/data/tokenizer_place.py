"""Where the tokenizer that a configuration names lies, by file names alone: a dry run must not load libraries."""

from __future__ import annotations

from pathlib import Path

from steps.artifacts.checkpoint import iteration_dir

#: One of these makes a directory a tokenizer's.
_ESSENTIAL = ("tokenizer.json", "tokenizer.model", "vocab.json")


def locate(model: str) -> Path:
    """The .gguf file, the JSON file or the directory with a tokenizer's files that the local path `model` stands for.

    A model directory, a Megatron checkpoint (its `tokenizer` folder) and a directory with one .gguf file are followed.
    Raises ValueError that says what is there instead.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.name.endswith((".gguf", ".json")):
        return path
    if not path.is_dir():
        raise ValueError("is no tokenizer's file" if path.exists() else "there is no tokenizer here")
    checkpoint = iteration_dir(path)
    for folder in (path, path / "tokenizer", *([checkpoint / "tokenizer"] if checkpoint else [])):
        if any((folder / name).is_file() for name in _ESSENTIAL):
            return folder
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        raise ValueError(f"holds several GGUF files ({', '.join(gguf.name for gguf in ggufs)}): name one of them")
    if not ggufs:
        raise ValueError("holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json or a .gguf file)")
    return ggufs[0]
