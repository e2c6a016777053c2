"""base_fingerprint: one name for the same weights, whichever representation they are stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from steps.engine.checkpoint.behind import Worker
from steps.engine.checkpoint.lazy import Array, LazyTensor, LazyTensors, runs
from steps.errors import ArtifactError

#: Dtypes in safetensors' notation.
DTYPE_NAMES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Fingerprint:
    """Hashes tensors as they pass by, so that weights are read once for the conversion and the fingerprint.

    The digest is sha256 over the sorted Hugging Face names of "name NUL dtype NUL shape NUL sha256(bytes) LF", dtype
    and shape as safetensors writes them, bytes little-endian in row-major order. A tied output layer does not count.
    """

    def __init__(self) -> None:
        self._lines: dict[str, Future[str]] = {}
        self._names: set[str] = set()
        # Hashing releases the interpreter: one tensor is hashed while the next is read and written.
        self._worker = Worker()

    def watch(self, tensors: LazyTensors) -> dict[str, LazyTensor]:
        """The same tensors under the same (Hugging Face) names, hashed whenever one is read."""
        self._names |= set(tensors)
        return {name: self._watched(name, tensor) for name, tensor in tensors.items()}

    def _watched(self, name: str, tensor: LazyTensor) -> LazyTensor:
        def source(place: Array | None) -> Array:
            array = tensor.source(place)
            self._lines[name] = self._worker.submit(tensor.nbytes, lambda: line(name, tensor, array))
            return array

        return LazyTensor(tensor.shape, tensor.dtype, source)

    def digest(self) -> str:
        """The fingerprint, once every watched tensor has been read."""
        lines = {name: future.result() for name, future in self._lines.items()}
        assert self._names == set(lines), f"not read: {sorted(self._names - set(lines))[:3]}"
        return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


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


def line(name: str, tensor: LazyTensor, array: Array) -> str:
    """One tensor's line of the fingerprint. array: what was read of it."""
    digest = hashlib.sha256()
    for run in runs(array):
        digest.update(run)
    return f"{name}\0{DTYPE_NAMES[tensor.dtype]}\0{list(tensor.shape)}\0{digest.hexdigest()}\n"


def fingerprint(tensors: LazyTensors) -> str:
    """The fingerprint of a whole model, by Hugging Face names (without the tied output layer)."""
    watcher = Fingerprint()
    for tensor in watcher.watch(tensors).values():
        tensor.array()
    return watcher.digest()
