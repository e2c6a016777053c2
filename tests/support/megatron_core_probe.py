"""Run genuine Megatron-Core on a CPU: `python megatron_core_probe.py JOBS.json`.

A job is {checkpoint, ids, logits, save, saved_logits}: load the checkpoint (an iter_NNNNNNN folder of ours) into a
GPTModel built from its run_config.yaml, write the logits of `ids`; then give the model new random weights, save it to
`save` with Megatron-Core's own writer, and write the logits of those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml


def shims() -> None:
    """What Megatron-Core needs to run without CUDA."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *arguments: None  # type: ignore[assignment]
    from megatron.core.tensor_parallel import random

    random.get_cuda_rng_tracker().fork = lambda name=None: contextlib.nullcontext()


class OnCpu(torch.overrides.TorchFunctionMode):
    """The sliding-window mask is made on the device "cuda", whatever the model's own device is."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def build(model: dict[str, Any]) -> torch.nn.Module:
    """GPTModel, from the `model` section of a run_config.yaml and nothing else."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    values = {name: value for name, value in model.items() if name in known and not isinstance(value, dict)}
    assert model["activation_func"]["_target_"] == "torch.nn.functional.silu"
    off = dict.fromkeys(
        (
            "bias_activation_fusion",
            "masked_softmax_fusion",
            "persist_layer_norm",
            "bias_dropout_fusion",
            "apply_rope_fusion",
        ),
        False,
    )
    if values.get("window_size"):
        values["window_size"] = tuple(values["window_size"])
    config = TransformerConfig(
        **{
            **values,
            **off,
            "activation_func": torch.nn.functional.silu,
            "use_cpu_initialization": True,
            "params_dtype": torch.float32,
            "attention_softmax_in_fp32": True,
        }
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm),
        vocab_size=model["vocab_size"],
        max_sequence_length=model["seq_length"],
        position_embedding_type=model["position_embedding_type"],
        rotary_percent=model["rotary_percent"],
        rotary_base=model["rotary_base"],
        rope_scaling=model["rope_scaling"],
        rope_scaling_factor=model["rope_scaling_factor"],
        share_embeddings_and_output_weights=model["share_embeddings_and_output_weights"],
        parallel_output=False,
    ).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocab] of one document."""
    positions = torch.arange(len(ids))[None]
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)[None, None]
    with OnCpu():
        return model(ids[None], positions, causal)[0]


def run(job: dict[str, str]) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    folder = Path(job["checkpoint"])
    section = yaml.safe_load((folder / "run_config.yaml").read_text())["model"]
    model = build(section)
    loaded, missing, unexpected = dist_checkpointing.load(
        model.sharded_state_dict(prefix=""), str(folder), strict=StrictHandling.RETURN_ALL
    )
    problems = [key for key in (*missing, *unexpected) if "_extra_state" not in key]
    assert not problems, problems
    model.load_state_dict(loaded, strict=False)
    ids = torch.tensor(json.loads(job["ids"]))
    torch.save(logits(model, ids), job["logits"])
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
    save = Path(job["save"])
    save.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(prefix=""), str(save))
    torch.save(logits(model, ids), job["saved_logits"])


if __name__ == "__main__":
    shims()
    from megatron.core import parallel_state, tensor_parallel

    store = Path(sys.argv[1]).with_suffix(".store")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed = lambda *arguments, **named: None
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(entry)
    torch.distributed.destroy_process_group()
