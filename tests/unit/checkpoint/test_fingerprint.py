"""base_fingerprint: defined by the files' bytes, the same in every representation, different for one flipped bit."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from support.models import save_hf

from steps.engine.checkpoint.convert import hf_to_megatron, megatron_source
from steps.engine.checkpoint.fingerprint import Fingerprint, fingerprint
from steps.engine.checkpoint.hf import open_source
from steps.engine.checkpoint.lazy import lazy

pytest.importorskip("transformers", reason="extra parity")


def by_definition(directory):
    """From the raw bytes of the safetensors files, without torch."""
    lines = {}
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                digest = hashlib.sha256(data[start:end]).hexdigest()
                lines[name] = f"{name}\0{entry['dtype']}\0{entry['shape']}\0{digest}\n"
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_directory_and_checkpoint_have_the_fingerprint_of_the_definition(name, dtype, tmp_path):
    save_hf(tmp_path / "hf", name, dtype=dtype, max_shard_size="40KB")
    source = open_source(str(tmp_path / "hf"))
    expected = by_definition(tmp_path / "hf")
    assert fingerprint(source.tensors) == expected
    assert hf_to_megatron(source, tmp_path / "megatron").fingerprint == expected
    assert fingerprint(megatron_source(tmp_path / "megatron").tensors) == expected


def test_name_dtype_shape_and_every_bit_count():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    flipped = base["a"].clone()
    flipped[1, 2] = -0.0  # equal as a number, other bits
    variants = [
        base,
        {"a": flipped, "b": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].bfloat16(), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    digests = [fingerprint({name: lazy(tensor) for name, tensor in each.items()}) for each in variants]
    assert len(set(digests)) == len(variants)
    assert fingerprint({name: lazy(base[name]) for name in ("b", "a")}) == digests[0], "order does not count"


def test_a_fingerprint_of_half_a_model_is_refused():
    watcher = Fingerprint()
    tensors = watcher.watch({"a": lazy(torch.zeros(1)), "b": lazy(torch.zeros(1))})
    tensors["a"].load()
    with pytest.raises(AssertionError, match="not read: \\['b'\\]"):
        watcher.digest()
