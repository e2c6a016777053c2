"""Which linears `peft.target_modules` means, and their shapes. Free of torch: it is asked before anything starts.

There are two vocabularies. Most methods adapt Megatron's (partly fused) linears; a canonical method adapts the parts of
the fused ones by themselves, and names them linear_q, linear_k, linear_v, linear_fc1_gate and linear_fc1_up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from steps.errors import Problem, suggest
from steps.shapes.model_config import ModelConfig

#: Every linear of a layer, in the order of computation.
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
#: The parts of the fused ones, in the order of their rows (linear_qkv: within each group of query heads).
PARTS = {"linear_qkv": ("linear_q", "linear_k", "linear_v"), "linear_fc1": ("linear_fc1_gate", "linear_fc1_up")}
_FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}
#: Hugging Face's name of each part or unfused linear.
HF_NAMES = {
    "linear_q": "q_proj", "linear_k": "k_proj", "linear_v": "v_proj", "linear_proj": "o_proj",
    "linear_fc1_gate": "gate_proj", "linear_fc1_up": "up_proj", "linear_fc2": "down_proj",
}  # fmt: skip
_FROM_HF = {hf: name for name, hf in HF_NAMES.items()}
# What still other libraries call them.
_ELSEWHERE = {
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn"), "linear_qkv"),
    "out_proj": "linear_proj",
    "gate_up_proj": "linear_fc1",
}


class Targeting(Protocol):
    """What a `peft` section says of what is adapted. canonical: parts of fused linears are, by themselves."""

    @property
    def canonical(self) -> bool: ...
    @property
    def targets_asked(self) -> Sequence[str]: ...
    @property
    def exclude_modules(self) -> Sequence[str]: ...


def linear_names(num_layers: int, *, canonical: bool = False) -> list[str]:
    """Full names of every linear of a decoder (canonical: of every part), in the order of computation."""
    names = [f"decoder.layers.{layer}.{linear}" for layer in range(num_layers) for linear in LINEARS]
    return [part for name in names for part in parts(name)] if canonical else names


def parts(name: str) -> list[str]:
    """The full names of a linear's parts: linear_q, linear_k, linear_v of linear_qkv; itself where it is not fused."""
    before, dot, last = name.rpartition(".")
    return [f"{before}{dot}{part}" for part in PARTS.get(last, (last,))]


def home(name: str) -> tuple[str, str]:
    """The linear that holds `name`, and which part of it that is ('' for the whole).

    decoder.layers.0.self_attention.linear_q -> (decoder.layers.0.self_attention.linear_qkv, linear_q).
    """
    before, dot, last = name.rpartition(".")
    return (f"{before}{dot}{_FUSED[last]}", last) if last in _FUSED else (name, "")


def layer(name: str) -> int:
    """The number of the layer that a linear or a part, by its full name, belongs to."""
    return int(name.split(".")[2])


def shape(model: ModelConfig, name: str) -> tuple[int, int]:
    """(out, in) of a linear or a part, by its full name or the last part of it."""
    last = name.rpartition(".")[2]
    heads, groups = model.query_size, model.num_query_groups * model.kv_channels
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    return {
        "linear_qkv": (model.qkv_size, hidden), "linear_q": (heads, hidden), "linear_k": (groups, hidden),
        "linear_v": (groups, hidden), "linear_proj": (hidden, heads), "linear_fc1": (2 * ffn, hidden),
        "linear_fc1_gate": (ffn, hidden), "linear_fc1_up": (ffn, hidden), "linear_fc2": (hidden, ffn),
    }[last]  # fmt: skip


def chosen(section: Targeting, num_layers: int) -> list[str]:
    """Full names of what a `peft` section adapts, in its own vocabulary."""
    return select(section.targets_asked, section.exclude_modules, linear_names(num_layers, canonical=section.canonical))


def faults(section: Targeting, num_layers: int) -> Iterator[Problem]:
    """What is wrong with the targets of a `peft` section for a model of that many layers."""
    return problems(
        section.targets_asked, section.exclude_modules, linear_names(num_layers, canonical=section.canonical)
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a target means the linear called `name`: its last part, its full name, or a wildcard over that.

    `*` stands for any text, dots included, as in Megatron-Bridge. Hugging Face's names (`q_proj`,
    `model.layers.0.mlp.down_proj`) mean the part that they are.
    """
    pattern = _translated(pattern)
    if pattern in (name, name.rpartition(".")[2]):
        return True
    return "*" in pattern and bool(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name))


def _translated(pattern: str) -> str:
    """A pattern in Hugging Face's names as one in ours; any other as it is."""
    before, dot, last = pattern.rpartition(".")
    if last not in _FROM_HF:
        return pattern
    before = re.sub(r"^model\.", "decoder.", before).replace("self_attn", "self_attention")
    return f"{before}{dot}{_FROM_HF[last]}"


def select(target_modules: Sequence[str], exclude_modules: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that are targets and not excluded, in their own order. No targets at all: every linear is one."""
    wanted = target_modules or ["*"]
    return [
        name
        for name in names
        if any(matches(pattern, name) for pattern in wanted)
        and not any(matches(pattern, name) for pattern in exclude_modules)
    ]


def problems(target_modules: Sequence[str], exclude_modules: Sequence[str], names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with the two lists for a model with linears `names`: entries that mean nothing, nothing left."""
    found = []
    for key, patterns in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                found.append(_unmatched(f"peft.{key}", pattern, names))
    yield from found
    if not found and not select(target_modules, exclude_modules, names):
        yield Problem(
            where="peft.exclude_modules", what="no module is left to adapt", name="target_not_found",
            hint="Exclude fewer modules, or name more in peft.target_modules.",
        )  # fmt: skip


def _unmatched(where: str, pattern: str, names: Sequence[str]) -> Problem:
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    last = pattern.rpartition(".")[2].strip("*")
    ours = _FROM_HF.get(last, _ELSEWHERE.get(last, last))
    if ours in PARTS and ours not in known:  # a fused linear, for a canonical method
        instead = ", ".join(pattern.replace(last, part) for part in PARTS[ours])
        hint = f"A canonical method adapts the parts of {ours} by themselves: write {instead}."
    elif ours in _FUSED and ours not in known:
        fused = _FUSED[ours]
        hint = (
            f"{last} is part of {fused} here: write {pattern.replace(last, fused)}, or adapt it by itself with "
            "peft.type=canonical_lora."
        )
    elif last in _ELSEWHERE:
        hint = f"{last} is {_ELSEWHERE[last]} here: write {pattern.replace(last, _ELSEWHERE[last])}."
    elif "*" in pattern:
        layers = sum(name.endswith(f".{known[0]}") for name in names)
        hint = f"Full names look like {names[0]}; the model has layers 0 to {layers - 1}."
    else:
        hint = suggest(pattern, known) or suggest(pattern, names)
    return Problem(
        where=where, what=f"{pattern!r} matches no module", allowed=", ".join(known), hint=hint, name="target_not_found"
    )
