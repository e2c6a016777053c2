"""TRL's SFTTrainer with its own packing, on the documents of the same rows."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.contenders.packs import packs
from benchmarks.contenders.turns import Turns


class _OneStepATurn(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self._turns, self.tokens = turns, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self._turns.asked():
            control.should_training_stop = True
            raise SystemExit(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._turns.done(tokens=self.tokens)


class _Counting(SFTTrainer):
    def training_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
        self.callback_handler.callbacks[-1].tokens = inputs["input_ids"].numel()
        return super().training_step(model, inputs, *others, **named)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    options = parser.parse_args()
    found = list(packs(options.packed, 60, seed=0))
    documents = [pair for pack in found for pair in zip(pack.documents, pack.targets, strict=True)]
    labels = [
        [token if mark else -100 for token, mark in zip(tokens, marks, strict=True)] for tokens, marks in documents
    ]
    data = Dataset.from_dict({"input_ids": [tokens for tokens, _ in documents], "labels": labels})
    with tempfile.TemporaryDirectory() as place:
        settings = SFTConfig(
            output_dir=place, max_steps=1000, per_device_train_batch_size=1, gradient_accumulation_steps=1,
            packing=True, packing_strategy="bfd", max_length=2048, learning_rate=1e-4,
            use_cpu=True, bf16=options.precision == "bfloat16", gradient_checkpointing=False, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_strategy="no",
            model_init_kwargs={"dtype": getattr(torch, options.precision)},
        )  # fmt: skip
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        trainer = _Counting(
            str(options.model), args=settings, train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(options.tokenizer),
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.add_callback(_OneStepATurn(Turns()))
        trainer.train()


if __name__ == "__main__":
    main()
