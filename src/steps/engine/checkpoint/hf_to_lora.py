"""Hugging Face PEFT to checkpoint_lora: from the tensors of each Hugging Face module to those of a method of ours.

q, k and v of peft have an A each, a fused linear_qkv has one. Where all parts of every fused linear are there with the
same A, as convert/lora_to_hf writes them, the adapter is `lora` on the fused linears; otherwise it is `canonical_lora`
on exactly the parts that are there. DoRA is known on whole fused linears only. Parts with factors of their own are the
blocks of one pair of rank 3 r (gate and up: 2 r)

    A = [A_q; A_k; A_v],  B = the rows of q: [B_q 0 0], those of k: [0 B_k 0], those of v: [0 0 B_v]

and a part without an adapter has B = 0 and, as magnitudes, the norms of the base's rows: it keeps the base's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steps.config.peft import Peft, section_class
from steps.engine.checkpoint.hf_adapter import HFAdapter, Update, uniform, unsupported
from steps.engine.checkpoint.mapping import part_view
from steps.errors import ArtifactError, Problem
from steps.shapes import targets
from steps.shapes.model_config import ModelConfig


@dataclass(frozen=True)
class Imported:
    """section: the `peft` section that the tensors (by full names, `<linear>.adapter.<name>`) belong to.

    notes: what was done to them, for the log.
    """

    section: Peft
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def convert(adapter: HFAdapter, model: ModelConfig, row_norms: Callable[[str], Tensor], where: str) -> Imported:
    """The same adapter in Megatron's names.

    row_norms: from a linear's full name to ||w|| of each row of its base weight, [out]; asked for DoRA only.
    where: the adapter's directory, for the messages.
    Raises ArtifactError (base_model_mismatch, unsupported_adapter) with all that is wrong.
    """
    found = _by_our_names(adapter, model, where)
    updates = uniform(found)
    notes = []
    if {(one.rank, one.scale) for one in found.values()} != {(one.rank, one.scale) for one in updates.values()}:
        rank = next(iter(updates.values())).rank
        notes.append(f"modules differ in rank or scale: padded with zeros to rank {rank}, other scales folded into B")
    linears: dict[str, dict[str, Update]] = {}
    for name, update in updates.items():
        linear, part = targets.home(name)
        linears.setdefault(linear, {})[part] = update
    one_a = all(_one_a(linear, parts) for linear, parts in linears.items())
    if next(iter(updates.values())).magnitude is not None:
        method = "dora"
        updates = uniform({name: _whole(model, name, parts, row_norms) for name, parts in linears.items()})
        if not one_a:
            rank = next(iter(updates.values())).rank
            notes.append(f"parts of a fused linear have an A each: laid out as blocks of one pair of rank {rank}")
    elif one_a:
        method = "lora"
        updates = {name: _joined(model, name, parts) for name, parts in linears.items()}
    else:
        method = "canonical_lora"
    updates, settings = _settings(adapter, method, updates, model.num_layers)
    tensors = {name: tensor for linear, update in updates.items() for name, tensor in _tensors(linear, update).items()}
    return Imported(section_class(method).model_validate({"type": method, **settings}), tensors, tuple(notes))


def _by_our_names(adapter: HFAdapter, model: ModelConfig, where: str) -> dict[str, Update]:
    """The updates by the full names of linears and parts, in the order of computation."""
    names = {targets.hf_name(name): name for name in targets.linear_names(model.num_layers, canonical=True)}
    problems = []
    for module, update in adapter.updates.items():
        if module not in names and ".layers." not in module:
            allowed = ", ".join(targets.HF_NAMES.values())
            problems.append(unsupported(where, f"it adapts {module}, which no method here does", allowed))
        elif module not in names:
            problems.append(_mismatch(where, f"the adapter is for {module}, which the base does not have"))
        else:
            rows, columns = targets.shape(model, names[module])
            if (len(update.b), update.a.shape[1]) != (rows, columns):
                what = f"{module} is [{len(update.b)}, {update.a.shape[1]}] there and [{rows}, {columns}] in the base"
                problems.append(_mismatch(where, what))
    if len(problems) > 3:  # usually all of them
        problems[3:] = [Problem(where=where, what=f"so are {len(problems) - 3} more modules")]
    if problems:
        raise ArtifactError(problems)
    return {name: adapter.updates[module] for module, name in names.items() if module in adapter.updates}


def _mismatch(where: str, what: str) -> Problem:
    return Problem(where=where, what=what, name="base_model_mismatch")


def _one_a(linear: str, parts: Mapping[str, Update]) -> bool:
    """Whether one A serves the whole linear: all of its parts are there and have the same."""
    first = next(iter(parts.values())).a
    whole = len(parts) == len(targets.parts(linear))
    return whole and all(update.a.dtype == first.dtype and torch.equal(update.a, first) for update in parts.values())


def _joined(model: ModelConfig, linear: str, parts: Mapping[str, Update]) -> Update:
    """One A, and the parts' rows of B and of the magnitude where the fused linear has them."""
    first = next(iter(parts.values()))
    if "" in parts:
        return first
    out = targets.shape(model, linear)[0]
    b = first.b.new_empty(out, first.rank)
    magnitude = None if first.magnitude is None else first.magnitude.new_empty(out)
    for part, update in parts.items():
        _put(model, part, b, update.b)
        if magnitude is not None and update.magnitude is not None:
            _put(model, part, magnitude, update.magnitude)
    return replace(first, b=b, magnitude=magnitude)


def _put(model: ModelConfig, part: str, whole: Tensor, rows: Tensor) -> None:
    """Write a part's rows [rows, …] to their places in whole [out, …]."""
    view = part_view(model, part, whole.movedim(0, -1))
    view.copy_(rows.movedim(0, -1).reshape(view.shape))


def _whole(model: ModelConfig, linear: str, parts: Mapping[str, Update], row_norms: Callable[[str], Tensor]) -> Update:
    """DoRA of a whole linear from that of its parts; see the module."""
    if _one_a(linear, parts):
        return _joined(model, linear, parts)
    names = [name.rpartition(".")[2] for name in targets.parts(linear)]
    first = next(iter(parts.values())).to(torch.float32)
    norms = row_norms(linear).float()
    blocks = {}
    for name in names:
        place = list(parts).index(name) if name in parts else 0
        if name in parts:
            update = parts[name].to(torch.float32)
        else:
            rows = part_view(model, name, norms).reshape(-1)
            update = Update(first.a, first.b.new_zeros(len(rows), first.rank), first.scale, rows)
        wide = update.b.new_zeros(len(update.b), len(parts) * first.rank)
        wide[:, place * first.rank : (place + 1) * first.rank] = update.b
        blocks[name] = replace(update, a=torch.cat([part.a.float() for part in parts.values()]), b=wide)
    return _joined(model, linear, blocks)


def _settings(
    adapter: HFAdapter, method: str, updates: dict[str, Update], num_layers: int
) -> tuple[dict[str, Update], dict[str, Any]]:
    """The updates in one dtype that a checkpoint says by itself, and the settings that describe them."""
    some, config = next(iter(updates.values())), adapter.config
    alpha, use_rslora = float(config["lora_alpha"]), bool(config.get("use_rslora"))
    as_said = config["r"] == some.rank and alpha / (math.sqrt(some.rank) if use_rslora else some.rank) == some.scale
    if not as_said or (use_rslora and method != "lora"):  # only `lora` has another scale than alpha / dim
        alpha, use_rslora = some.scale * some.rank, False
    dtypes = {tensor.dtype for update in updates.values() for tensor in update.tensors().values()}
    dtype = dtypes.pop() if dtypes == {torch.bfloat16} else torch.float32
    settings: dict[str, Any] = {
        "dim": some.rank,
        "alpha": alpha,
        "target_modules": targets.covering(list(updates), num_layers),
        "lora_dtype": "bfloat16" if dtype == torch.bfloat16 else None,
    }
    if use_rslora:
        settings["use_rslora"] = True
    return {name: update.to(dtype) for name, update in updates.items()}, settings


def _tensors(name: str, update: Update) -> dict[str, Tensor]:
    """By their full names in a checkpoint. name: of a linear, or of a part that is adapted by itself."""
    linear, part = targets.home(name)
    before = f"{linear}.adapter." + (f"{targets.PART_ADAPTERS[part]}." if part else "")
    found = {f"{before}linear_in.weight": update.a, f"{before}linear_out.weight": update.b}
    if update.magnitude is not None:
        found[f"{before}weight_magnitude"] = update.magnitude
    return found
