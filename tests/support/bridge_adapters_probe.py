"""Run genuine Megatron-Bridge adapters on a CPU: `python -m support.bridge_adapters_probe JOBS.json`.

A job is {base, adapter, ids, logits, base_logits}: load the base (an iter_NNNNNNN folder of ours) into a GPTModel built
from its run_config.yaml, write its logits of `ids`; put the adapter on it that the adapter checkpoint's run_config.yaml
names, by Megatron-Bridge's own classes, load our tensors into it, and write the logits again.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from support import bridge_shims

bridge_shims.install()

import torch  # noqa: E402
import yaml  # noqa: E402

from support.megatron_core_probe import build, logits  # noqa: E402


def made(section: dict[str, Any]) -> Any:
    """The adapter object that a `peft` section of Megatron-Bridge describes."""
    module, _, name = section["_target_"].rpartition(".")
    values = {key: value for key, value in section.items() if key != "_target_"}
    for key, value in values.items():
        if isinstance(value, dict):
            values[key] = getattr(torch, value["_target_"].removeprefix("torch."))
    return getattr(importlib.import_module(module), name)(**values)


def load(folder: Path, state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The stored tensors for a sharded state, and the keys that only one side has (but for Transformer Engine's)."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    loaded, missing, unexpected = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    return loaded, [key for key in (*missing, *unexpected) if "_extra_state" not in key]


def run(job: dict[str, str]) -> None:
    from megatron.bridge.training.checkpointing import apply_peft_adapter_filter_to_state_dict

    base, adapter, ids = Path(job["base"]), Path(job["adapter"]), torch.tensor(json.loads(job["ids"]))
    model = build(yaml.safe_load((base / "run_config.yaml").read_text())["model"])
    tensors, odd = load(base, model.sharded_state_dict(prefix=""))
    assert not odd, odd
    model.load_state_dict(tensors, strict=False)
    torch.save(logits(model, ids), job["base_logits"])

    method = made(yaml.safe_load((adapter / "run_config.yaml").read_text())["peft"])
    model = method(model, training=True)
    method.set_params_to_save(model)
    state = apply_peft_adapter_filter_to_state_dict({"model": model.sharded_state_dict(prefix="")}, method)["model"]
    tensors, odd = load(adapter, state)
    assert not odd, odd
    model.load_state_dict(tensors, strict=False)
    torch.save(logits(model.eval(), ids), job["logits"])


if __name__ == "__main__":
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(entry)
    torch.distributed.destroy_process_group()
