"""Merge an adapter into its base: tensor by tensor, in float32, cast to the base's dtype at the end."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from steps.config.peft import names, section_class
from steps.config.validate import unknown_keys
from steps.engine.checkpoint import mapping, megatron
from steps.engine.checkpoint.convert import Converted, converted
from steps.engine.checkpoint.fingerprint import Fingerprint, verify, verify_trained_on
from steps.engine.checkpoint.hf import SHARD_BYTES, Source, write_directory
from steps.engine.checkpoint.lazy import LazyTensor, LazyTensors, computed
from steps.engine.progress import SILENT, Progress
from steps.errors import ArtifactError, Problem
from steps.shapes.targets import linear_names

#: (linear's full name, base weight [out, in], its adapter's tensors, shared tensors) to the merged weight, of the same
#: dtype.
Merge = Callable[[str, Tensor, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
#: (linear's full name, base weight [out, in]) to the weight that was trained on, float32.
Held = Callable[[str, Tensor], Tensor]

#: Settings that say how an adapter started, not what it is.
_START = frozenset({"lora_A_init_method", "lora_B_init_method", "lora_dtype"})
_BETWEEN = ".adapter."
_SHARED = "adapter."
_HINT = "Merge with the checkpoint that the adapter was trained on."


@dataclass(frozen=True)
class Adapter:
    """An adapter checkpoint, opened.

    section: the `peft` section it was trained with; `type` names the method.
    linears: by the linear's full name, its tensors by the name behind `.adapter.`.
    shared:  tensors that belong to no single linear, by their own names.
    """

    checkpoint: megatron.Checkpoint
    section: Mapping[str, Any]
    linears: Mapping[str, LazyTensors]
    shared: LazyTensors


def open_adapter(path: Path, iteration: int | None = None) -> Adapter:
    """Open a checkpoint_lora, ours or Megatron-Bridge's.

    Raises ArtifactError when it holds other tensors than adapters, or does not say how they were trained, or in a way
    that this version does not know.
    """
    checkpoint = megatron.Checkpoint.open(path, iteration)
    linears: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    shared: dict[str, LazyTensor] = {}
    others = []
    for name, tensor in checkpoint.tensors.items():
        linear, between, rest = name.partition(_BETWEEN)
        if between:
            linears[linear][rest] = tensor
        elif name.startswith(_SHARED):
            shared[name.removeprefix(_SHARED)] = tensor
        else:
            others.append(name)
    if others or not linears:
        what = f"it holds {others[0]}, which is no adapter tensor" if others else "it holds no adapter tensor"
        raise ArtifactError(f"{checkpoint.folder} is no checkpoint_lora: {what}", name="wrong_type")
    return Adapter(checkpoint, _peft_section(checkpoint), dict(linears), shared)


def _peft_section(checkpoint: megatron.Checkpoint) -> dict[str, Any]:
    own = checkpoint.run_config.get("adapter")
    if isinstance(own, Mapping) and "type" in own:
        return _known(own, f"{checkpoint.folder / megatron.RUN_CONFIG}: adapter", ours=True)
    section = checkpoint.run_config.get("peft")
    where = f"{checkpoint.folder / megatron.RUN_CONFIG}: peft"
    if not isinstance(section, Mapping):
        raise ArtifactError(f"{where} is missing: how the adapter was trained is not known", name="damaged_artifact")
    # Megatron-Bridge writes Python objects as {_target_: their name}, the method itself among them.
    plain = {
        key: value["_target_"].rpartition(".")[2] if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in section.items()
        if key != "_target_"
    }
    plain.setdefault("type", _snake_case(str(section.get("_target_", "")).rpartition(".")[2]))
    return _known(plain, where, ours=False)


def _known(section: Mapping[str, Any], where: str, *, ours: bool) -> dict[str, Any]:
    """The settings as they were recorded, if this version has the method and reads all of them.

    ours: written by steps. Megatron-Bridge has fields and ways to start that are of no interest once it is trained.
    """
    method = str(section["type"])
    if method not in names():
        raise ArtifactError(_unsupported(f"{where}.type", f"the adapter's method {method!r}"))
    section, cls = dict(section), section_class(method)
    unknown = [key for key, _, _ in unknown_keys(cls, section)] if ours else []
    problems = [_unsupported(f"{where}.{key}", f"the setting {key} of {method}") for key in unknown]
    try:
        cls.model_validate(section)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            key = ".".join(map(str, entry["loc"]))
            if key in _START and not ours:
                del section[key]
            else:
                problems.append(_unsupported(f"{where}.{key}", f"{entry['input']!r}", entry["msg"]))
    if problems:
        raise ArtifactError(problems)
    return section


def _unsupported(where: str, what: str, why: str = "") -> Problem:
    what = f"{what} is not known to this version of steps" + (f": {why}" if why else "")
    hint = "Use the version that trained it (artifact.json names it), or a newer one."
    return Problem(where, what, hint=hint, name="unsupported_method")


def _snake_case(name: str) -> str:
    """canonical_lora for CanonicalLoRA, the name of Megatron-Bridge's class."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("lo_ra", "lora").replace("do_ra", "dora")


def merge(
    base: Source,
    adapter: Adapter,
    merge_weight: Merge,
    directory: Path,
    *,
    base_fingerprint: str | None,
    recorded_fingerprint: str | None = None,
    held: Held | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = SILENT,
) -> Converted:
    """Write base and adapter as one Hugging Face directory.

    merge_weight:     the adapter method's `merge`.
    base_fingerprint: that of the base the adapter was trained on; None when its record does not tell.
    recorded_fingerprint: what the base's own record states; None when it has none.
    held:             what training on a quantized base saw of each linear's weight, adapted or not; None: as it is.
    Raises ArtifactError base_model_mismatch when an adapted linear does not exist in the base, or the adapter was
    trained on other weights; damaged_artifact when the base is not what its record says. What the weights are is
    certain only when all were read: publish only if this returns.
    """
    read, written = Fingerprint(), Fingerprint()
    parameters = mapping.to_megatron(base.config, read.watch(base.tensors), str(base.path))
    dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
    weights = {f"{linear}.weight": linear for linear in adapter.linears}
    if unknown := [name for name in weights if name not in parameters]:
        what = f"the adapter is for {unknown[0].removesuffix('.weight')}, which the base at {base.path} does not have"
        raise _mismatch(what)
    if held is not None:
        for linear in linear_names(base.config.num_layers):
            parameters[f"{linear}.weight"] = _held(parameters[f"{linear}.weight"], linear, held)
    shared = {name: tensor.load() for name, tensor in adapter.shared.items()}
    for name, linear in weights.items():
        parameters[name] = _merged(parameters[name], linear, adapter.linears[linear], shared, merge_weight)
    tensors = written.watch(
        mapping.to_hf(base.config, {name: stored.to(dtypes[name]) for name, stored in parameters.items()})
    )
    with _one_thread():
        write_directory(directory, tensors, base.files, shard_bytes=shard_bytes, progress=progress, label="merge")
    verify(read.digest(), recorded_fingerprint, base.path)
    verify_trained_on(read.digest(), base_fingerprint, base.path, _HINT)
    return converted(base.config, tensors, written.digest())


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes on this thread alone: the products are small, and the other processors hash and write."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _held(weight: LazyTensor, linear: str, held: Held) -> LazyTensor:
    return computed(weight.shape, "float32", lambda: held(linear, weight.load()))


def _merged(
    weight: LazyTensor, linear: str, tensors: LazyTensors, shared: Mapping[str, Tensor], merge_weight: Merge
) -> LazyTensor:
    @torch.no_grad()
    def load() -> Tensor:
        loaded = {name: tensor.load() for name, tensor in tensors.items()}
        try:
            result = merge_weight(linear, weight.load(), loaded, shared)
        except (KeyError, RuntimeError) as error:  # a tensor that is absent, or of a shape that does not multiply
            if "memory" in str(error):
                raise
            raise _mismatch(f"the adapter's tensors do not fit {linear} {list(weight.shape)}: {error}") from error
        return result

    return computed(weight.shape, weight.dtype, load)


def _mismatch(what: str) -> ArtifactError:
    return ArtifactError(Problem(where="", what=what, hint=_HINT, name="base_model_mismatch"))
