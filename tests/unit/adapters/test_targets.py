from __future__ import annotations

import subprocess
import sys

import pytest
from support.packed import SHAPE

from steps.engine.model.decoder import Decoder
from steps.shapes.targets import chosen, covering, faults, home, linear_names, parts, problems, select, shape

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
        (["o_proj", "*.layers.1.*.down_proj"], [], 13),
        (["model.layers.3.self_attn.o_proj"], [], 1),
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
        (["q_proj"], [], "q_proj is part of linear_qkv here: write linear_qkv, or adapt it by itself with "
         "peft.type=canonical_lora."),
        (["*.layers.0.*.up_proj"], [], "up_proj is part of linear_fc1 here: write *.layers.0.*.linear_fc1, or adapt"),
        (["query_key_value"], [], "query_key_value is linear_qkv here: write linear_qkv."),
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
    code = "import sys, steps.shapes.targets, steps.engine.train.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Canonical:
    """A section of a canonical method, as far as targets go."""

    canonical = True

    def __init__(self, targets, excluded=()):
        self.targets_asked, self.exclude_modules = list(targets), list(excluded)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["linear_q", "*.layers.1.*.linear_fc1_up"], [(0, "linear_q"), (1, "linear_q"), (1, "linear_fc1_up")]),
        (["q_proj", "gate_proj"], [(0, "linear_q"), (0, "linear_fc1_gate"), (1, "linear_q"), (1, "linear_fc1_gate")]),
        (["model.layers.1.self_attn.v_proj"], [(1, "linear_v")]),
    ],
)
def test_canonical_methods_adapt_just_the_parts(targets, found):
    section = Canonical(targets)
    assert not list(faults(section, 2))
    names = chosen(section, 2)
    assert [(int(name.split(".")[2]), name.rpartition(".")[2]) for name in names] == found
    assert all(home(name)[0] in linear_names(2) for name in names)
    assert chosen(Canonical(covering(names, 2)), 2) == names


@pytest.mark.parametrize(("fused", "instead"), [("linear_qkv", "linear_q, linear_k, linear_v"),
                                                ("linear_fc1", "linear_fc1_gate, linear_fc1_up"),
                                                ("qkv_proj", "linear_q, linear_k, linear_v")])  # fmt: skip
def test_canonical_methods_refuse_fused_linears_by_name(fused, instead):
    (problem,) = faults(Canonical([fused]), 2)
    assert f"by themselves: write {instead}." in str(problem)


def test_shapes_are_those_of_the_decoder():
    for name, linear in Decoder(SHAPE).linears().items():
        assert shape(SHAPE, name) == tuple(linear.weight.shape)
        assert sum(shape(SHAPE, part)[0] for part in parts(name)) == shape(SHAPE, name)[0]
    assert SHAPE.parameters == sum(value.numel() for value in Decoder(SHAPE).parameters())
