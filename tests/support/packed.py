"""Small packed data and a small random base on disk, written as the real steps write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from steps.artifacts.record import Record, digest_files
from steps.config.peft import Peft
from steps.engine.checkpoint import convert, megatron
from steps.engine.checkpoint import fingerprint as fingerprints
from steps.engine.model.decoder import Decoder
from steps.shapes.model_config import ModelConfig
from steps.shapes.run_config import run_config

SHAPE = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    ffn_hidden_size=48,
    vocab_size=61,
    max_position_embeddings=256,
)
PACK_SIZE = 48
TOKENIZER = "0" * 64


def random_decoder(shape: ModelConfig = SHAPE, seed: int = 0, **options: object) -> Decoder:
    """A decoder with random weights, large enough for losses that move."""
    decoder = Decoder(shape, **options)  # type: ignore[arg-type]
    generator, weights = torch.Generator().manual_seed(seed), decoder.weights()
    for name in dict(Decoder(shape, device="meta").named_parameters()):  # the same numbers, however they are held
        values = torch.randn(weights[name].shape, generator=generator)
        norm = "norm" in name
        weights[name].copy_(1 + 0.1 * values if norm else 0.2 * values)
    return decoder


def write_base(
    path: Path, shape: ModelConfig = SHAPE, seed: int = 0, *, fingerprint: str = "base", true: bool = False
) -> Decoder:
    """A checkpoint_megatron with record; returns its model.

    true: the record holds the fingerprint of the weights, for steps that look at it, instead of any text.
    """
    decoder = random_decoder(shape, seed)
    tensors = dict(decoder.named_parameters())
    megatron.write(path, tensors, num_layers=shape.num_layers, run_config=run_config(shape))
    if true:
        fingerprint = fingerprints.fingerprint(convert.megatron_source(path).tensors)
    facts = {"base_fingerprint": fingerprint, "tokenizer_digest": TOKENIZER, "model": shape.to_dict()}
    _seal(path, "checkpoint_megatron", facts)
    return decoder


def random_rows(rows: int, seed: int = 0, pack_size: int = PACK_SIZE, vocab_size: int = SHAPE.vocab_size) -> list[dict]:
    """Packs of two to five documents; about half of the tokens trained, never a document's last."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        tokens = int(generator.integers(pack_size - 8, pack_size + 1))
        cuts = generator.choice(np.arange(4, tokens - 3), size=int(generator.integers(1, 5)), replace=False)
        starts = [0, *sorted(int(cut) for cut in cuts)]
        # A pattern that can be learnt: each token follows from the one before.
        ids = (np.arange(tokens) * 7 + generator.integers(vocab_size)) % vocab_size
        mask = (generator.random(tokens) < 0.5).astype(np.uint8)
        mask[[start - 1 for start in [*starts[1:], tokens]]] = 0
        mask[0] = 1
        made.append({"input_ids": ids.tolist(), "loss_mask": mask.tolist(), "seq_start_id": starts})
    return made


def write_packed(path: Path, train: Sequence[dict], valid: Sequence[dict] = (), *, pack_size: int = PACK_SIZE) -> Path:
    """A packed_parquet with record; the train split lies in two files."""
    half = (len(train) + 1) // 2
    for split, name, rows in (("train", "a", train[:half]), ("train", "b", train[half:]), ("valid", "a", valid)):
        if rows:
            folder = path / "splits" / split
            folder.mkdir(parents=True, exist_ok=True)
            schema = pa.schema(
                [
                    ("input_ids", pa.list_(pa.int32())),
                    ("loss_mask", pa.list_(pa.uint8())),
                    ("seq_start_id", pa.list_(pa.int32())),
                ]
            )
            table = pa.Table.from_pylist(list(rows), schema=schema)
            pq.write_table(table, folder / f"{name}.parquet", compression="zstd", row_group_size=4)
    _seal(path, "packed_parquet", {"pack_size": pack_size, "tokenizer_digest": TOKENIZER})
    return path


def _seal(path: Path, type: str, facts: dict) -> None:
    record = Record(type=type, facts=facts)
    record.digest, record.files = digest_files(path)
    record.write(path)


def config(root: Path, **sections: dict) -> dict:
    """A resolved configuration of peft/megatron_bridge over `root`/packed and `root`/base; sections add to it."""
    data = {
        "engine": "torch",
        "recipe": {"seq_length": PACK_SIZE},
        "dataset": {"nano3_packed_sft_dir": str(root / "packed")},
        "train": {
            "train_iters": 12, "global_batch_size": 4, "micro_batch_size": 2, "eval_interval": 5, "eval_iters": 2,
        },
        "optimizer": {"lr": 0.01},
        "scheduler": {"lr_warmup_iters": 2},
        "peft": {"type": "lora", "dim": 4, "alpha": 8},
        "checkpoint": {
            "pretrained_checkpoint": str(root / "base"), "save": str(root / "lora"), "save_interval": 3,
        },
        "rng": {"seed": 7},
    }  # fmt: skip
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values} if isinstance(values, dict) else values
    fields = Peft.variant(data["peft"]).model_fields
    data["peft"] = {key: value for key, value in data["peft"].items() if key in fields or key in sections["peft"]}
    return data
