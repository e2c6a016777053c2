"""convert/lora_to_hf: what it writes and says, what it refuses, and that it notices when what it wrote is wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_exports import CASES, ids, trained, write_base
from support.models import change_tensor
from support.run_step import run_step

from steps.config.peft import section_class
from steps.engine.adapters import load_back
from steps.engine.adapters.base import create
from steps.engine.checkpoint import hf_adapter, megatron
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.lora_to_hf import export
from steps.engine.checkpoint.merge import open_adapter
from steps.errors import StepFailed

transformers = pytest.importorskip("transformers", reason="extra parity")
peft = pytest.importorskip("peft", reason="extra parity")

FAMILY = "qwen2"


def to_hf(cwd, **changes):
    config = {"lora_checkpoint": "lora", "base_hf_path": None, "base_megatron_path": "base", "output_hf_path": "out"}
    return run_step("convert/lora_to_hf", config | changes, cwd)


def facts(path):
    return json.loads((path / "artifact.json").read_text())["facts"]


@pytest.fixture
def lora(tmp_path):
    """A model as `source` and `base`, an adapter for it as `lora`."""
    return trained(tmp_path, FAMILY, CASES["lora"], tokenizer_digest="t" * 64)


def test_the_adapter_is_published_with_its_facts_after_peft_has_loaded_it(lora):
    done = to_hf(lora.root, base_hf_path="source")
    assert done.returncode == 0, done.stderr
    assert f"loaded back by peft {peft.__version__}: over 32 random tokens the logits are within" in done.stdout
    assert "warning" not in done.stdout
    told, before = facts(lora.root / "out"), facts(lora.root / "lora")
    for key in (
        "base_fingerprint",
        "tokenizer_digest",
        "method",
        "dim",
        "alpha",
        "target_modules",
        "peft",
        "iteration",
    ):
        assert told[key] == before[key]
    assert told["checked"] is True
    config = json.loads((lora.root / "out" / "adapter_config.json").read_text())
    assert told["hf"] == config
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "use_dora": False, "use_rslora": False,
        "base_model_name_or_path": "source", "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    # All that stands there are fields of peft's own.
    assert config.keys() <= peft.LoraConfig().to_dict().keys()
    summary = json.loads((lora.root / "summary.json").read_text())
    assert (summary["r"], summary["lora_alpha"], summary["modules"]) == (4, 6, 21)


def test_the_tensors_are_those_of_the_checkpoint_unscaled(lora):
    """q, k and v have the one A; the rows of B are taken apart by group, here written out."""
    assert to_hf(lora.root).returncode == 0
    written = load_file(lora.root / "out" / "adapter_model.safetensors")
    name = "decoder.layers.1.self_attention.linear_qkv"
    saved = lora.adapters.modules[name].saved()
    prefix = "base_model.model.model.layers.1.self_attn."
    rows = saved["linear_out.weight"].detach().split([32, 16, 16, 32, 16, 16])  # two groups: two queries, key, value
    expected = {
        "q": torch.cat([rows[0], rows[3]]),
        "k": torch.cat([rows[1], rows[4]]),
        "v": torch.cat([rows[2], rows[5]]),
    }
    for part, b in expected.items():
        assert torch.equal(written[f"{prefix}{part}_proj.lora_A.weight"], saved["linear_in.weight"])
        assert torch.equal(written[f"{prefix}{part}_proj.lora_B.weight"], b)
    assert len(written) == 2 * 7 * 3


def test_either_form_of_the_base_checks_and_none_is_said(lora):
    done = to_hf(lora.root, base_megatron_path=None, base_hf_path="source")
    assert done.returncode == 0, done.stderr
    assert "loaded back by peft" in done.stdout
    done = to_hf(lora.root, base_megatron_path=None, output_hf_path="bare")
    assert done.returncode == 0, done.stderr
    assert "warning: names and tensors are checked, logits are not: no base is given" in done.stdout
    assert "loaded back" not in done.stdout
    assert facts(lora.root / "bare")["checked"] is False
    name = "adapter_model.safetensors"
    assert (lora.root / "out" / name).read_bytes() == (lora.root / "bare" / name).read_bytes()
    done = to_hf(lora.root, base_megatron_path=None, base_hf_path="some-org/not-here", output_hf_path="named")
    assert done.returncode == 0, done.stderr
    assert "logits are not: some-org/not-here is not in the local cache" in done.stdout
    config = json.loads((lora.root / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-org/not-here"


def test_without_peft_a_reader_of_our_own_checks(lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    done = to_hf(lora.root)
    assert done.returncode == 0, done.stderr
    assert "loaded back by a reader of our own (peft and transformers are not installed)" in done.stdout


@pytest.mark.parametrize("reader", ["peft", "own"])
@pytest.mark.parametrize("case", ["dora", "canonical-some", "pissa", "lora-bf16", "rslora"])
def test_both_readers_find_every_form_of_adapter_right(case, reader, tmp_path, monkeypatch):
    root, meant, check = in_memory(tmp_path, case, reader, monkeypatch)
    hf_adapter.write(root, meant)
    found = check()
    assert found.off <= found.allowed < 0.01 * found.moved


def in_memory(root, case, reader, monkeypatch, change=lambda text: text):
    """A directory to write to, what is to be written there, and the comparison that follows.

    change: of the base's config.json, which only peft's reader looks at.
    """
    if reader == "own":
        monkeypatch.setitem(sys.modules, "peft", None)
    trained(root, FAMILY, CASES[case])
    adapter, base = open_adapter(root / "lora"), megatron_source(root / "base")
    base = replace(base, files={**base.files, "config.json": change(base.files["config.json"])})
    method = create(adapter.section, base.config)
    meant = export(adapter, method.factors, base.config, None)
    (root / "out").mkdir()
    return (
        root / "out",
        meant,
        lambda: load_back.check(root / "out", meant, adapter, method, base, base_fingerprint=None),
    )


def test_a_wrong_prefix_is_noticed_and_nothing_is_published(lora, monkeypatch):
    """peft passes it over with a warning and computes the base model."""
    monkeypatch.setattr(hf_adapter, "PREFIX", "model.")
    done = to_hf(lora.root)
    assert done.returncode == 1
    assert "the exported adapter is not what was trained" in done.stderr
    assert "is under a name that nobody looks for" in done.stderr
    assert "[export_differs]" in done.stderr
    assert not (lora.root / "out").exists()
    done = to_hf(lora.root, base_megatron_path=None)  # names are looked at without a base, too
    assert done.returncode == 1
    assert "[export_differs]" in done.stderr


@pytest.mark.parametrize("reader", ["peft", "own"])
def test_each_reader_by_itself_notices_a_wrong_prefix(reader, tmp_path, monkeypatch):
    root, meant, check = in_memory(tmp_path, "lora", reader, monkeypatch)
    monkeypatch.setattr(hf_adapter, "PREFIX", "model.")
    monkeypatch.setattr(load_back, "check_names", lambda *_: None)
    hf_adapter.write(root, meant)
    with pytest.raises(StepFailed, match="export_differs|does not get its lora_A|computes logits that are up to"):
        check()


@pytest.mark.parametrize("reader", ["peft", "own"])
@pytest.mark.parametrize("fault", ["alpha", "rslora", "swapped"])
def test_a_wrong_number_is_noticed_by_the_logits(fault, reader, tmp_path, monkeypatch):
    root, meant, check = in_memory(tmp_path, "lora", reader, monkeypatch)
    if fault == "swapped":  # k under v's name and v under k's, in every layer
        other = {"k_proj": "v_proj", "v_proj": "k_proj"}
        updates = dict(meant.updates)
        for module in meant.updates:
            before, _, last = module.rpartition(".")
            if last in other:
                updates[f"{before}.{other[last]}"] = meant.updates[module]
        meant.updates.clear()
        meant.updates.update(updates)
        written = meant
    else:
        wrong = {"lora_alpha": 7} if fault == "alpha" else {"use_rslora": True}
        written = replace(meant, config={**meant.config, **wrong})
    hf_adapter.write(root, written)
    with pytest.raises(StepFailed, match="computes logits that are up to"):
        check()


@pytest.mark.parametrize("reader", ["peft", "own"])
def test_targets_that_leave_a_module_out_are_noticed(reader, tmp_path, monkeypatch):
    root, meant, check = in_memory(tmp_path, "lora", reader, monkeypatch)
    targets = [name for name in meant.config["target_modules"] if name != "up_proj"]
    hf_adapter.write(root, replace(meant, config={**meant.config, "target_modules": targets}))
    with pytest.raises(StepFailed, match=r"model\.layers\.0\.mlp\.up_proj is not adapted"):
        check()


def test_what_serving_must_know_is_said(tmp_path):
    trained(tmp_path, FAMILY, CASES["dora"])
    done = to_hf(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: vLLM refuses DoRA adapters: for vLLM merge it with convert/merge_lora" in done.stdout
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True


def test_an_adapter_of_a_quantized_base_and_an_unfinished_one_are_exported_with_a_warning(tmp_path):
    trained(tmp_path, FAMILY, {**CASES["lora"], "quantization": {"type": "nf4"}}, finished=False)
    done = to_hf(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it was trained on a base in nf4, and will be served on whatever base the server loads" in done.stdout
    assert "warning: lora is unfinished: training stopped at iteration 7" in done.stdout


@pytest.mark.parametrize("record", [True, False], ids=["by its record", "by its run_config.yaml"])
def test_a_method_without_factors_is_refused_with_the_way_that_works(lora, record, monkeypatch):
    """No method of this test's own: one that has factors says it has none."""
    monkeypatch.setattr(section_class("lora"), "has_factors", False)
    if not record:
        (lora.root / "lora" / "artifact.json").unlink()
    done = to_hf(lora.root)
    assert done.returncode == 4
    assert "lora_checkpoint: an adapter of type lora has no two factors A and B" in done.stderr
    assert "Merge it instead: `steps run convert/merge_lora" in done.stderr
    assert "[no_factor_form]" in done.stderr


def test_another_base_is_refused(lora, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_base(other, FAMILY, seed=9)
    done = to_hf(lora.root, base_megatron_path=str(other / "base"))
    assert done.returncode == 4
    assert "was trained on another base than" in done.stderr
    assert "[base_model_mismatch]" in done.stderr
    done = to_hf(lora.root, base_megatron_path=None, base_hf_path=str(other / "source"))  # which has no record
    assert done.returncode == 4
    assert "the adapter was trained on a base with fingerprint" in done.stderr
    assert "[base_model_mismatch]" in done.stderr
    assert not (lora.root / "out").exists()
    # As the name alone it may be: the base is the other one.
    done = to_hf(lora.root, base_hf_path=str(other / "source"))
    assert done.returncode == 0, done.stderr


def test_a_base_of_another_shape_and_one_that_changed_are_refused(lora, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_base(other, FAMILY, num_hidden_layers=2)
    done = to_hf(lora.root, base_megatron_path=None, base_hf_path=str(other / "source"))
    assert done.returncode == 4
    assert "num_layers 2 instead of 3" in done.stderr
    assert "[base_model_mismatch]" in done.stderr
    change_tensor(lora.root / "base" / "iter_0000000")
    done = to_hf(lora.root)
    assert done.returncode == 4
    assert "is damaged: its weights have the fingerprint" in done.stderr
    assert "[damaged_artifact]" in done.stderr


def test_wrong_inputs_are_told(lora):
    done = to_hf(lora.root, lora_checkpoint="nowhere")
    assert done.returncode == 4
    assert "there is no checkpoint_lora at nowhere" in done.stderr
    done = to_hf(lora.root, lora_checkpoint="base")
    assert done.returncode == 4
    assert "base is a checkpoint_megatron, not a checkpoint_lora" in done.stderr
    data = lora.root / "lora" / "iter_0000007" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-500])
    done = to_hf(lora.root)
    assert done.returncode == 4
    assert "[damaged_artifact]" in done.stderr
    (lora.root / "lora" / "artifact.json").unlink()
    done = to_hf(lora.root)
    assert done.returncode == 4
    assert "is damaged" in done.stderr
    assert not (lora.root / "out").exists()


def test_a_checkpoint_whose_tensors_belie_its_own_model_is_damage(lora):
    for name, told in (("mlp.linear_fc2", "[80, 96]"), ("self_attention.linear_qkv", "do not fit its model")):
        linear = f"decoder.layers.0.{name}.adapter."
        tensors = {f"{linear}linear_in.weight": torch.ones(4, 96), f"{linear}linear_out.weight": torch.ones(80, 4)}
        settings = open_adapter(lora.root / "lora").checkpoint.run_config
        megatron.write(lora.root / name, tensors, num_layers=3, run_config=settings)
        done = to_hf(lora.root, lora_checkpoint=name)
        assert done.returncode == 4
        assert told in done.stderr
        assert "[damaged_artifact]" in done.stderr


def test_a_base_that_transformers_computes_otherwise_is_not_blamed_on_the_adapter(tmp_path, monkeypatch):
    """Here: its config.json says another rotation than its run_config.yaml."""

    def turned(text):
        return text.replace("10000.0", "500.0")

    root, meant, check = in_memory(tmp_path, "lora", "peft", monkeypatch, turned)
    hf_adapter.write(root, meant)
    with pytest.raises(StepFailed, match="so are those of the base without it, .*no fault of the adapter"):
        check()


def test_the_exported_adapter_is_served_as_the_merged_model_is(lora):
    """convert/merge_lora's model and base + adapter under peft, in transformers."""
    assert to_hf(lora.root).returncode == 0
    merge = {"lora_checkpoint": "lora", "base_megatron_path": "base", "base_hf_path": None, "output_hf_path": "merged"}
    done = run_step("convert/merge_lora", merge, lora.root)
    assert done.returncode == 0, done.stderr
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(lora.root / "source"), lora.root / "out").eval()
    with torch.no_grad():
        merged, got = load(lora.root / "merged").eval()(ids()[None]).logits, adapted(ids()[None]).logits
    # Float32, rounded once more in the merged weights; the logits are of order 10.
    torch.testing.assert_close(got, merged, rtol=0, atol=2e-4)
