"""Small runs of every adapter method, for tests that do not know the methods by name."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steps.artifacts.opening import open_artifact
from steps.artifacts.record import Record
from steps.config.peft import Peft, names, section_class
from steps.config.validate import validate
from steps.engine.adapters import base
from steps.engine.model.decoder import Decoder
from steps.engine.progress import Silent
from steps.engine.train.finetune import finetune
from steps.peft.megatron_bridge.schema import BASE, DATA, Config
from steps.shapes.targets import chosen
from support.packed import SHAPE, config, random_decoder

#: Settings of each method that fit SHAPE, one for each way of working that the method has.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {"dim": 4, "alpha": 6},
        {"dim": 4, "use_rslora": True, "lora_plus_ratio": 4.0, "dropout": 0.2, "dropout_position": "post"},
        {"dim": 4, "init_lora_weights": "pissa"},
        {"dim": 4, "init_lora_weights": "olora", "alpha": 4},
        {"dim": 4, "init_lora_weights": "eva", "calibration_rows": 2},
        {"dim": 4, "quantization": {"type": "nf4", "block_size": 32}},
        {"dim": 4, "quantization": {"type": "int8", "block_size": 32, "double_quant": False}},
    ),
    "canonical_lora": ({"dim": 4, "dropout": 0.2}, {"dim": 4, "target_modules": ["q_proj", "linear_v", "up_proj"]}),
    "dora": (
        {"dim": 4, "alpha": 6},
        {"dim": 4, "alpha": 6, "dropout": 0.2},
        {"dim": 4, "quantization": {"type": "nf4", "block_size": 32}},
        {"dim": 4, "quantization": {"type": "int8", "block_size": 32}},
    ),
    "adalora": (
        {"dim": 4, "alpha": 32, "target_r": 2, "dropout": 0.2},
        {"dim": 6, "alpha": 32, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "orth_reg_weight": 0.0},
    ),
    "vblora": (
        {"dim": 4, "num_vectors": 20, "vector_length": 16},
        {"dim": 4, "num_vectors": 300, "vector_length": 8, "topk": 3, "dropout": 0.2},
    ),
    "waveft": ({"n_frequency": 60, "scaling": 5.0, "random_loc_seed": 3},),
    "qr_adaptor": (
        {"ranks": [2, 4], "alpha": 6, "layer_bits": [8, 4], "layer_ranks": [2, 4], "block_size": 32},
        {
            "ranks": [2, 4],
            "alpha": 6,
            "dropout": 0.2,
            "bits": [4, 8],
            "budget_bits": 6.0,
            "calibration_rows": 2,
            "proxy_steps": 1,
            "population": 2,
            "generations": 1,
            "refinements": 1,
        },
    ),
}
CASES = [{"type": name, **variant} for name, variants in VARIANTS.items() for variant in variants]
#: How far from the base a method starts, by its paper: not at all, unless it is here.
DEPARTS: dict[str, float] = {"vblora": 0.03}  # measured: 0.023, of logits of order 10


def told(case: Mapping[str, Any]) -> str:
    """A case's name in the list of tests."""
    return "-".join([case["type"], *(f"{key}={value}" for key, value in case.items() if key not in ("type", "dim"))])


def section(case: Mapping[str, Any]) -> Peft:
    return section_class(case["type"]).model_validate(dict(case))


def bare(case: Mapping[str, Any], **options: Any) -> Decoder:
    """The random decoder of SHAPE that a case trains on, its weights held as the case says. options: of the decoder."""
    return random_decoder(quantize=section(case).held, **options)


def dense(case: Mapping[str, Any]) -> Decoder:
    """The same with weights that are not quantized any more."""
    decoder = random_decoder()
    for name, linear in bare(case).linears().items():
        decoder.get_submodule(name).weight.copy_(linear.dense())
    return decoder


def adapted(case: Mapping[str, Any], seed: int = 3, **options: Any) -> base.Adapters:
    """That decoder with the adapters of the case. options: of the decoder."""
    settings = section(case)
    method = base.create(settings, SHAPE)
    return base.attach(bare(case, **options), method, chosen(settings, SHAPE.num_layers), seed)


def shake(adapters: base.Adapters, seed: int = 5) -> None:
    """Move every trained parameter, as training would: far enough to matter, not so far that all is noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapters.parameters().values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.dtype))


class Rows(Silent):
    """A Progress that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def metrics(self, values: Mapping[str, Any]) -> None:
        self.rows.append(dict(values))

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows if "loss" in row]


def train(root: Path, **sections: Any) -> Rows:
    """A run over `root`/packed and `root`/base; sections as of support.packed.config."""
    progress = Rows()
    typed, _ = validate(Config, config(root, **sections))
    inputs = {
        DATA: open_artifact(str(root / "packed"), "packed_parquet", DATA),
        BASE: open_artifact(str(root / "base"), "checkpoint_megatron", BASE),
    }
    finetune(typed.plan(inputs), Record(type="checkpoint_lora"), progress)
    return progress


def train_in_two_processes(root: Path, **sections: Any) -> None:
    """The same, data parallel over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_one_of_two, args=(rank, port, root, sections)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]


def _one_of_two(rank: int, port: int, root: Path, sections: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    train(root, **sections)


assert set(VARIANTS) == set(names()), "every adapter method needs small settings in tests/support/adapters.py"
