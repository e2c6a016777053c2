"""Every adapter method, trained, through the steps that take its checkpoint: loaded by peft, and merged."""

from __future__ import annotations

import json

import pytest
from support.adapters import CASES, section, told, train
from support.packed import random_rows, write_base, write_packed
from support.run_step import run_step

every_case = pytest.mark.parametrize("case", CASES, ids=told)
peft = pytest.importorskip("peft", reason="extra parity")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("every_method")
    write_base(path / "base", true=True)
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


@pytest.fixture
def lora(root, tmp_path, request):
    """A short run of the case, with a rate at which every method has moved by its end."""
    case = request.getfixturevalue("case")
    train(root, peft=case, optimizer={"lr": 0.02}, checkpoint={"save": str(tmp_path / "lora")})
    return tmp_path / "lora"


@every_case
def test_it_is_loaded_by_peft_with_our_logits_or_says_that_it_has_no_such_form(case, root, lora, tmp_path):
    config = {"lora_checkpoint": str(lora), "base_megatron_path": str(root / "base"), "output_hf_path": "hf"}
    done = run_step("convert/lora_to_hf", config, tmp_path)
    if not section(case).has_factors:
        assert done.returncode == 4
        assert "[no_factor_form]" in done.stderr
        assert "convert/merge_lora" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    # The step compares the logits itself, by genuine peft on transformers' model, and publishes nothing that differs.
    assert f"loaded back by peft {peft.__version__}" in done.stdout
    held = section(case).held("decoder.layers.0.mlp.linear_fc2")
    assert ("warning: it was trained on a base in" in done.stdout) == (held is not None)
    written = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    # vLLM looks at one rank and one alpha.
    assert not written["rank_pattern"]
    assert not written["alpha_pattern"]


@every_case
def test_it_is_merged(case, root, lora, tmp_path):
    """That the merged weights compute the same is the battery's."""
    config = {"lora_checkpoint": str(lora), "base_megatron_path": str(root / "base"), "output_hf_path": "merged"}
    done = run_step("convert/merge_lora", config, tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "merged" / "artifact.json").read_text())["facts"]
    assert facts["merged"]["type"] == case["type"]


@every_case
def test_it_scores_what_training_measured_at_its_end(case, root, lora, tmp_path):
    """eval/perplexity loads the adapter, on the base as it was held, and comes to the valid loss of the run."""
    config = {
        "lora_checkpoint": str(lora),
        "base_megatron_path": str(root / "base"),
        "dataset": {"nano3_packed_sft_dir": str(root / "packed")},
        "output_dir": "report",
    }
    done = run_step("eval/perplexity", config, tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]
    trained = json.loads((lora / "artifact.json").read_text())["facts"]
    assert figures["loss"] == pytest.approx(trained["valid_loss_last"], rel=2e-6)
    assert figures["loss"] != pytest.approx(trained["valid_loss_first"], rel=1e-3)
