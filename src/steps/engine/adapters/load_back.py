"""Load back an exported Hugging Face adapter, as a stranger would, and compare it with what is computed here.

A wrong name in adapter_model.safetensors raises nothing anywhere: peft warns and computes the base model. So what was
written is read again by somebody else's code, peft's where it is installed, and otherwise by the reader below, which
shares no line with the writer: it goes through the weights of the Hugging Face model and takes for each what the file
has under the name that peft would look for.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steps.engine.adapters import base as adapters
from steps.engine.adapters.trained import attach_trained
from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.fingerprint import Fingerprint, verify, verify_trained_on
from steps.engine.checkpoint.hf import Source
from steps.engine.checkpoint.hf_adapter import HFAdapter
from steps.engine.checkpoint.lazy import LazyTensor, computed
from steps.engine.checkpoint.merge import Adapter
from steps.engine.model.decoder import Decoder, load_weights
from steps.errors import ArtifactError, StepFailed

TOKENS = 32
#: Of the largest logit. Float32 in two orders of summing is 1e-6 off after thirty layers (SmolLM2-135M); deeper models
#: are given room, and a wrong scale, name or row is off by more than a hundred times this.
TOLERANCE = 1e-4
_SHAPE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Of logits over random tokens, in float32.

    reader: who loaded the adapter back.   off: largest difference of his logits to ours.
    moved:  largest difference that the adapter makes.   allowed: what `off` may be.
    """

    reader: str
    off: float
    moved: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"loaded back by {self.reader}: over {TOKENS} random tokens the logits are within {self.off:.1e} of those "
            f"computed here ({self.allowed:.1e} is allowed; the adapter moves them by up to {self.moved:.2g})"
        )


def check_names(directory: Path, meant: HFAdapter) -> None:
    """Whether the written files say what was meant, at every module, tensor by tensor; nothing is computed.

    Raises StepFailed (export_differs).
    """
    config, tensors = _files(directory)
    found: dict[str, dict[str, Tensor]] = {module: {} for module in meant.updates if _targeted(config, module)}
    for module, taken in found.items():
        taken.update(_take(tensors, module))
    _compare(found, tensors, meant)


def check(
    directory: Path,
    meant: HFAdapter,
    adapter: Adapter,
    method: adapters.Method[Any],
    base: Source,
    *,
    base_fingerprint: str | None,
    recorded_fingerprint: str | None = None,
) -> Comparison:
    """Compute with the written adapter and with our own, and compare.

    adapter, method: what was exported.   base: its base; held in memory in float32, twice where peft is installed.
    base_fingerprint: that of the base the adapter was trained on; None when its record does not tell.
    recorded_fingerprint: what the base's own record states; None when it has none.
    Raises StepFailed (export_differs); ArtifactError (base_model_mismatch, damaged_artifact).
    """
    check_names(directory, meant)
    ids = torch.randint(base.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    before, ours = _ours(adapter, method, base, ids, base_fingerprint, recorded_fingerprint)
    with_peft = all(importlib.util.find_spec(name) for name in ("peft", "transformers"))
    if with_peft:
        with _quiet():
            reader, bare, theirs = _peft(directory, meant, base, ids)
    else:
        reader, bare, theirs = _own(directory, base, before, ids)
    allowed = TOLERANCE * ours.abs().max().item()
    found = Comparison(reader, _apart(theirs, ours), _apart(ours, before), allowed)
    if not found.off <= allowed:
        what = f"{found.reader} computes logits that are up to {found.off:.2g} off ({allowed:.1e} is allowed)"
        if (apart := _apart(bare, before)) > allowed:
            what += f"; so are those of the base without it, by {apart:.2g}, which is no fault of the adapter"
        raise _differs(what)
    return found


@torch.no_grad()
def _ours(
    adapter: Adapter,
    method: adapters.Method[Any],
    base: Source,
    ids: Tensor,
    base_fingerprint: str | None,
    recorded_fingerprint: str | None,
) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocab] of the base and of the adapted base, as training computes them."""
    read = Fingerprint()
    decoder = Decoder(base.config, dtype=torch.float32)
    parameters = mapping.to_megatron(base.config, read.watch(base.tensors), str(base.path))
    load_weights(decoder, ((name, tensor.load()) for name, tensor in parameters.items()))
    verify(read.digest(), recorded_fingerprint, base.path)
    verify_trained_on(read.digest(), base_fingerprint, base.path)
    before = decoder(ids, [0, len(ids)])
    attach_trained(decoder, adapter, method)
    return before, decoder.eval()(ids, [0, len(ids)])


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def same_shape(adapter: Adapter, method: adapters.Method[Any], base: Source) -> None:
    """Raises ArtifactError (base_model_mismatch) where the base is another model than the adapter's."""
    mine, other = method.model.to_dict(), base.config.to_dict()
    if differing := [name for name in _SHAPE if mine[name] != other[name]]:
        shown = ", ".join(f"{name} {other[name]} instead of {mine[name]}" for name in differing)
        what = f"{base.path} is another model than that of the adapter {adapter.checkpoint.folder}: {shown}"
        raise ArtifactError(what, name="base_model_mismatch")


def _files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return config, load_file(directory / "adapter_model.safetensors")


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in config["target_modules"])


def _take(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """The tensors of a module, out of those of the file."""
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    found = {name: tensors.pop(f"base_model.model.{module}.{name}", None) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _own(directory: Path, base: Source, bare: Tensor, ids: Tensor) -> tuple[str, Tensor, Tensor]:
    """W + scale B A at every weight of the Hugging Face model that the files adapt, in our decoder.

    Returns a name for the reader, the logits of the base (`bare`, it is the same decoder) and those of the whole.
    """
    config, tensors = _files(directory)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)

    def adapted(name: str, weight: LazyTensor) -> LazyTensor:
        module = name.removesuffix(".weight")
        found = _take(tensors, module) if module != name and _targeted(config, module) else {}
        if "lora_A.weight" not in found or "lora_B.weight" not in found:
            return weight.to("float32")
        a, b = found["lora_A.weight"].float(), found["lora_B.weight"].float()

        def load() -> Tensor:
            whole: Tensor = weight.load().float() + scale * (b @ a)
            if not config["use_dora"]:
                return whole
            # peft divides by the norm as it is; a row of zeros has no direction, and stays.
            norm = whole.norm(dim=1, keepdim=True)
            magnitude = found["lora_magnitude_vector"].float()[:, None]
            return torch.where(norm > 0, magnitude * whole / norm, whole)

        return computed(weight.shape, "float32", load)

    weights = {name: adapted(name, tensor) for name, tensor in base.tensors.items()}
    decoder = Decoder(base.config, dtype=torch.float32)
    load_weights(decoder, ((name, value.load()) for name, value in mapping.to_megatron(base.config, weights).items()))
    return "a reader of our own (peft and transformers are not installed)", bare, decoder(ids, [0, len(ids)])


@torch.no_grad()
def _peft(directory: Path, meant: HFAdapter, base: Source, ids: Tensor) -> tuple[str, Tensor, Tensor]:
    """Genuine PeftModel.from_pretrained on the genuine model. Returns as `_own` does."""
    import peft
    import transformers

    data = json.loads(base.files["config.json"])
    config = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    weights = {name: tensor.load().float() for name, tensor in base.tensors.items()}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied output layer is not among them
    model.tie_weights()
    bare = model.float().eval()(ids[None]).logits[0]
    try:
        loaded: Any = peft.PeftModel.from_pretrained(model, str(directory)).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _differs(f"peft does not load it: {str(error).partition(chr(10))[0]}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for name, module in loaded.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            pair = {"lora_A.weight": module.lora_A["default"].weight, "lora_B.weight": module.lora_B["default"].weight}
            magnitudes = getattr(module, "lora_magnitude_vector", {})
            if "default" in magnitudes:
                pair["lora_magnitude_vector"] = magnitudes["default"].weight
            found[name] = pair
    _compare(found, {}, meant)
    return f"peft {peft.__version__}", bare, loaded(ids[None]).logits[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of other libraries: what peft would warn of is found out here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(found: Mapping[str, Mapping[str, Tensor]], left: Mapping[str, Tensor], meant: HFAdapter) -> None:
    """Hold what was found at each module against what was meant to be there. left: tensors that nobody asked for."""
    faults = [f"{min(left)} is under a name that nobody looks for" for _ in left][:1]
    if odd := set(found) ^ set(meant.updates):
        name = min(odd)
        faults.append(f"{name} is {'not adapted' if name in meant.updates else 'adapted, and was not to be'}")
    for module in meant.updates:
        wanted, got = meant.updates[module].tensors(), found.get(module, {})
        bad = [name for name in wanted if name not in got or not torch.equal(got[name].float(), wanted[name].float())]
        if bad and module in found:
            faults.append(f"{module} does not get its {bad[0]}")
            break
    if faults:
        raise _differs("; ".join(faults))


def _differs(what: str) -> StepFailed:
    return StepFailed(f"the exported adapter is not what was trained: {what}", name="export_differs")
