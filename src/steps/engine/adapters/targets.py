"""Which linears `peft.target_modules` means. Free of torch: the dispatcher asks before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from steps.errors import Problem, suggest

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")

# What other libraries call the parts of Megatron's (partly fused) linears.
_ELSEWHERE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"), "linear_qkv"),
    **dict.fromkeys(("o_proj", "out_proj"), "linear_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "linear_fc1"),
    "down_proj": "linear_fc2",
}


def linear_names(num_layers: int) -> list[str]:
    """Full names of every linear of a decoder, in the order of computation."""
    return [f"decoder.layers.{layer}.{linear}" for layer in range(num_layers) for linear in LINEARS]


def matches(pattern: str, name: str) -> bool:
    """Whether a target means the linear called `name`: its last part, its full name, or a wildcard over that.

    `*` stands for any text, dots included, as in Megatron-Bridge.
    """
    if pattern in (name, name.rpartition(".")[2]):
        return True
    return "*" in pattern and bool(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name))


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
    faults = []
    for key, patterns in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                faults.append(_unmatched(f"peft.{key}", pattern, names))
    yield from faults
    if not faults and not select(target_modules, exclude_modules, names):
        yield Problem(
            where="peft.exclude_modules", what="no module is left to adapt", name="target_not_found",
            hint="Exclude fewer modules, or name more in peft.target_modules.",
        )  # fmt: skip


def _unmatched(where: str, pattern: str, names: Sequence[str]) -> Problem:
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    last = pattern.rpartition(".")[2].strip("*")
    if last in _ELSEWHERE:
        fused = _ELSEWHERE[last]
        hint = f"{last} is part of {fused} here: write {pattern.replace(last, fused)}."
    elif "*" in pattern:
        layers = sum(name.endswith(f".{parts[0]}") for name in names)
        hint = f"Full names look like {names[0]}; the model has layers 0 to {layers - 1}."
    else:
        hint = suggest(pattern, parts) or suggest(pattern, names)
    return Problem(
        where=where, what=f"{pattern!r} matches no module", allowed=", ".join(parts), hint=hint, name="target_not_found"
    )
