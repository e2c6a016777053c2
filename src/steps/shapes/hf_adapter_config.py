"""adapter_config.json of Hugging Face PEFT: what is written, and what of it is understood.

What would change the result and is not understood is refused by name, never passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps.errors import ArtifactError, Problem

_READ = (
    "peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path",
)  # fmt: skip
# What says how the adapter was trained or found its modules. The tensors there are, and their names, say the result.
_WITHOUT_EFFECT = frozenset((
    "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "eva_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying", "fan_in_fan_out",
))  # fmt: skip
# Values, besides null, false and empty ones, under which a field changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    # The other starts change the base model when the adapter is loaded.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
_WAYS = {
    "init_lora_weights": "It moves the base's weights: save the adapter with peft's "
    "path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
}
_WAY = (
    "Merge it with peft (merge_and_unload), and take the whole model: `steps run convert/hf_to_megatron hf_model_id=…`."
)


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json says what is computed: scale * B A at each module."""

    r: int
    lora_alpha: float
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

    def rank(self, module: str) -> int:
        """Of one module, by its full name."""
        return int(_of(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """What the product of one module's factors is multiplied with."""
        rank = self.rank(module)
        return float(_of(self.alpha_pattern, module, self.lora_alpha)) / (math.sqrt(rank) if self.use_rslora else rank)


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is, as a regular expression, the end of the module's name."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def config_json(
    *, r: int, lora_alpha: float, target_modules: Sequence[str], use_dora: bool, use_rslora: bool, base: str | None
) -> dict[str, Any]:
    """The contents of adapter_config.json. base: what is written as base_model_name_or_path."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }


def read(data: Any, where: str) -> AdapterConfig:
    """Understand the contents of an adapter_config.json. where: the file, for the messages.

    Raises ArtifactError (unsupported_adapter) with everything that is not understood or impossible.
    """
    if not isinstance(data, Mapping):
        raise ArtifactError(Problem(where=where, what="holds no mapping", name="damaged_artifact"))
    problems = [_problem(where, key, value) for key, value in data.items() if _changes(key, value)]
    if data.get("peft_type") != "LORA":
        problems.append(_problem(where, "peft_type", data.get("peft_type"), "LORA"))
    else:
        problems += _impossible(data, where)
    if problems:
        raise ArtifactError(problems)
    known = {name: data[name] for name in _READ[1:] if data.get(name) is not None}
    return AdapterConfig(**known)


def _changes(key: str, value: Any) -> bool:
    """Whether a field may change what is computed, in a way that is not understood here."""
    known = key in _READ or key in _WITHOUT_EFFECT
    return not known and bool(value) and value not in _NEUTRAL.get(key, ())


def _impossible(data: Mapping[str, Any], where: str) -> list[Problem]:
    def values(key: str, pattern: str) -> Iterator[tuple[str, Any]]:
        yield key, data.get(key)
        yield from ((f"{pattern}.{name}", value) for name, value in (data.get(pattern) or {}).items())

    problems = []
    for key, value in values("r", "rank_pattern"):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(_problem(where, key, value, "a whole number from 1"))
    for key, value in values("lora_alpha", "alpha_pattern"):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            problems.append(_problem(where, key, value, "a number above 0"))
    return problems


def _problem(where: str, key: str, value: Any, allowed: str = "") -> Problem:
    text = json.dumps(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    allowed = allowed or " | ".join(json.dumps(one) for one in _NEUTRAL.get(key, ()))
    what = f"{shown} is not supported"
    return Problem(
        where=f"{where}: {key}", what=what, allowed=allowed, hint=_WAYS.get(key, _WAY), name="unsupported_adapter"
    )


def faults(file: Path) -> Sequence[Problem]:
    """Why an adapter_config.json cannot be taken over; nothing when it can."""
    try:
        read(json.loads(file.read_text(encoding="utf-8")), str(file))
    except ArtifactError as error:
        return error.problems
    except ValueError as error:
        return [Problem(where=str(file), what=f"is no JSON: {error}", name="damaged_artifact")]
    return []
