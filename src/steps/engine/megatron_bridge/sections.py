"""Our sections in Megatron-Bridge's arrangement: what follows from a key there, and where a key lives there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steps.artifacts.checkpoint import iteration_dir
from steps.engine.megatron_bridge.findings import Findings
from steps.engine.megatron_bridge.values import names

#: Keys that live in another section there, in some releases; the first place that exists is taken.
_MOVED = {
    "train.log_interval": ("logger.log_interval",),
    "train.eval_interval": ("validation.eval_interval",),
    "train.eval_iters": ("validation.eval_iters",),
    "train.recompute_granularity": ("model.recompute_granularity",),
}


def derive(sections: Mapping[str, Any], base: Path, findings: Findings) -> dict[str, Any]:
    """The sections with what follows from them in Megatron-Bridge and would otherwise stay the recipe's."""
    made = {name: dict(values) if isinstance(values, Mapping) else values for name, values in sections.items()}
    checkpoint = made["checkpoint"] = made.get("checkpoint") or {}
    for key in ("save", "load"):
        checkpoint[key] = str(Path(checkpoint[key]).expanduser()) if checkpoint.get(key) else None
    # Recipes resume from ./nemo_experiments, whatever lies there. We resume from our own place.
    checkpoint |= {"pretrained_checkpoint": str(base), "load": checkpoint["load"] or checkpoint["save"]}
    source = iteration_dir(Path(checkpoint["load"]), checkpoint.get("ckpt_step")) if checkpoint["load"] else None
    if source is not None and (source / "training_state.pt").is_file():
        made["checkpoint"] = {"load_optim": False, "load_rng": False, **checkpoint}
        findings.note(f"{source} was saved by the torch engine: its adapter is loaded, the optimizer starts afresh")
    decay = (made.get("optimizer") or {}).get("weight_decay")
    if decay is not None:
        # The scheduler sets the optimizer's weight decay at each step, from these two.
        made["scheduler"] = {"start_weight_decay": decay, "end_weight_decay": decay, **(made.get("scheduler") or {})}
    if isinstance(made.get("optimizer"), dict) and made["optimizer"].pop("offload", False):
        made["optimizer"] = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0, **made["optimizer"]}
        findings.note("optimizer.offload is optimizer.optimizer_cpu_offload in Megatron-Bridge")
    train = made["train"] = made.get("train") or {}
    if train.get("eval_interval") == 0 and isinstance(train.get("train_iters"), int):
        # Zero divides there. Never within the run; the evaluation after the last step is always done.
        train["eval_interval"] = train["train_iters"] + 1
    if train.get("recompute_granularity") == "full":
        made["model"] = {"recompute_method": "uniform", "recompute_num_layers": 1, **(made.get("model") or {})}
    elif "recompute_granularity" in train:
        del train["recompute_granularity"]  # null, auto: as the recipe has it
    train.pop("compile", None)  # Megatron's own kernels are fused as they are
    _precision(train.pop("precision", "auto"), made, findings)
    return made


def _precision(precision: str, sections: dict[str, Any], findings: Findings) -> None:
    """train.precision, the torch engine's word, as a preset of mixed_precision."""
    if precision == "auto":
        return
    if "mixed_precision" in sections:
        findings.note("train.precision gives way to mixed_precision")
    elif precision == "bfloat16":
        sections["mixed_precision"] = "bf16_mixed"
        findings.note("train.precision bfloat16 is mixed_precision bf16_mixed in Megatron-Bridge")
    else:
        findings.problem(
            "train.precision",
            f"Megatron-Bridge has no preset for {precision}",
            allowed="auto, bfloat16",
            hint="Set `mixed_precision` and `model.params_dtype` in its own words instead.",
        )


def relocate(sections: Mapping[str, Any], container: Any, findings: Findings) -> dict[str, Any]:
    """The sections with keys moved to where this release keeps them. What stands there already has precedence."""
    made = {name: dict(values) if isinstance(values, Mapping) else values for name, values in sections.items()}
    for source, targets in _MOVED.items():
        section, key = source.split(".")
        values, here = made.get(section), getattr(container, section, None)
        if not isinstance(values, dict) or key not in values or here is None or key in names(here):
            continue
        for target in targets:
            other, name = target.split(".")
            there = getattr(container, other, None)
            if there is not None and name in names(there):
                made.setdefault(other, {}).setdefault(name, values.pop(key))
                findings.note(f"{source} is {target} in Megatron-Bridge")
                break
    return made
