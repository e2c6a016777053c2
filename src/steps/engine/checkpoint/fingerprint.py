"""base_fingerprint: one name for the same weights, whichever representation they are stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from steps.engine.checkpoint.lazy import LazyTensor, LazyTensors
from steps.errors import ArtifactError

#: Dtypes in safetensors' notation.
DTYPE_NAMES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Fingerprint:
    """Hashes tensors as they pass by, so that weights are read once for the conversion and the fingerprint.

    The digest is sha256 over the sorted Hugging Face names of "name NUL dtype NUL shape NUL sha256(bytes) LF", dtype
    and shape as safetensors writes them, bytes little-endian in row-major order. A tied output layer does not count.
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self._names: set[str] = set()
        # Hashing releases the interpreter: one tensor is hashed while the next is read and written.
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._hashing: tuple[str, Future[str]] | None = None

    def watch(self, tensors: LazyTensors) -> dict[str, LazyTensor]:
        """The same tensors under the same (Hugging Face) names, hashed whenever one is loaded."""
        self._names |= set(tensors)
        return {name: self._watched(name, tensor) for name, tensor in tensors.items()}

    def _watched(self, name: str, source: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            tensor = source.load()
            self._settle()  # one at a time, so that at most one tensor more is held
            self._hashing = name, self._worker.submit(line, name, tensor)
            return tensor

        return LazyTensor(source.shape, source.dtype, load)

    def _settle(self) -> None:
        if self._hashing is not None:
            name, future = self._hashing
            self._lines[name] = future.result()
            self._hashing = None

    def digest(self) -> str:
        """The fingerprint, once every watched tensor has been loaded."""
        self._settle()
        assert self._names == set(self._lines), f"not loaded: {sorted(self._names - set(self._lines))[:3]}"
        return hashlib.sha256("".join(self._lines[name] for name in sorted(self._lines)).encode()).hexdigest()


def verify(read: str, recorded: str | None, path: Path) -> None:
    """Hold the fingerprint of the weights that were read from `path` against the one that its record states, if any.

    Raises ArtifactError (damaged_artifact): files may keep their sizes and hold other bytes.
    """
    if recorded is not None and read != recorded:
        what = f"{path} is damaged: its weights have the fingerprint {read[:12]}…, its record says {recorded[:12]}…"
        raise ArtifactError(what, hint="Make the checkpoint again.", name="damaged_artifact")


def verify_trained_on(read: str, trained_on: str | None, path: Path, hint: str = "") -> None:
    """Hold the fingerprint of the base that was read from `path` against that of an adapter's base, if it is known.

    Raises ArtifactError (base_model_mismatch).
    """
    if trained_on is not None and read != trained_on:
        what = (
            f"the adapter was trained on a base with fingerprint {trained_on[:12]}…, "
            f"the weights at {path} have {read[:12]}…"
        )
        raise ArtifactError(what, hint=hint, name="base_model_mismatch")


def line(name: str, tensor: Tensor) -> str:
    """One tensor's line of the fingerprint."""
    digest = hashlib.sha256(raw(tensor)).hexdigest()
    return f"{name}\0{DTYPE_NAMES[tensor.dtype]}\0{list(tensor.shape)}\0{digest}\n"


def raw(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes in row-major order, not copied when it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def fingerprint(tensors: LazyTensors) -> str:
    """The fingerprint of a whole model, by Hugging Face names (without the tied output layer)."""
    watcher = Fingerprint()
    for tensor in watcher.watch(tensors).values():
        tensor.load()
    return watcher.digest()
