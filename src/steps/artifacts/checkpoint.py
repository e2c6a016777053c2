"""Checkpoints on disk: which files make a directory one, looked at without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

INDEX = "model.safetensors.index.json"
LATEST = "latest_checkpointed_iteration.txt"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"


def iteration_dir(path: Path, iteration: int | None = None) -> Path | None:
    """The `iter_NNNNNNN` folder of a torch_dist checkpoint (the latest, or the one asked for); None without one.

    `path` may also be an `iter_NNNNNNN` folder itself.
    """
    if (path / ".metadata").is_file():
        return path
    if iteration is None:
        try:
            iteration = int((path / LATEST).read_text())
        except (OSError, ValueError):
            return None
    folder = path / f"iter_{iteration:07d}"
    return folder if (folder / ".metadata").is_file() else None


def iterations(path: Path) -> list[int]:
    """The whole iterations in a checkpoint directory, in order."""
    names = (found.parent.name[5:] for found in path.glob("iter_*/.metadata"))
    return sorted(int(name) for name in names if name.isdigit())


def home(path: Path) -> Path:
    """The artifact's directory, where the record is, for a path to it or to one of its `iter_NNNNNNN` folders."""
    return path.parent if path.name.startswith("iter_") and (path / ".metadata").is_file() else path


def check_megatron(path: Path) -> str:
    """What is wrong with a checkpoint_megatron, '' when nothing is."""
    folder = iteration_dir(path)
    if folder is None:
        return f"it has no {LATEST} with an iter_NNNNNNN/.metadata"
    return "" if any(folder.glob("*.distcp")) else f"{folder.name} holds no .distcp file"


def check_lora(path: Path) -> str:
    """What is wrong with a checkpoint_lora, '' when nothing is."""
    if (path / ADAPTER_CONFIG).is_file():
        return "it is a Hugging Face PEFT adapter, of which `steps run convert/hf_to_lora` makes one"
    return check_megatron(path)


def check_hf(path: Path) -> str:
    """What is wrong with a checkpoint_hf (a directory or a .gguf file), '' when nothing is."""
    if path.is_file():
        return "" if path.suffix == ".gguf" else "a file must be a .gguf"
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return "it is an adapter, not a model"
    if not (path / "config.json").is_file():
        return "it has no config.json"
    if not (path / INDEX).is_file() and not (path / "model.safetensors").is_file():
        others = any(path.glob("*.safetensors"))
        return f"it has neither model.safetensors nor {INDEX}" if others else "it holds no .safetensors file"
    return ""


def damage_hf(path: Path) -> str:
    """What a checkpoint_hf lacks of what its own index of shards promises, '' when nothing."""
    index = path / INDEX
    if not index.is_file():
        return ""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        gone = [name for name in names if not (path / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{INDEX} cannot be read: {type(error).__name__}: {error}"
    return f"{', '.join(gone[:3])} missing ({len(gone)} of {len(names)} shards)" if gone else ""


def check_hf_adapter(path: Path) -> str:
    """What is wrong with a checkpoint_hf_adapter, '' when nothing is."""
    if not (path / ADAPTER_CONFIG).is_file():
        return f"it has no {ADAPTER_CONFIG}"
    if (path / ADAPTER_MODEL).is_file():
        return ""
    if (path / "adapter_model.bin").is_file():
        return f"it has adapter_model.bin, a pickle, and no {ADAPTER_MODEL}; save it again with a newer peft"
    return f"it has no {ADAPTER_MODEL}"


def damage_hf_adapter(path: Path) -> str:
    """How the files of a checkpoint_hf_adapter cannot be what they were, '' when that is not to be seen."""
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{ADAPTER_CONFIG} cannot be read: {error}"
    if not isinstance(config, dict):
        return f"{ADAPTER_CONFIG} holds no mapping"
    return damage_safetensors(path / ADAPTER_MODEL)


def damage_safetensors(file: Path) -> str:
    """How a safetensors file's size belies its header, '' when they agree.

    The format: the header's length as u64 (little-endian), the header as JSON, then the bytes of the tensors, of which
    the header says where each of them begins and ends.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"{file.name} ends within its header"
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            return f"the header of {file.name} cannot be read: {type(error).__name__}"
    return f"{file.name} has {size:,} bytes, its header promises {expected:,}" if size != expected else ""
