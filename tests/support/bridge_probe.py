"""Run by tests/parity/test_megatron_bridge.py in an interpreter that has genuine Megatron-Bridge.

    PYTHONPATH=tests:src python -m support.bridge_probe JOB.json RESULT.json

JOB.json: {"resolved", "packed_dir", "base", "whole" (one of all weights), "broken" (configurations that must be
refused), "adapters": each with a peft section and the folder of a checkpoint of ours; genuine tensors and checkpoints
are left beside that folder}.
RESULT.json: what genuine code made of it, as plain data; the test judges. Nothing here is asserted.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
from pathlib import Path
from typing import Any

from support import bridge_shims

os.environ["WORLD_SIZE"] = "16"  # the cluster that the configuration is for; nothing is started on it
bridge_shims.install()

import torch  # noqa: E402

from steps.engine import megatron_bridge  # noqa: E402
from steps.engine.megatron_bridge import adapter, release  # noqa: E402
from steps.engine.megatron_bridge.findings import Findings  # noqa: E402
from steps.engine.progress import Silent  # noqa: E402
from steps.errors import StepsError  # noqa: E402


class Lines(Silent):
    """A Progress that keeps its log lines."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def log(self, message: str) -> None:
        self.said.append(message)


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    installed = release.load()
    result: dict[str, Any] = {"version": installed.version, "reads_parquet": installed.reads_parquet}
    container, result["called_with"], result["log"] = record_finetune(job)
    result["container"] = plain(container)
    result["forward_step"] = result["called_with"].pop("forward_step_func")
    result["run_config_facts"] = facts_of(container, Path(result_file).parent / "saved")
    result["splits"] = read_rows(container)
    whole = megatron_bridge.build(job["whole"], Path(job["packed_dir"]), Path(job["base"]), adapts=False)
    result["whole"] = {"peft": plain(whole.peft), "lr": whole.optimizer.lr, "validated": validate(whole)}
    result["refused"] = [refusal(job, resolved) for resolved in job["broken"]]
    result["validated"] = validate(container)
    result["adapters"] = [exchange(entry["peft"], Path(entry["checkpoint"]), installed) for entry in job["adapters"]]
    Path(result_file).write_text(json.dumps(result))


def record_finetune(job: dict[str, Any]) -> tuple[Any, dict[str, Any], list[str]]:
    """Call our `finetune` with Megatron-Bridge's own replaced, at the last moment, by a recorder.

    That call is as far as a CPU goes: it starts NCCL.
    """
    import megatron.bridge.training.finetune as genuine

    received: dict[str, Any] = {}
    original, genuine.finetune = genuine.finetune, lambda **arguments: received.update(arguments)
    progress = Lines()
    try:
        megatron_bridge.finetune(
            job["resolved"], packed_dir=Path(job["packed_dir"]), base=Path(job["base"]), progress=progress
        )
    finally:
        genuine.finetune = original
    step = received["forward_step_func"]
    told = {"config": type(received["config"]).__name__, "forward_step_func": f"{step.__module__}.{step.__name__}"}
    return received["config"], told, progress.said


def refusal(job: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    try:
        megatron_bridge.build(resolved, Path(job["packed_dir"]), Path(job["base"]))
    except StepsError as error:
        return {"kind": type(error).__name__, "problems": [problem.to_dict() for problem in error.problems]}
    return {}


def facts_of(container: Any, save: Path) -> dict[str, Any]:
    """`facts` of a checkpoint whose run_config.yaml the genuine container wrote."""
    folder = save / "iter_0000005"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (save / "latest_checkpointed_iteration.txt").write_text("5")
    container.to_yaml(str(folder / "run_config.yaml"))
    return megatron_bridge.facts(save)


def read_rows(container: Any) -> dict[str, Any]:
    """Every split as Megatron-Bridge's own dataset classes read and collate it, with the tokenizer it builds itself."""
    from megatron.bridge.data.utils import get_dataset_provider
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(container.tokenizer)
    made = get_dataset_provider(container.dataset)([4, 4, 0], container.dataset, tokenizer=tokenizer)
    splits: dict[str, Any] = {"eos": tokenizer.eos_id}
    for name, dataset in zip(("train", "valid", "test"), made, strict=True):
        if dataset is None:
            splits[name] = None
            continue
        batch = dataset.collate_fn([dataset[index] for index in range(len(dataset))])
        splits[name] = {key: value.tolist() for key, value in batch.items() if isinstance(value, torch.Tensor)}
        splits[name]["class"] = type(dataset).__name__
    return splits


def validate(container: Any) -> str:
    """Megatron-Bridge's own validation, the first thing its `finetune` does; '' when it accepts the container."""
    from megatron.bridge.training.config import runtime_config_update

    try:
        runtime_config_update(container)
    except (AssertionError, ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def exchange(section: dict[str, Any], ours: Path, installed: release.Release) -> dict[str, Any]:
    """Put a genuine adapter on a small model, load our checkpoint into it, give it other values and save those.

    ours: an iter_NNNNNNN folder. Left beside its checkpoint: loaded.pt and saved.pt, parameters by name; saved/, the
          genuine checkpoint of the latter.
    Returns the keys and global shapes of its tensors, the keys of what else it saves, the keys that were only on one
    side, and what Megatron-Core has against storing this adapter at all.
    """
    from megatron.bridge.training.checkpointing import apply_peft_adapter_filter_to_state_dict
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.validation import (
        StrictHandling,
        determine_global_metadata,
        validate_sharding_integrity,
    )

    findings = Findings()
    made = adapter.build(section, installed.adapters, None, findings)
    findings.raise_if_any()
    model = made(small_model(), training=True)
    made.set_params_to_save(model)

    def state() -> dict[str, Any]:
        return apply_peft_adapter_filter_to_state_dict({"model": model.sharded_state_dict()}, made)["model"]

    def adapters() -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    written = state()
    apply_factories(written)  # linear_fc1 is written as a gate half and an up half of one tensor
    parts = [part for value in written.values() for part in leaves(value)]
    result = {
        "class": type(made).__name__,
        "shapes": {part.key: list(part.global_shape) for part in parts if isinstance(part, ShardedTensor)},
        "others": [part.key for part in parts if not isinstance(part, ShardedTensor)],
        "integrity": "",
    }
    try:
        validate_sharding_integrity(determine_global_metadata(written)[1])
    except CheckpointingException as error:
        return {**result, "integrity": str(error)}  # neither loading nor saving would come further
    loaded, missing, unexpected = dist_checkpointing.load(state(), str(ours), strict=StrictHandling.RETURN_ALL)
    model.load_state_dict(loaded, strict=False)
    torch.save(adapters(), ours.parent.parent / "loaded.pt")
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_()
    torch.save(adapters(), ours.parent.parent / "saved.pt")
    (ours.parent.parent / "saved").mkdir()
    dist_checkpointing.save(state(), str(ours.parent.parent / "saved"))
    return {**result, "unmatched": [*missing, *unexpected]}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]


def small_model() -> Any:
    """A Llama-like GPTModel of Megatron-Core: 2 layers, hidden 32, 4 heads in 2 groups, ffn 48, vocabulary 64."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, use_cpu_initialization=True, bias_activation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, bias_dropout_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config, spec, vocab_size=64, max_sequence_length=64, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip


def plain(value: Any) -> Any:
    """A configuration as plain data, to be compared by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"class": type(value).__name__, **found}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


if __name__ == "__main__":
    main(*sys.argv[1:])
