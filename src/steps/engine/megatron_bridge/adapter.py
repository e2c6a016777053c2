"""The `peft` section as one of Megatron-Bridge's adapter dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from steps.config.peft import names, section_class
from steps.engine.megatron_bridge.findings import Findings
from steps.engine.megatron_bridge.values import construct
from steps.errors import suggest
from steps.shapes import targets

#: Settings of ours without a counterpart there, and the value at which each is off.
_ONLY_TORCH = {"quantization": None, "lora_plus_ratio": 1, "init_lora_weights": None}
#: What Megatron-Bridge's ParallelLinearAdapter can start a matrix with. It would say so only after the model is built.
INIT_METHODS = ("xavier", "normal", "kaiming", "zero")


def scheme(section: Mapping[str, Any]) -> str:
    """The `peft.type` of a section; LoRA where it says none."""
    return str(section.get("type") or "lora").lower()


def build(section: Mapping[str, Any], classes: Mapping[str, type], recipe_peft: Any, findings: Findings) -> Any:
    """The adapter object; None when the section has faults (they are in `findings`).

    classes:     Release.adapters.
    recipe_peft: what the recipe chose. Where it is of the same class, a key that the section leaves out keeps the
                 recipe's value (its target modules know of Mamba layers, for example).
    """
    kind = scheme(section)
    cls = classes.get(kind)
    if cls is None:
        hint = "Use engine: torch for this method." if kind in names() else suggest(kind, classes)
        findings.problem(
            "peft.type", f"Megatron-Bridge has no method {kind!r}", allowed=", ".join(sorted(classes)), hint=hint
        )
        return None
    values = {key: value for key, value in section.items() if key != "type"}
    before = len(findings.problems)
    values = _in_its_words(values, recipe_peft if type(recipe_peft) is cls else cls(), findings)
    _check(values, findings, canonical=kind in names() and section_class(kind).canonical)
    alpha = values.get("alpha")
    exact = isinstance(alpha, float) and not alpha.is_integer()
    if exact:
        del values["alpha"]  # annotated int there, but all that is done with it is to divide it by dim
    made = construct(cls, {**_kept(cls, recipe_peft), **values}, "peft", findings)
    if made is not None and exact:
        made.alpha = alpha
    return made if len(findings.problems) == before else None


def _in_its_words(section: Mapping[str, Any], else_: Any, findings: Findings) -> dict[str, Any]:
    """The section with our own settings turned into fields of the class, or refused by name.

    else_: an object of the class, which says what the section leaves out.
    """
    values = dict(section)
    values.pop("calibration_rows", None)  # a detail of one value of init_lora_weights
    for key, off in _ONLY_TORCH.items():
        if key in values and (said := values.pop(key)) not in (off, None):
            findings.problem(
                f"peft.{key}",
                f"Megatron-Bridge's {type(else_).__name__} has no such setting, and it is {said!r}",
                hint="Leave it out, or use engine: torch.",
            )
    if values.get("use_rslora") is True:
        dim, alpha = (values.get(key, getattr(else_, key)) for key in ("dim", "alpha"))
        if isinstance(dim, int) and isinstance(alpha, int | float):  # otherwise that is what is wrong
            values["alpha"] = alpha * dim**0.5
            findings.note(f"peft.use_rslora: alpha / sqrt(dim) is handed over as alpha {values['alpha']:g}")
        del values["use_rslora"]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(values.get(key), list):
            values[key] = [targets.translated(name) if isinstance(name, str) else name for name in values[key]]
    every = values.pop("match_all_linear", None) is True
    if values.get("exclude_modules"):
        # Output layers are linears there, and an adapter on one cannot be merged by anybody here.
        values["exclude_modules"] = [*values["exclude_modules"], "output_layer"]
        values["target_modules"] = [] if every else values.get("target_modules", [])
    elif every or values.get("target_modules") == []:
        # What the class names, and what the recipe adds (Mamba's linears).
        values["target_modules"] = list(dict.fromkeys([*type(else_)().target_modules, *else_.target_modules]))
        findings.note(f"peft.target_modules: every linear, which is {', '.join(values['target_modules'])}")
    return values


def _kept(cls: Any, recipe_peft: Any) -> dict[str, Any]:
    """What the recipe's adapter says and the section does not.

    Never what the class works out by itself: canonical_mapping comes from target_modules.
    """
    if type(recipe_peft) is not cls:
        return {}
    return {
        item.name: getattr(recipe_peft, item.name)
        for item in dataclasses.fields(recipe_peft)
        if item.init and item.name != "canonical_mapping"
    }


def _check(values: Mapping[str, Any], findings: Findings, *, canonical: bool) -> None:
    """What Megatron-Bridge would refuse only once the model stands on the GPUs."""
    if values.get("target_modules") and values.get("exclude_modules"):
        findings.problem(
            "peft.exclude_modules",
            "Megatron-Bridge takes target_modules or exclude_modules, not both",
            hint="Set peft.target_modules: [] to adapt every linear layer but the excluded ones.",
        )
    elif canonical and values.get("exclude_modules"):
        # Its matcher knows modules, not parts of them: it would leave them all without an adapter.
        hint = "Name what to adapt in peft.target_modules instead, or use engine: torch."
        findings.problem("peft.exclude_modules", "Megatron-Bridge's canonical LoRA cannot exclude", hint=hint)
    for pattern, missing in targets.halves(values.get("target_modules") or []) if canonical else ():
        what = f"Megatron-Bridge cannot save an adapter on {pattern!r} without one on {missing}"
        findings.problem("peft.target_modules", what, hint="Name them all, or use engine: torch.")
    for key in ("lora_A_init_method", "lora_B_init_method"):
        if values.get(key) is not None and values[key] not in INIT_METHODS:
            findings.problem(
                f"peft.{key}", f"Megatron-Bridge knows no {values[key]!r}", allowed=", ".join(INIT_METHODS)
            )


def check_layers(adapter: Any, model: Any, findings: Findings) -> None:
    """Refuse an adapter on some layers of a model whose layers are stored stacked under one key.

    Megatron-Core checks, when the first checkpoint is saved, that every part of a stacked tensor is there, and layers
    without the adapter have none. Hybrid and mixed models (Mamba, MoE on some layers) are stored layer by layer.
    """
    mixed = (
        "hybrid_override_pattern",
        "hybrid_layer_pattern",
        "heterogeneous_block_specs",
        "hetereogenous_dist_checkpoint",
    )
    if any(getattr(model, name, None) for name in mixed):
        return
    if any(isinstance(getattr(model, name, None), list) for name in ("moe_layer_freq", "linear_attention_freq")):
        return
    layers = int(getattr(model, "num_layers", None) or 0)
    chosen = targets.select(adapter.target_modules or [], adapter.exclude_modules or [], targets.linear_names(layers))
    for linear in targets.LINEARS:
        count = sum(name.endswith(f".{linear}") for name in chosen)
        if 0 < count < layers:
            findings.problem(
                "peft.target_modules",
                f"{linear} is adapted in {count} of {layers} layers, which Megatron-Core cannot save for this model",
                hint="Adapt it in every layer, or use engine: torch.",
            )
