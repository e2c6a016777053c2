"""Models and data of the benchmarks, made once under --work by our own steps from the packages of the extra `demo`."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.side_by_side import ROOT, STEPS, timed

PACK_SIZE = 2048


def conversations(work: Path) -> Path:
    """The JSONL of all chitchat conversations."""
    return _made(work / "chat", work, "data_prep/demo_chat", "output_dir={}", "max_conversations=7168")


def packed(work: Path) -> Path:
    """A packed_parquet of PACK_SIZE tokens a row, tokenized for SmolLM2."""
    return _made(
        work / "packed", work, "data_prep/sft_packing", f"blend_path={conversations(work)}", "output_dir={}",
        f"pack_size={PACK_SIZE}",
    )  # fmt: skip


def smollm2(work: Path) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct in bfloat16, as checkpoint_megatron and as checkpoint_hf."""
    return _both(_made(work / "smollm2", work, "convert/hf_to_megatron", "megatron_path={}"), work)


def llama_57m(work: Path) -> tuple[Path, Path]:
    """A Llama of 57M parameters with SmolLM2's vocabulary and random weights, bfloat16, in both forms."""
    return _random_llama(
        work / "llama_57m", work, vocab_size=49152, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=PACK_SIZE,
    )  # fmt: skip


def llama_1b(work: Path) -> tuple[Path, Path]:
    """A Llama of the shape of Llama-3.2-1B, likewise."""
    return _random_llama(
        work / "llama_1b", work, vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=8192, max_position_embeddings=2 * PACK_SIZE,
    )  # fmt: skip


def _random_llama(path: Path, work: Path, **shape: int) -> tuple[Path, Path]:
    source = path.with_name(f"{path.name}_source")
    if not source.exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape))
        model.to("cpu", torch.bfloat16).save_pretrained(source)
    return _both(_made(path, work, "convert/hf_to_megatron", f"hf_model_id={source}", "megatron_path={}"), work)


MODELS = {"57M": llama_57m, "135M": smollm2}


def _both(megatron: Path, work: Path) -> tuple[Path, Path]:
    hugging_face = _made(
        megatron.with_name(f"{megatron.name}_hf"), work, "convert/megatron_to_hf", f"megatron_path={megatron}",
        "hf_path={}",
    )  # fmt: skip
    return megatron, hugging_face


def _made(path: Path, work: Path, step: str, *settings: str) -> Path:
    if not (path / "artifact.json").exists():
        command = [STEPS, "run", step, "-c", "tiny", *(setting.format(path) for setting in settings)]
        timed(command, work, {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))})
    return path
