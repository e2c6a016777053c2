"""transformers + peft as people write the loop: one packed row a step, documents kept apart by position_ids."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.contenders.packs import Pack, packs
from benchmarks.contenders.turns import Turns


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int, default=1, help="of one document and one length, as a batch")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.precision)).to(device)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)
    step = torch.compile(model, dynamic=True) if options.compile else model
    turns = Turns()
    rows = packs(options.packed, 200, seed=0)
    while turns.asked():
        batch = [next(rows) for _ in range(options.rows)]
        parts = zip(*map(_tensors, batch), strict=True)
        ids, positions, labels = (torch.stack(part).to(device) for part in parts)
        # Positions that begin anew make it build a mask. Where each row is one document, it needs neither.
        where = {"position_ids": positions} if any(len(pack.documents) > 1 for pack in batch) else {}
        loss = step(input_ids=ids, labels=labels, use_cache=False, **where).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.done(tokens=ids.numel(), loss=loss.item())  # asking for the loss waits for a GPU


def _tensors(pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions and labels of a row, each [tokens]."""
    ids = list(chain(*pack.documents))
    trained = list(chain(*pack.targets))
    labels = [token if mark else -100 for token, mark in zip(ids, trained, strict=True)]
    positions = list(chain(*(range(len(document)) for document in pack.documents)))
    return torch.tensor(ids), torch.tensor(positions), torch.tensor(labels)


if __name__ == "__main__":
    main()
