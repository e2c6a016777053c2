"""Hugging Face model directories: read and written tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from steps.artifacts.checkpoint import INDEX
from steps.artifacts.opening import is_hub_id
from steps.engine.checkpoint.behind import HashedFile
from steps.engine.checkpoint.dcp import damaged, read_into
from steps.engine.checkpoint.fingerprint import DTYPE_NAMES
from steps.engine.checkpoint.lazy import Array, LazyTensor, LazyTensors, runs, stored
from steps.engine.progress import SILENT, Progress, Task
from steps.errors import ArtifactError, Problem
from steps.shapes import hf_config
from steps.shapes.model_config import ModelConfig

#: Files of a model directory, besides weights and tokenizer, that are carried along as they are.
SIDE_FILES = ("config.json", "generation_config.json")
SHARD_BYTES = 5_000_000_000
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Tables that old Llama checkpoints hold and that follow from the configuration.
_DERIVED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Source:
    """A Hugging Face model, opened.

    path:    the local directory or .gguf file; the tokenizer is loaded from it too.
    tensors: by Hugging Face's names, without a tied output layer.
    files:   texts of SIDE_FILES, as they were found (rebuilt for GGUF).
    """

    path: Path
    config: ModelConfig
    tensors: LazyTensors
    files: Mapping[str, str] = field(default_factory=dict)

    def cast(self, dtype: str) -> Source:
        """The same model with its weights cast to `dtype` when they are read; "source" leaves them as they are."""
        if dtype == "source":
            return self
        files = dict(self.files)
        if "config.json" in files:
            data = json.loads(files["config.json"])
            if hf_config.stated_dtype(data) not in (None, dtype):
                files["config.json"] = json.dumps(hf_config.with_dtype(data, dtype), indent=2) + "\n"
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, config=replace(self.config, params_dtype=dtype), tensors=tensors, files=files)


def open_source(model: str) -> Source:
    """Open a directory, a .gguf file or a Hub id. Reads headers only.

    Raises ArtifactError: missing_checkpoint_hf, damaged_artifact, unsupported_model.
    """
    path = fetch(model) if is_hub_id(model) else Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        from steps.engine.checkpoint.gguf import open_gguf

        return open_gguf(path)
    return open_directory(path)


def side_files(model: str) -> tuple[Path, dict[str, str]]:
    """Where a model lies, and the texts of its SIDE_FILES; weights are neither read nor fetched."""
    path = fetch(model, weights=False) if is_hub_id(model) else Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path, dict(open_source(model).files)
    if not (path / "config.json").is_file():
        raise ArtifactError(f"{path} has no config.json", name="missing_checkpoint_hf")
    return path, _side_files(path)


def _side_files(path: Path) -> dict[str, str]:
    return {name: (path / name).read_text(encoding="utf-8") for name in SIDE_FILES if (path / name).is_file()}


def fetch(model: str, *, weights: bool = True) -> Path:
    """Download a model from the Hub (or find it in the cache); the directory it lies in."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.model", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except RepositoryNotFoundError as error:
        what = f"the Hugging Face Hub has no model {model}, or it is private"
        hint = "Check the name; for a private or gated model set HF_TOKEN."
        raise ArtifactError(what, hint=hint, name="missing_checkpoint_hf") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = f"{model} is not in the local cache and cannot be fetched from the Hugging Face Hub"
        hint = "Check the connection, or give the path of a local directory."
        raise ArtifactError(what, hint=hint, name="missing_checkpoint_hf") from error


def open_directory(path: Path) -> Source:
    """Open a directory with config.json and safetensors files, sharded or not."""
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} has no config.json", name="missing_checkpoint_hf") from error
    except (OSError, ValueError) as error:
        raise damaged(path / "config.json", error) from error
    # The architecture first: of a model that is not supported anyway, the weights need not be whole.
    config = hf_config.model_config(data, str(path / "config.json"), hf_config.stated_dtype(data) or "float32")
    found = _read_headers(path)
    if config.share_embeddings_and_output_weights:
        found = _drop_tied(found, path)
    embedding = found.get("model.embed_tokens.weight")
    if embedding is not None:  # what is stored counts, not what config.json says of it
        config = replace(config, params_dtype=embedding.dtype)
    return Source(path, config, found, _side_files(path))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises ArtifactError naming shards that the index lists in vain."""
    index = path / INDEX
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            others = sorted(file.name for file in path.glob("*.safetensors"))
            what = f"{path} has neither model.safetensors nor {INDEX}"
            hint = f"It holds {', '.join(others[:3])}." if others else "Only safetensors and GGUF weights are read."
            raise ArtifactError(what, hint=hint, name="missing_checkpoint_hf")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise damaged(index, error) from error
    if gone := [name for name in names if not (path / name).is_file()]:
        what = f"{path} is damaged: {', '.join(gone[:3])} missing ({len(gone)} of {len(names)} shards)"
        raise ArtifactError(what, hint="Download the model again.", name="damaged_artifact")
    return [path / name for name in names]


def _read_headers(path: Path) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    problems = []
    for file in weight_files(path):
        try:
            with safe_open(file, "np"):  # the library holds the header against the file
                pass
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
            for name, entry in header.items():
                if name == "__metadata__" or name.endswith(_DERIVED):
                    continue
                dtype = _DTYPES.get(entry["dtype"])
                if dtype is None:
                    what = f"{name} has the dtype {entry['dtype']}"
                    allowed = ", ".join(_DTYPES)
                    problems.append(Problem(where=str(file), what=what, allowed=allowed, name="unsupported_model"))
                    continue
                fill = _filler(file, 8 + length + entry["data_offsets"][0])
                tensors[name] = stored(tuple(entry["shape"]), dtype, fill)
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error
    if len(problems) > 3:  # usually every weight of a quantized model
        problems[3:] = [Problem(where=str(path), what=f"so have {len(problems) - 3} more tensors")]
    if problems:
        raise ArtifactError(problems)
    return tensors


def _filler(file: Path, offset: int) -> Callable[[Array], None]:
    def fill(place: Array) -> None:
        try:
            # Read, not mapped: the pages of a map would count as ours.
            with file.open("rb", buffering=0) as opened:
                read_into(opened.fileno(), place, offset)
        except (EOFError, OSError) as error:
            raise damaged(file, error) from error

    return fill


def _drop_tied(tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Without the copy of the embedding that some writers store as lm_head; refused where it is no copy."""
    head = tensors.get("lm_head.weight")
    if head is None:
        return tensors
    if not np.array_equal(head.array(), tensors["model.embed_tokens.weight"].array()):
        what = "config.json ties the output layer to the embedding, yet lm_head.weight differs from it"
        raise ArtifactError(Problem(where=str(path), what=what, name="unsupported_model"))
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def write_directory(
    directory: Path,
    tensors: LazyTensors,
    files: Mapping[str, str],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = SILENT,
    label: str = "write safetensors",
) -> int:
    """Write safetensors (sharded above `shard_bytes`), their index and the side files. Returns the bytes of tensors.

    Each tensor is loaded when its turn comes, in the order of `tensors`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map: dict[str, str] = {}
    with progress.task(label, total / 1e6, "MB") as task:
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(shard, name)
            write_safetensors(directory / name, shard, task)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _shards(tensors: LazyTensors, shard_bytes: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def write_safetensors(path: Path, tensors: LazyTensors, task: Task) -> None:
    """The safetensors format: u64 length of a JSON header, the header padded to 8 bytes, then the bytes of the tensors.

    Written here because the library's own writer wants all tensors of a file in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write([struct.pack("<Q", len(text)) + text])
        for entry in tensors.values():
            file.write(list(runs(entry.array())))
            task.advance(entry.nbytes / 1e6)
