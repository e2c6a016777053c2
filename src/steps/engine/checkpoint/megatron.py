"""Megatron-Core `torch_dist` checkpoints: written and read tensor by tensor, without Megatron.

Tensors go by the names they have in the model, one per layer (`decoder.layers.3.self_attention.linear_qkv.weight`).
On disk the layers of one parameter are stacked under one key (`decoder.layers.self_attention.linear_qkv.weight`, global
shape [num_layers, …], one chunk a layer), as Megatron-Core does it. An adapter on some layers has only their chunks.

    directory/
      latest_checkpointed_iteration.txt     written last: names the newest iteration that is whole
      latest_train_state.pt                 the same for Megatron-Bridge
      iter_0000120/
        .metadata  __0_*.distcp             the tensors
        common.pt  metadata.json            what Megatron-Core looks for
        run_config.yaml  train_state.pt     what Megatron-Bridge looks for
        training_state.pt                   ours: optimizer, scheduler, RNG, data position (adapter checkpoints)
        tokenizer/  hf/                     tokenizer files; config.json and generation_config.json of the source
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steps.artifacts.checkpoint import LATEST, iteration_dir, iterations
from steps.artifacts.record import write_text
from steps.config import yaml12
from steps.engine.checkpoint import dcp, torch_file
from steps.engine.checkpoint.lazy import BITS, Array, LazyTensor, lazy, stored
from steps.engine.progress import SILENT, Progress
from steps.errors import ArtifactError, StepsError

if TYPE_CHECKING:
    from torch import Tensor

RUN_CONFIG = "run_config.yaml"
TRAINING_STATE = "training_state.pt"
_TRAIN_STATE = "train_state.pt"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LAYER = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?P<layer>\d+)\.(?P<after>.+)")
_STACK = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?P<after>\D.*)")
# Megatron's own checkpoints hold more than the model's parameters.
_NOT_PARAMETERS = re.compile(r"optimizer\.|chained_|rng_state|rerun_state_machine|.*_extra_state(/|$)")


def stacked(name: str) -> tuple[str, int | None]:
    """The key and the layer of a parameter's name: `decoder.layers.3.x` is layer 3 of `decoder.layers.x`."""
    if found := _LAYER.fullmatch(name):
        return found["before"] + found["after"], int(found["layer"])
    return name, None


def unstacked(key: str, layer: int) -> str:
    """The parameter's name for one layer of a stacked key."""
    found = _STACK.fullmatch(key)
    assert found, key
    return f"{found['before']}{layer}.{found['after']}"


def write(
    directory: Path,
    tensors: Mapping[str, LazyTensor | Tensor],
    *,
    num_layers: int,
    run_config: Mapping[str, Any],
    iteration: int = 0,
    training_state: Mapping[str, Any] | None = None,
    consumed_samples: int = 0,
    beside: Callable[[Path], None] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write one iteration of a checkpoint; earlier iterations stay. Returns its `iter_NNNNNNN` folder.

    tensors:        by per-layer name, each loaded when its turn comes. At least one.
    num_layers:     L of the global shape [L, …], also when only some layers are present.
    run_config:     becomes run_config.yaml; its `model` section as `run_config.model_section` makes it.
    training_state: becomes training_state.pt, when given. Tensors, numbers, text, None, and lists and dicts of them: it
                    is read back without running code.
    consumed_samples: packed rows trained on so far, for Megatron-Bridge's train_state.pt.
    beside:         called with the unfinished folder, to add `tokenizer/` and `hf/`.

    The folder appears whole or not at all, and `latest_checkpointed_iteration.txt` names it only then.
    """
    assert tensors, "a checkpoint holds at least one tensor"
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / f"iter_{iteration:07d}"
    partial = directory / f".{folder.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    chunks = [_chunk(name, tensor, num_layers) for name, tensor in tensors.items()]
    with progress.task("write checkpoint", sum(chunk.tensor.nbytes for chunk in chunks) / 1e6, "MB") as task:
        dcp.save(partial, chunks, lambda tensor: task.advance(tensor.nbytes / 1e6))
    (partial / "metadata.json").write_text(json.dumps(_BACKEND))
    torch_file.save({"iteration": iteration, "checkpoint_version": 3.0}, partial / "common.pt")
    (partial / RUN_CONFIG).write_text(yaml12.dump(dict(run_config)), encoding="utf-8")
    torch_file.save(_train_state(iteration, consumed_samples), partial / _TRAIN_STATE)
    if training_state is not None:
        import torch

        torch.save(dict(training_state), partial / TRAINING_STATE)
    if beside is not None:
        beside(partial)
    _sync(partial)
    _replace(partial, folder)
    _replace_file(folder / _TRAIN_STATE, directory / f"latest_{_TRAIN_STATE}")
    write_text(directory / LATEST, str(iteration))
    _sync_folder(directory)
    return folder


def _chunk(name: str, tensor: LazyTensor | Tensor, num_layers: int) -> dcp.Chunk:
    if not isinstance(tensor, LazyTensor):
        tensor = lazy(tensor)
    key, layer = stacked(name)
    shape, zeros = tensor.shape, (0,) * len(tensor.shape)
    if layer is None:
        return dcp.Chunk(key, shape, zeros, shape, tensor)
    assert layer < num_layers, name
    return dcp.Chunk(key, (num_layers, *shape), (layer, *zeros), (1, *shape), tensor)


def _train_state(iteration: int, consumed_samples: int) -> dict[str, torch_file.Stored]:
    """Megatron-Bridge's TrainState, every field of it a tensor."""

    def scalar(value: float, dtype: str) -> torch_file.Stored:
        return torch_file.Stored(np.array(value, BITS[dtype]), (), dtype)

    counts = {
        "step": iteration,
        "consumed_train_samples": consumed_samples,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return {
        **{name: scalar(value, "int32") for name, value in counts.items()},
        "floating_point_operations_so_far": scalar(0.0, "float64"),
        **{name: scalar(False, "bool") for name in ("do_train", "do_valid", "do_test")},
    }


def _sync(folder: Path) -> None:
    """Put every file under `folder`, and the folders that name them, on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, place: Path) -> None:
    """Rename a folder over another: an iteration that is saved a second time, after a resume from an earlier one."""
    old = place.with_name(f".{place.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        place.rename(old)
    new.rename(place)
    if old.exists():
        shutil.rmtree(old)


def _replace_file(source: Path, place: Path) -> None:
    beside = place.with_name(f".{place.name}.tmp")
    shutil.copyfile(source, beside)
    beside.replace(place)


def rewind(directory: Path, iteration: int) -> None:
    """Make a saved iteration the latest one and remove those after it.

    Killed at any moment, `latest` names a whole iteration and no half of one is left under its name; what is left of
    the removed ones is `.iter_NNNNNNN.partial`.
    """
    folder = directory / f"iter_{iteration:07d}"
    _replace_file(folder / _TRAIN_STATE, directory / f"latest_{_TRAIN_STATE}")
    write_text(directory / LATEST, str(iteration))
    _sync_folder(directory)
    for later in (number for number in iterations(directory) if number > iteration):
        gone = directory / f".iter_{later:07d}.partial"
        (directory / f"iter_{later:07d}").rename(gone)
        shutil.rmtree(gone)


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a torch_dist checkpoint, opened for reading. Nothing is loaded until it is asked for."""

    folder: Path
    iteration: int

    @classmethod
    def open(cls, path: Path, iteration: int | None = None) -> Checkpoint:
        """Open the latest iteration, or the one asked for; `path` may also be an `iter_NNNNNNN` folder itself.

        Raises ArtifactError when it is not there or damaged.
        """
        folder = iteration_dir(path, iteration)
        if folder is None:
            have = ", ".join(map(str, iterations(path)))
            wanted = "no latest iteration" if iteration is None else f"no iteration {iteration}"
            raise ArtifactError(f"{path} holds {wanted}", hint=f"It has iterations {have}." if have else "")
        number = re.fullmatch(r"iter_(\d+)", folder.name)
        return cls(folder, int(number[1]) if number else 0)

    @cached_property
    def _reader(self) -> dcp.Reader:
        return dcp.Reader(self.folder)

    @cached_property
    def run_config(self) -> dict[str, Any]:
        """The contents of run_config.yaml; {} without one."""
        path = self.folder / RUN_CONFIG
        try:
            return yaml12.load(path)[0] if path.is_file() else {}
        except StepsError as error:
            raise dcp.damaged(path, error) from error

    def keys(self) -> list[str]:
        """The stored keys of parameters, stacked. Optimizer state and `_extra_state` of other writers are left out."""
        return sorted(key for key in self._reader.tensors if not _NOT_PARAMETERS.match(key))

    def shape(self, key: str) -> tuple[int, ...]:
        """The global shape of a key: [L, …] for a stacked one."""
        return self._reader.tensors[key].shape

    def layers(self, key: str) -> list[int]:
        """The layers of a stacked key that are there; [] for a key without layers."""
        if not _STACK.fullmatch(key):
            return []
        total, *shape = self.shape(key)
        zeros = (0,) * len(shape)
        return [layer for layer in range(total) if self._reader.covers(key, (layer, *zeros), (1, *shape))]

    @cached_property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every parameter by its per-layer name: the embedding, the layers in order, the rest."""
        found: list[tuple[tuple[int, int, str], str, str, int | None]] = []
        for key in self.keys():
            layers: list[int | None] = list(self.layers(key)) or [None]
            if layers == [None] and _STACK.fullmatch(key):
                continue  # a stack of which nothing is there
            for layer in layers:
                name = key if layer is None else unstacked(key, layer)
                where = 1 if layer is not None else 0 if key.startswith("embedding.") else 2
                found.append(((where, layer or 0, key), name, key, layer))
        return {name: self._lazy(key, layer) for _, name, key, layer in sorted(found, key=lambda entry: entry[0])}

    def _lazy(self, key: str, layer: int | None) -> LazyTensor:
        entry = self._reader.tensors[key]
        shape = entry.shape if layer is None else entry.shape[1:]

        def fill(place: Array) -> None:
            box = place.reshape(entry.shape if layer is None else (1, *shape))
            assert np.shares_memory(box, place)
            self._reader.read(key, (layer or 0, *(0,) * (len(entry.shape) - 1)), box)

        return stored(shape, entry.dtype, fill)

    def read(self, name: str) -> Tensor:
        """One parameter by its per-layer name, as a new CPU tensor in its stored dtype.

        Raises ArtifactError when it is not there.
        """
        if name not in self.tensors:
            raise ArtifactError(f"{self.folder} has no {name}")
        return self.tensors[name].load()

    def training_state(self) -> dict[str, Any]:
        """What `write` was given as `training_state`. Raises ArtifactError when it is not there or damaged."""
        import torch

        path = self.folder / TRAINING_STATE
        if not path.is_file():
            raise ArtifactError(f"{self.folder} has no {TRAINING_STATE}: training cannot be resumed from it")
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise dcp.damaged(path, error) from error
        return state

    @property
    def tokenizer_dir(self) -> Path | None:
        """The folder with the tokenizer's files, where the checkpoint has one."""
        return next((path for path in self._beside("tokenizer") if path.is_dir()), None)

    @property
    def hf_dir(self) -> Path | None:
        """The folder with config.json and generation_config.json of the Hugging Face source, where there was one."""
        return next((path for path in self._beside("hf") if path.is_dir()), None)

    def _beside(self, name: str) -> tuple[Path, Path]:
        return self.folder / name, self.folder.parent / name
