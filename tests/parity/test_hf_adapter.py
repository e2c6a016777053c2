"""Exported adapters in genuine peft on the genuine model; peft's own adapters taken over."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_exports import CASES, ids, trained, write_base

from steps.engine.adapters import base
from steps.engine.checkpoint import hf_adapter, mapping, megatron
from steps.engine.checkpoint.adapter_config import adapter_run_config
from steps.engine.checkpoint.hf_to_lora import convert
from steps.engine.checkpoint.lora_to_hf import export
from steps.engine.checkpoint.merge import open_adapter
from steps.engine.model.decoder import Decoder, load_weights
from steps.shapes.run_config import model_config
from steps.shapes.targets import chosen

transformers = pytest.importorskip("transformers", reason="extra parity")
peft = pytest.importorskip("peft", reason="extra parity")

FAMILIES = ("llama", "qwen2", "qwen3")  # qwen2 has biases on q, k, v; qwen3 norms of q, k and heads of another width
every_family = pytest.mark.parametrize("family", FAMILIES)
every_case = pytest.mark.parametrize("case", CASES)


def exported(root, directory, adapter="lora"):
    """Write an adapter of `root` as convert/lora_to_hf does; what was written, in memory."""
    adapter = open_adapter(root / adapter)
    model = model_config(adapter.checkpoint.run_config, "run_config.yaml")
    method = base.create(adapter.section, model)
    found = export(adapter, method.factors, model, "org/base")
    directory.mkdir()
    hf_adapter.write(directory, found)
    return found


def loaded(root, directory):
    """The genuine model under the adapter at `directory`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "source", attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, directory).eval()


@every_family
@every_case
def test_peft_computes_our_logits(family, case, tmp_path):
    ours = trained(tmp_path, family, CASES[case])
    written = exported(tmp_path, tmp_path / "out")
    theirs = loaded(tmp_path, tmp_path / "out")
    with torch.no_grad():
        got = theirs(ids()[None]).logits[0]
        with theirs.disable_adapter():
            bare = theirs(ids()[None]).logits[0]
    # Float32 in another order of summing; the logits are of order 10.
    torch.testing.assert_close(got, ours.logits(ids()), rtol=0, atol=2e-4)
    assert (got - bare).abs().max() > 0.1
    adapted = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(written.updates)


def taken_over(root, directory):
    """Make root/again of a Hugging Face adapter, as convert/hf_to_lora does; its method and the tensors."""
    checkpoint = megatron.Checkpoint.open(root / "base")
    model = model_config(checkpoint.run_config, "run_config.yaml")

    def norms(linear):
        return torch.linalg.vector_norm(checkpoint.read(f"{linear}.weight"), dim=1)

    done = convert(hf_adapter.read(directory), model, norms, str(directory))
    method = base.create(done.section, model)
    settings = adapter_run_config(checkpoint.run_config, done.section, method.bridge_class, root / "base")
    megatron.write(root / "again", done.tensors, num_layers=model.num_layers, run_config=settings)
    return done


@every_family
@every_case
def test_what_comes_back_is_what_went_out(family, case, tmp_path):
    """Every tensor and adapter_config.json to the bit; and where peft has no such thing, the tensors of the start."""
    trained(tmp_path, family, CASES[case])
    exported(tmp_path, tmp_path / "out")
    taken_over(tmp_path, tmp_path / "out")
    exported(tmp_path, tmp_path / "out2", "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name
    if case != "pissa":  # whose subtracted start is part of the factors from the first export on
        first, second = open_adapter(tmp_path / "lora"), open_adapter(tmp_path / "again")
        assert second.section["type"] == first.section["type"]
        tensors, others = first.checkpoint.tensors, second.checkpoint.tensors
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor.load(), others[name].load()) for name, tensor in tensors.items())
        assert {tensor.dtype for tensor in tensors.values()} == {tensor.dtype for tensor in others.values()}


def by_peft(root, **settings):
    """An adapter that peft made and saved at root/out, all its tensors random; the model under it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "source", attn_implementation="eager")
    torch.manual_seed(4)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(root / "out")
    return model


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
THEIRS = {
    "all": ({"r": 4, "lora_alpha": 6, "target_modules": ALL}, "canonical_lora"),
    "q-v": ({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}, "canonical_lora"),
    "o-down": ({"r": 4, "target_modules": ["o_proj", "down_proj"], "use_rslora": True}, "lora"),
    "rslora": ({"r": 5, "lora_alpha": 7, "target_modules": ALL, "use_rslora": True}, "canonical_lora"),
    "one-layer": ({"r": 4, "target_modules": ALL, "layers_to_transform": [1]}, "canonical_lora"),
    "regex": ({"r": 4, "target_modules": r".*\.(0|2)\..*(up|o)_proj"}, "canonical_lora"),
    "patterns": (
        {
            "r": 4, "lora_alpha": 6, "target_modules": ALL, "use_rslora": True,
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"v_proj": 3, "model.layers.0.mlp.down_proj": 11},
        },
        "canonical_lora",
    ),
    "dora": ({"r": 4, "lora_alpha": 6, "target_modules": ALL, "use_dora": True}, "dora"),
    "dora-q-v": ({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_dora": True}, "dora"),
    "dora-patterns": (
        {
            "r": 4, "target_modules": ALL, "use_dora": True,
            "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"up_proj": 3},
        },
        "dora",
    ),
}  # fmt: skip


@every_family
@pytest.mark.parametrize("settings", THEIRS)
def test_what_peft_saved_computes_the_same_here_and_exported_again(family, settings, tmp_path):
    source = write_base(tmp_path, family)
    theirs = by_peft(tmp_path, **THEIRS[settings][0])
    done = taken_over(tmp_path, tmp_path / "out")
    assert done.section.type == THEIRS[settings][1]
    with torch.no_grad():
        expected = theirs(ids()[None]).logits[0]
    # As above.
    near = {"rtol": 0, "atol": 2e-4}
    torch.testing.assert_close(logits(source, done), expected, **near)

    written = exported(tmp_path, tmp_path / "out2", "again")
    with torch.no_grad():
        got = loaded(tmp_path, tmp_path / "out2")(ids()[None]).logits[0]
    torch.testing.assert_close(got, expected, **near)
    if settings in ("all", "q-v", "one-layer", "regex"):
        before = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert before.keys() == written.tensors().keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in written.tensors().items())


def logits(source, done):
    """Of our decoder under an adapter that was taken over, whose targets are those of its section."""
    decoder = Decoder(source.config)
    load_weights(decoder, ((n, t.load()) for n, t in mapping.to_megatron(source.config, source.tensors).items()))
    method = base.create(done.section, source.config)
    adapters = base.attach(decoder, method, chosen(done.section, source.config.num_layers), 0)
    adapters.load(done.tensors)
    with torch.no_grad():
        return decoder.eval()(ids(), [0, len(ids())])
