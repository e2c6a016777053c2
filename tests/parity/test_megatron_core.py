"""Checkpoints we write, loaded by genuine Megatron-Core with the same logits; checkpoints it writes, loaded here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.models import FAMILIES, save_hf

from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.convert import hf_to_megatron, megatron_source
from steps.engine.checkpoint.hf import open_source
from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.model.decoder import Decoder, load_weights

pytest.importorskip("megatron.core", reason="extra parity")
pytest.importorskip("transformers", reason="extra parity")

PROBE = Path(__file__).parents[1] / "support" / "megatron_core_probe.py"
# Megatron-Core knows Llama-3 scaling with these three numbers only.
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {name: (name, {}) for name in FAMILIES if name != "llama_rope_scaling"}
# A small base, so that the positions of this test already turn far enough for the scaling to show.
CASES["llama_rope_scaling"] = ("llama", {"rope_scaling": SCALING, "rope_theta": 500_000.0})


@dataclass
class Case:
    """The files of one model and the logits that transformers gives for it."""

    folder: Path
    reference: torch.Tensor
    ids: torch.Tensor

    @property
    def checkpoint(self) -> Path:
        return self.folder / "megatron" / "iter_0000000"

    @property
    def saved(self) -> Path:
        return self.folder / "saved"

    def result(self, name: str) -> torch.Tensor:
        return torch.load(self.folder / f"{name}.pt")


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """Every model converted, and Megatron-Core run over all of them in one process."""
    root = tmp_path_factory.mktemp("megatron_core")
    made, jobs = {}, []
    for name, (family, overrides) in CASES.items():
        folder = root / name
        model = save_hf(folder / "hf", family, **overrides)
        hf_to_megatron(open_source(str(folder / "hf")), folder / "megatron")
        ids = torch.randint(0, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            case = made[name] = Case(folder, model(ids[None]).logits[0], ids)
        jobs.append(
            {
                "checkpoint": str(case.checkpoint),
                "ids": json.dumps(ids.tolist()),
                "logits": str(folder / "logits.pt"),
                "save": str(case.saved),
                "saved_logits": str(folder / "saved_logits.pt"),
            }
        )
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(PROBE), str(root / "jobs.json")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", CASES)
def test_megatron_core_loads_our_checkpoint_with_the_logits_of_transformers(cases, name):
    case = cases[name]
    # Float32 in two orders of summation; logits are of the size 1.
    torch.testing.assert_close(case.result("logits"), case.reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_that_megatron_core_writes_loads_here_with_its_logits(cases, name):
    case = cases[name]
    # Megatron-Core writes no run_config.yaml, Megatron-Bridge does.
    shutil.copyfile(case.checkpoint / "run_config.yaml", case.saved / "run_config.yaml")
    source = megatron_source(case.saved)
    decoder = Decoder(source.config)
    load_weights(decoder, ((key, value.load()) for key, value in Checkpoint.open(case.saved).tensors.items()))
    with torch.no_grad():
        logits = decoder(case.ids, [0, len(case.ids)])
    torch.testing.assert_close(logits, case.result("saved_logits"), rtol=0, atol=2e-5)
    assert (logits - case.reference).abs().max() > 0.1, "the saved weights are other ones"
    back = mapping.to_megatron(source.config, source.tensors)
    for key, value in Checkpoint.open(case.saved).tensors.items():
        assert torch.equal(back[key].load(), value.load()), key


def test_scaling_and_window_show_in_these_logits(cases):
    """A reader that ignored them would be noticed above."""
    plain = save_hf(cases["llama"].folder / "plain", "llama", rope_theta=500_000.0)
    wide = save_hf(cases["llama"].folder / "wide", "mistral_sliding_window", sliding_window=9)
    for model, name in ((plain, "llama_rope_scaling"), (wide, "mistral_sliding_window")):
        with torch.no_grad():
            difference = model(cases[name].ids[None]).logits[0] - cases[name].reference
        assert difference.abs().max() > 1e-3, name
