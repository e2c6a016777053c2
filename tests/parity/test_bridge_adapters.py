"""Adapters trained here, put on a genuine Megatron-Core model by genuine Megatron-Bridge classes: the same logits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from support.adapters import adapted, section, told, train
from support.bridge import PYTHON
from support.packed import SHAPE, random_rows, write_base, write_packed

from steps.artifacts.checkpoint import iteration_dir
from steps.engine.checkpoint.megatron import Checkpoint

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="megatron.bridge is not installed; STEPS_BRIDGE_PYTHON can name an interpreter that has it"
)

TESTS = Path(__file__).parents[1]
IDS = torch.randint(SHAPE.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
#: Megatron-Core stores an adapter only if it is on every layer.
CASES = [
    {"type": "lora", "dim": 4, "alpha": 6},
    {"type": "lora", "dim": 4, "alpha": 6, "use_rslora": True, "target_modules": ["linear_qkv", "linear_fc2"]},
    {"type": "lora", "dim": 4, "alpha": 6, "exclude_modules": ["linear_proj"], "init_lora_weights": "eva"},
    {"type": "canonical_lora", "dim": 4, "alpha": 6},
    {"type": "dora", "dim": 4, "alpha": 6},
    {"type": "dora", "dim": 4, "alpha": 6, "target_modules": ["linear_fc1", "linear_proj"]},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Every case trained, and Megatron-Bridge run over all of them in one process."""
    assert PYTHON is not None
    path = tmp_path_factory.mktemp("bridge_adapters")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    jobs = []
    for index, case in enumerate(CASES):
        save = path / str(index)
        train(path, peft=case, optimizer={"lr": 0.03}, checkpoint={"save": str(save)})
        jobs.append(
            {
                "base": str(iteration_dir(path / "base")),
                "adapter": str(iteration_dir(save)),
                "ids": json.dumps(IDS.tolist()),
                "logits": str(path / f"logits{index}.pt"),
                "base_logits": str(path / f"base{index}.pt"),
            }
        )
    (path / "jobs.json").write_text(json.dumps(jobs))
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]), "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, "-m", "support.bridge_adapters_probe", str(path / "jobs.json")],
        cwd=path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return path


@pytest.mark.parametrize("index", range(len(CASES)), ids=[told(case) for case in CASES])
def test_genuine_classes_load_our_adapter_and_give_our_logits(root, index):
    case = CASES[index]
    adapters = adapted(case)
    stored = Checkpoint.open(root / str(index)).tensors
    adapters.load({name: tensor.load() for name, tensor in stored.items()})
    with torch.no_grad():
        ours = adapters.decoder.eval()(IDS, [0, len(IDS)])
    theirs, base = (torch.load(root / f"{name}{index}.pt") for name in ("logits", "base"))
    assert (ours - base).abs().max() > 0.5, "the adapter has not learned anything that would show"
    # Float32 in two orders of summation; logits are of order 10.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)
    assert section(case).bridge_section() is not None
