"""convert/merge_lora: the merged model is the one peft merges, refusals come by name, the merged model speaks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import change_tensor, save_hf, save_tokenizer
from support.run_step import run_step

from steps.artifacts.record import Record, digest_files
from steps.config.peft.lora import LoRA
from steps.engine.adapters import base as adapters
from steps.engine.checkpoint import mapping, megatron
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.hf import open_directory
from steps.engine.model.decoder import Decoder, load_weights
from steps.shapes.run_config import run_config

transformers = pytest.importorskip("transformers", reason="extra parity")
peft = pytest.importorskip("peft", reason="extra parity")

RANK, ALPHA = 4, 12
ATTENTION, MLP = "decoder.layers.{}.self_attention.", "decoder.layers.{}.mlp."
FUSED = ATTENTION + "linear_qkv", ATTENTION + "linear_proj", MLP + "linear_fc1", MLP + "linear_fc2"


def convert(cwd, source, target, **changes):
    done = run_step("convert/hf_to_megatron", {"hf_model_id": source, "megatron_path": target} | changes, cwd)
    assert done.returncode == 0, done.stderr


def merge(cwd, *, fresh=False, **changes):
    config = {"lora_checkpoint": "lora", "base_megatron_path": "base", "base_hf_path": None, "output_hf_path": "merged"}
    return run_step("convert/merge_lora", config | changes, cwd, fresh=fresh)


def facts(path):
    return json.loads((path / "artifact.json").read_text())["facts"]


def save_adapter(directory, base, *, layers=(0, 2), section=None, record=True, **overrides):
    """A LoRA with random factors on every linear of some layers, as training leaves it behind. Returns its tensors."""
    checkpoint = megatron.Checkpoint.open(base)
    config = megatron_source(base).config
    torch.manual_seed(3)
    tensors = {}
    for layer in layers:
        for linear in FUSED:
            name = linear.format(layer)
            rows, columns = checkpoint.tensors[f"{name}.weight"].shape
            tensors[f"{name}.adapter.linear_in.weight"] = torch.randn(RANK, columns) / 8
            tensors[f"{name}.adapter.linear_out.weight"] = torch.randn(rows, RANK) / 8
    if section is None:
        section = {"type": "lora", "dim": RANK, "alpha": ALPHA, "target_modules": ["linear_qkv", "linear_proj"]}
    megatron.write(
        directory,
        tensors,
        num_layers=config.num_layers,
        run_config={**run_config(config), "peft": section},
        iteration=7,
    )
    if record:
        told = {"base_fingerprint": facts(base)["base_fingerprint"], "finished": True, "iteration": 7, **overrides}
        digest, files = digest_files(directory)
        Record(type="checkpoint_lora", digest=digest, files=files, facts=told).write(directory)
    return tensors


@pytest.fixture
def chain(tmp_path):
    """A Qwen2 as `source` and `base`, and an adapter for it as `lora`."""
    save_hf(tmp_path / "source", "qwen2")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path, "source", "base")
    save_adapter(tmp_path / "lora", tmp_path / "base")
    return tmp_path


def split_qkv(rows, config):
    """Rows of a fused [rows, r] matrix to query, key, value: written out, not taken from the code under test."""
    queries, channels = config.num_attention_heads // config.num_key_value_heads, config.hidden_size // 4
    parts = {"q": [], "k": [], "v": []}
    for group in rows.split((queries + 2) * channels):
        q, k, v = group.split([queries * channels, channels, channels])
        for part, piece in zip("qkv", (q, k, v), strict=True):
            parts[part].append(piece)
    return {part: torch.cat(pieces) for part, pieces in parts.items()}


def peft_merged(source, tensors, layers, dtype):
    """The same adapter on the unfused model, merged by peft in float32: every A copied, the rows of B taken apart."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, layers_to_transform=list(layers), layers_pattern="layers"
    )
    adapted = peft.get_peft_model(model, config)
    state = {}
    for layer in layers:
        prefix = f"base_model.model.model.layers.{layer}."
        a = {linear: tensors[f"{linear.format(layer)}.adapter.linear_in.weight"] for linear in FUSED}
        b = {linear: tensors[f"{linear.format(layer)}.adapter.linear_out.weight"] for linear in FUSED}
        qkv, proj, fc1, fc2 = FUSED
        parts = {f"self_attn.{part}_proj": (a[qkv], rows) for part, rows in split_qkv(b[qkv], model.config).items()}
        gate, up = b[fc1].chunk(2)
        parts |= {"mlp.gate_proj": (a[fc1], gate), "mlp.up_proj": (a[fc1], up)}
        parts |= {"self_attn.o_proj": (a[proj], b[proj]), "mlp.down_proj": (a[fc2], b[fc2])}
        for module, (linear_in, linear_out) in parts.items():
            state[f"{prefix}{module}.lora_A.default.weight"] = linear_in
            state[f"{prefix}{module}.lora_B.default.weight"] = linear_out
    missing, unexpected = adapted.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora_" in name]
    return {name: tensor.to(dtype) for name, tensor in adapted.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_weights_are_those_of_peft(dtype, tmp_path):
    save_hf(tmp_path / "source", "qwen2", dtype=dtype)
    convert(tmp_path, "source", "base")
    tensors = save_adapter(tmp_path / "lora", tmp_path / "base")
    done = merge(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = peft_merged(tmp_path / "source", tensors, (0, 2), dtype)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "source" / "model.safetensors")
    assert set(merged) == set(base)
    # A sum in float32 may differ in its last bit, which a cast to bfloat16 can turn into one of its own.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=1e-6)
    if dtype == torch.bfloat16:
        same = sum((merged[name] == expected[name]).sum().item() for name in merged)
        assert same > 0.999 * sum(tensor.numel() for tensor in merged.values())
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {name for name in base if "proj.weight" in name and ".layers.1." not in name}


def test_the_merged_model_loads_in_transformers_and_its_record_tells(chain):
    done = merge(chain, sample_prompt="w5 w6 w7", sample_tokens=9, fresh=True)
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(chain / "merged")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(chain / "merged")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w5 w6 w7"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = model.generate(**prompt, max_new_tokens=9, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    summary = json.loads((chain / "summary.json").read_text())
    assert summary["sample_answer"] == tokenizer.decode(expected)
    assert f"w5 w6 w7 -> {summary['sample_answer']}" in done.stdout
    told = facts(chain / "merged")
    assert told["base_fingerprint"] != facts(chain / "base")["base_fingerprint"]
    assert told["tokenizer_digest"] == facts(chain / "base")["tokenizer_digest"]
    assert told["merged"]["dim"] == RANK


def test_both_forms_of_the_base_give_the_same_model(chain):
    assert merge(chain).returncode == 0
    done = merge(chain, base_megatron_path=None, base_hf_path="source", output_hf_path="merged2")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (chain / "merged" / name).read_bytes() == (chain / "merged2" / name).read_bytes(), name


def test_an_adapter_as_megatron_bridge_records_it_is_merged(chain):
    section = {
        "_target_": "megatron.bridge.peft.lora.LoRA",
        "dim": RANK,
        "alpha": ALPHA,
        "dropout": 0.0,
        "dropout_position": "pre",
        "lora_A_init_method": "xavier",
        "lora_B_init_method": "zero",
        "lora_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "exclude_modules": [],
        "a2a_experimental": False,
    }
    save_adapter(chain / "bridge", chain / "base", section=section, record=False)
    done = merge(chain, lora_checkpoint="bridge", output_hf_path="merged2")
    assert done.returncode == 0, done.stderr
    assert "does not say which base it was trained on" in done.stdout
    assert merge(chain).returncode == 0
    names = [chain / folder / "model.safetensors" for folder in ("merged", "merged2")]
    assert names[0].read_bytes() == names[1].read_bytes()


QUANTIZED = {"type": "nf4", "double_quant": True, "block_size": 32, "compute_dtype": None}
SECTION = {"type": "lora", "dim": RANK, "alpha": ALPHA, "quantization": QUANTIZED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantized_is_the_model_that_was_trained(dtype, tmp_path):
    """Every linear as bitsandbytes dequantizes it, adapted (in layers 0 and 2) or not; the logits of training."""
    bnb = pytest.importorskip("bitsandbytes", reason="extra parity")
    save_hf(tmp_path / "source", "qwen2", dtype=dtype)
    convert(tmp_path, "source", "base")
    tensors = save_adapter(tmp_path / "lora", tmp_path / "base", section=SECTION, peft=SECTION)
    done = merge(tmp_path, merge_into="dequantized")
    assert done.returncode == 0, done.stderr
    assert (
        "trained on a base held in nf4, merged into what that dequantizes to: exactly the model that was trained"
        in (done.stdout)
    )
    assert facts(tmp_path / "merged")["merge_into"] == "dequantized"

    merged, base = (megatron_tensors(tmp_path / name) for name in ("merged", "source"))
    for name, weight in base.items():
        linear = name.removesuffix(".weight")
        expected = weight
        if linear.rpartition(".")[2] in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            packed, state = bnb.functional.quantize_4bit(
                weight.float(), blocksize=32, quant_type="nf4", compress_statistics=True
            )
            expected = bnb.functional.dequantize_4bit(packed, state)
            if f"{linear}.adapter.linear_in.weight" in tensors:
                a, b = (tensors[f"{linear}.adapter.{factor}.weight"] for factor in ("linear_in", "linear_out"))
                expected = expected + (b @ a) * (ALPHA / RANK)
        assert torch.equal(merged[name], expected.to(dtype)), name

    ids = torch.arange(4, 44)
    section = LoRA.model_validate(SECTION)
    source = megatron_source(tmp_path / "base")
    decoder = Decoder(source.config, dtype=torch.float32, quantize=section.held)
    load_weights(decoder, megatron_tensors(tmp_path / "source").items())
    method = adapters.create(section, source.config)
    trained = adapters.attach(decoder, method, [name.rpartition(".adapter")[0] for name in list(tensors)[::2]], seed=0)
    trained.load(tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        got, expected = decoder(ids, [0, len(ids)]), model(ids[None]).logits[0]
    # float32 sums in another order; bfloat16: what is stored is rounded, what was trained is not.
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    assert (got - expected).norm() < allowed * expected.norm()


def megatron_tensors(path):
    source = open_directory(path)
    return {name: value.load() for name, value in mapping.to_megatron(source.config, source.tensors).items()}


def test_full_is_the_base_as_it_was_with_the_update(chain):
    save_adapter(chain / "qlora", chain / "base", section=SECTION, peft=SECTION)
    done = merge(chain, lora_checkpoint="qlora")
    assert done.returncode == 0, done.stderr
    assert "merged into the original weights: a better base, but not the model that was trained" in done.stdout
    assert facts(chain / "merged")["merge_into"] == "full"
    done = merge(chain, output_hf_path="merged2")  # the same factors, trained on the base as it is
    assert done.returncode == 0, done.stderr
    assert "trained on a base held" not in done.stdout
    assert facts(chain / "merged2")["merge_into"] == "full"
    names = [chain / folder / "model.safetensors" for folder in ("merged", "merged2")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("told", [True, False], ids=["record tells", "checkpoint tells"])
def test_dequantized_is_refused_for_an_adapter_on_the_base_as_it_is(chain, told):
    section = {"type": "lora", "dim": RANK, "alpha": ALPHA, "quantization": None}
    save_adapter(chain / "plain", chain / "base", section=section, **({"peft": section} if told else {}))
    done = merge(chain, lora_checkpoint="plain", merge_into="dequantized")
    assert done.returncode == 4
    assert (
        "merge_into: the adapter plain was trained on the base as it is: there is nothing to dequantize" in done.stderr
    )
    assert "[base_not_quantized]" in done.stderr
    assert not (chain / "merged").exists()
    assert merge(chain, merge_into="half").returncode == 3


def test_another_base_is_refused_before_the_start_where_both_records_tell(chain):
    save_hf(chain / "other", "qwen2", seed=9)
    convert(chain, "other", "other_base")
    done = merge(chain, base_megatron_path="other_base")
    assert done.returncode == 4
    assert "was trained on another base than other_base" in done.stderr
    assert "[base_model_mismatch]" in done.stderr


def test_another_base_without_a_record_is_refused_before_anything_is_published(chain):
    save_hf(chain / "other", "qwen2", seed=9)
    done = merge(chain, base_megatron_path=None, base_hf_path="other")
    assert done.returncode == 4
    assert "the adapter was trained on a base with fingerprint" in done.stderr
    assert "[base_model_mismatch]" in done.stderr
    assert not (chain / "merged").exists()
    assert not list(chain.glob(".*.partial"))


@pytest.mark.parametrize("record", [True, False], ids=["adapter with record", "adapter without"])
def test_a_base_that_changed_under_its_record_is_refused(chain, record):
    save_adapter(chain / "mine", chain / "base", record=record)
    change_tensor(chain / "base" / "iter_0000000")
    done = merge(chain, lora_checkpoint="mine")
    assert done.returncode == 4
    assert "is damaged: its weights have the fingerprint" in done.stderr
    assert "[damaged_artifact]" in done.stderr
    assert not (chain / "merged").exists()


def test_a_base_of_another_shape_is_refused(chain):
    save_hf(chain / "shallow", "qwen2", num_hidden_layers=2)
    save_hf(chain / "wide", "qwen2", intermediate_size=160)
    save_adapter(chain / "bare", chain / "base", record=False)
    done = merge(chain, lora_checkpoint="bare", base_megatron_path=None, base_hf_path="shallow")
    assert done.returncode == 4
    assert "the adapter is for decoder.layers.2." in done.stderr
    done = merge(chain, lora_checkpoint="bare", base_megatron_path=None, base_hf_path="wide")
    assert done.returncode == 4
    assert "the adapter's tensors do not fit decoder.layers.0.mlp.linear_fc1 [320, 64]" in done.stderr
    assert "[base_model_mismatch]" in done.stderr


def test_an_unfinished_adapter_is_merged_with_a_warning(chain):
    save_adapter(chain / "half", chain / "base", finished=False)
    done = merge(chain, lora_checkpoint="half")
    assert done.returncode == 0, done.stderr
    assert "warning: half is unfinished: training stopped at iteration 7" in done.stdout


def test_an_earlier_iteration_can_be_merged_and_its_base_is_checked_all_the_same(chain):
    done = merge(chain, lora_checkpoint="lora/iter_0000007")
    assert done.returncode == 0, done.stderr
    assert "taken on trust" not in done.stdout
    save_hf(chain / "other", "qwen2", seed=9)
    done = merge(chain, lora_checkpoint="lora/iter_0000007", base_megatron_path=None, base_hf_path="other")
    assert done.returncode == 4
    assert "[base_model_mismatch]" in done.stderr


def test_an_adapter_of_another_chat_template_is_merged_with_a_warning(chain):
    save_adapter(chain / "lora2", chain / "base", chat_template_digest="0" * 64)
    done = merge(chain, lora_checkpoint="lora2")
    assert done.returncode == 0, done.stderr
    assert "was trained with another chat template" in done.stdout


def test_a_damaged_adapter_is_refused(chain):
    data = chain / "lora" / "iter_0000007" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-500])
    done = merge(chain)
    assert done.returncode == 4
    assert "__0_0.distcp is missing or has another size" in done.stderr
    (chain / "lora" / "artifact.json").unlink()
    done = merge(chain)
    assert done.returncode == 4
    assert "is damaged" in done.stderr
    assert not (chain / "merged").exists()


def test_wrong_inputs_are_told(chain):
    done = merge(chain, base_megatron_path=None)
    assert done.returncode == 3
    assert "base_megatron_path: no base model is given" in done.stderr
    assert "Set base_megatron_path (the checkpoint that was trained on) or base_hf_path" in done.stderr
    done = merge(chain, base_hf_path="source")
    assert done.returncode == 3
    assert "two base models are given: base and source" in done.stderr
    done = merge(chain, lora_checkpoint="nowhere")
    assert done.returncode == 4
    assert "there is no checkpoint_lora at nowhere" in done.stderr
    done = merge(chain, lora_checkpoint="base")
    assert done.returncode == 4
    assert "base is a checkpoint_megatron, not a checkpoint_lora" in done.stderr
    save_adapter(chain / "odd", chain / "base", section={"type": "lorax"})
    done = merge(chain, lora_checkpoint="odd")
    assert done.returncode == 4
    assert "adapter's method 'lorax' is not known to this version of steps" in done.stderr
    assert "[unsupported_method]" in done.stderr
    newer = {"type": "lora", "dim": RANK, "alpha": ALPHA, "dropout_position": "between"}
    save_adapter(chain / "newer", chain / "base", section=newer, peft=newer)
    done = merge(chain, lora_checkpoint="newer")
    assert done.returncode == 4
    assert "'between' is not known to this version of steps" in done.stderr
    (chain / "base" / "artifact.json").unlink()
    done = merge(chain, lora_checkpoint="base")
    assert done.returncode == 4
    assert "which is no adapter tensor" in done.stderr
