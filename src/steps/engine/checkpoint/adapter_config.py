"""run_config.yaml of an adapter checkpoint: what Megatron-Bridge reads of it, and what we do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steps.config.peft import Peft
from steps.shapes.targets import chosen, covering


def adapter_run_config(base: Mapping[str, Any], section: Peft, bridge_class: str, base_dir: Path) -> dict[str, Any]:
    """The sections of the base's run_config.yaml, and those of the adapter.

    bridge_class: Megatron-Bridge's class of the method, '' where it has none.   base_dir: the checkpoint_megatron.
    """
    checkpoint: Mapping[str, Any] = base.get("checkpoint") or {}
    return {
        **base,
        "peft": _peft_section(section, bridge_class, int(base["model"]["num_layers"])),
        # Ours beside it, which Megatron-Bridge ignores: all settings, in our names.
        "adapter": section.model_dump(),
        "checkpoint": {**checkpoint, "pretrained_checkpoint": str(base_dir.resolve())},
    }


def _peft_section(settings: Peft, bridge_class: str, num_layers: int) -> dict[str, Any]:
    """The method's settings as Megatron-Bridge writes them where it has the method, as ours otherwise."""
    section: dict[str, Any] | None = settings.bridge_section()
    if section is None or not bridge_class:
        return dict(settings.model_dump())
    dtypes = {
        name: {"_target_": f"torch.{value}", "_call_": False}
        for name, value in section.items()
        if name.endswith("_dtype") and value is not None
    }
    # Named one by one: what Megatron-Bridge's exclude_modules leaves would include the output layer.
    targets = {"target_modules": covering(chosen(settings, num_layers), num_layers), "exclude_modules": []}
    return {"_target_": bridge_class, **section, **targets, **dtypes}
