from __future__ import annotations

import subprocess
import sys

import pytest
from support.packed import SHAPE

from steps.engine.adapters.targets import linear_names, problems, select
from steps.engine.model.decoder import Decoder

NAMES = linear_names(12)


def test_the_names_are_the_decoders_linears():
    assert linear_names(SHAPE.num_layers) == list(Decoder(SHAPE).linears())


@pytest.mark.parametrize(
    ("targets", "excluded", "count"),
    [
        (["linear_qkv"], [], 12),
        (["linear_qkv", "linear_proj"], [], 24),
        ([], [], 48),
        ([], ["linear_fc1", "linear_fc2"], 24),
        (["*"], ["*.layers.0.*"], 44),
        (["*.layers.0.*.linear_qkv"], [], 1),
        (["*.layers.1.*.linear_qkv"], [], 1),  # not layers 10 and 11
        (["decoder.layers.3.mlp.linear_fc1"], [], 1),
        (["*.mlp.*"], [], 24),
        (["linear_qkv"], ["*.layers.1*"], 9),
    ],
)
def test_selection(targets, excluded, count):
    assert not list(problems(targets, excluded, NAMES))
    chosen = select(targets, excluded, NAMES)
    assert len(chosen) == count
    assert chosen == [name for name in NAMES if name in chosen]


@pytest.mark.parametrize(
    ("targets", "excluded", "message"),
    [
        (["linear_qvk"], [], "peft.target_modules: 'linear_qvk' matches no module. Allowed: linear_qkv, linear_proj, "
         "linear_fc1, linear_fc2. Did you mean linear_qkv?"),
        (["q_proj"], [], "q_proj is part of linear_qkv here: write linear_qkv."),
        (["*.layers.0.*.down_proj"], [], "down_proj is part of linear_fc2 here: write *.layers.0.*.linear_fc2."),
        (["*.layers.12.*.linear_qkv"], [], "the model has layers 0 to 11"),
        (["linear_qkv"], ["linear_fc9"], "peft.exclude_modules: 'linear_fc9' matches no module"),
        (["linear_qkv"], ["linear_qkv"], "no module is left to adapt"),
        (["layers.0.linear"], [], "matches no module"),
    ],
)  # fmt: skip
def test_a_target_that_means_nothing_is_told(targets, excluded, message):
    (problem,) = problems(targets, excluded, NAMES)
    assert message in str(problem)
    assert problem.name == "target_not_found"


def test_every_bad_entry_is_reported_at_once():
    assert len(list(problems(["q_proj", "linear_qkv", "nothing"], ["also_nothing"], NAMES))) == 3


def test_matching_needs_no_torch():
    code = "import sys, steps.engine.adapters.targets, steps.engine.train.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
