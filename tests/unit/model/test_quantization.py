"""Weights in few bits: what they dequantize to, what they take, and linears and decoders that hold them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from itertools import product as combinations
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.packed import SHAPE, random_decoder
from torch.nn import functional as F

from steps.config.peft import Quantization
from steps.config.peft.qr_adaptor import TYPES
from steps.engine.model import quantization_kernels
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.model.layers import Linear
from steps.engine.model.quantization import QuantizedWeight, product, quantize
from steps.engine.model.quantization_codes import CODES, decoded, nearest


@dataclass(frozen=True)
class Spec:
    type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_the_book(weight: torch.Tensor, code: str, block_size: int) -> torch.Tensor:
    """Block by block: scale by the largest magnitude, take the nearest entry of the code, scale back."""
    values = torch.tensor(CODES[code].values)
    blocks = []
    for block in weight.float().flatten().split(block_size):
        scale = block.abs().max()
        nearest = (block[:, None] / scale - values).abs().argmin(1)
        blocks.append(values[nearest] * scale)
    return torch.cat(blocks).view(weight.shape)


@pytest.mark.parametrize("bits", [2, 4])
def test_normal_float_codes_are_quantiles_of_the_normal_distribution(bits):
    """arXiv 2305.14314, section 3: 2^(k-1) + 1 and 2^(k-1) quantiles for the two halves, one of two zeros removed."""
    half = 2 ** (bits - 1)
    # The outermost quantile, between 1 - 1 / (2 (2^k - 1)) and 1 - 1 / 2^(k + 1): 0.9677083 for four bits.
    outer = 1 - (1 / (2 * (2**bits - 1)) + 1 / 2 ** (bits + 1)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(outer + (0.5 - outer) * step / half) for step in range(half)]
    negative = [-quantile(outer + (0.5 - outer) * step / (half - 1)) for step in range(half - 1)]
    expected = torch.tensor(sorted([*positive, *negative, 0.0])) / positive[0]
    # The table was computed in float32: two units in the last place of 1.
    torch.testing.assert_close(torch.tensor(CODES[TYPES[bits]].values), expected, rtol=0, atol=2.4e-7)


@pytest.mark.parametrize("code", CODES)
def test_every_byte_stands_for_the_entries_of_its_code(code):
    bits, values = CODES[code].bits, torch.tensor(CODES[code].values)
    packed = torch.arange(255, dtype=torch.uint8)
    expected = [values[byte >> shift & 2**bits - 1] for byte in range(255) for shift in range(8 - bits, -1, -bits)]
    assert torch.equal(decoded(packed, code), torch.stack(expected))


def test_int8_is_symmetric():
    values = torch.tensor(CODES["int8"].values)
    assert torch.equal(values, -values.flip(0))
    assert (values[0], values[127], len(values)) == (-1, 0, 255)


@pytest.mark.parametrize("code", CODES)
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_the_nearest_entry_is_found(code, values):
    entries = torch.tensor(CODES[code].values)
    bounds = (entries[1:] + entries[:-1]) / 2
    near = torch.cat([torch.nextafter(bounds, torch.tensor(to)) for to in (-2.0, 2.0)])
    everything = torch.cat((torch.tensor(values), entries, bounds, near))
    index = nearest(everything, code)
    assert torch.equal(index.int(), torch.bucketize(everything, bounds, out_int32=True))
    best = (everything[:, None] - entries).abs().amin(1)
    # Bounds are rounded to float32.
    assert ((everything - entries[index.int()]).abs() <= best + 1e-7).all()


@pytest.mark.parametrize(
    ("code", "shape", "block_size"),
    [*combinations(CODES, [(64, 96), (7, 33), (3, 50), (1, 1)], [32, 64, 4096]), ("nf4", (600, 500), 64)],
)
def test_blocks_run_through_the_rows_and_the_last_may_be_short(code, shape, block_size):
    weight = normal(*shape)
    held = quantize(weight, Spec(code, block_size, double_quant=False))
    # A reciprocal instead of a division, and back: two roundings.
    torch.testing.assert_close(held.dequantize(), by_the_book(weight, code, block_size), rtol=3e-7, atol=0)


def test_bytes_are_packed_from_the_highest_bits():
    weight = torch.tensor([[1.0, -1.0, 0.0, 1.0, 0.5]])
    assert quantize(weight, Spec("nf4", 32, False)).packed.tolist() == [0xF0, 0x7F, 0xC7]
    assert quantize(weight, Spec("nf2", 32, False)).packed.tolist() == [0b11_00_01_11, 0b10_01_01_01]
    assert quantize(weight, Spec("int8", 32, False)).packed.tolist() == [254, 0, 127, 254, 190]


def test_the_error_on_normal_weights():
    """Relative root mean square; nf4's figure is that of the literature, 0.092."""
    weight = normal(512, 512)

    def off(code: str) -> float:
        return ((quantize(weight, Spec(code)).dequantize() - weight).norm() / weight.norm()).item()

    # 262,144 values: the third digit moves by one or two.
    assert off("nf4") == pytest.approx(0.0920, abs=3e-4)
    assert off("int8") == pytest.approx(0.0063, abs=2e-4)
    assert off("nf2") == pytest.approx(0.564, abs=3e-3)


@pytest.mark.parametrize(("code", "double", "bits"), [("nf4", True, 4.127), ("nf4", False, 4.5), ("int8", True, 8.127)])
def test_what_it_takes(code, double, bits):
    """Scales of blocks of 64 cost 32 / 64 bits a value, quantized 8 / 64 + 32 / (64 * 256)."""
    held = quantize(normal(1024, 256), Spec(code, 64, double))
    assert held.nbytes * 8 / (1024 * 256) == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("spec", [Spec(), Spec(double_quant=False), Spec("int8")])
def test_dtypes_are_roundings_of_the_same_values(spec):
    held = quantize(normal(40, 96), spec)
    wide = held.dequantize(torch.float32)
    assert held.dequantize().dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(held.dequantize(dtype), wide.to(dtype))
    assert quantize(normal(40, 96).bfloat16(), spec).dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("double", [True, False])
def test_zeros_stay_zeros(double):
    weight = torch.zeros(4, 96)
    assert torch.equal(quantize(weight, Spec(double_quant=double)).dequantize(), weight)
    weight[3] = normal(96)
    dequantized = quantize(weight, Spec(double_quant=double)).dequantize()
    assert dequantized.isfinite().all()
    assert not dequantized[:2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_with_the_dequantized_weight_and_keeps_none(dtype):
    held = quantize(normal(48, 64).to(dtype), Spec())
    x, bias = normal(10, 64, seed=1).to(dtype).requires_grad_(), normal(48, seed=2).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = product(x, held, bias)
    assert not kept
    assert out.grad_fn.weight is held
    grad = normal(10, 48, seed=3).to(dtype)
    (got,) = torch.autograd.grad(out, x, grad)
    plain = F.linear(x, held.dequantize(), bias)
    (expected,) = torch.autograd.grad(plain, x, grad)
    assert torch.equal(out, plain)
    assert torch.equal(got, expected)


def test_compute_dtype_is_that_of_the_products():
    linear = Linear(64, 48)
    linear.weight.copy_(normal(48, 64))
    linear.quantize(Spec(), torch.bfloat16)
    x = normal(10, 64, seed=1).requires_grad_()
    out = linear(x)
    expected = F.linear(x.bfloat16(), linear.weight.dequantize(torch.bfloat16))
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())
    out.sum().backward()
    assert x.grad.dtype == torch.float32
    # For who looks at it: in the dtype of everything around it, with the values of the products.
    assert linear.dense().dtype == torch.float32
    assert torch.equal(linear.dense(), linear.weight.dequantize(torch.bfloat16).float())


def test_a_decoder_holds_its_linears_only():
    held = Quantization(type="nf4", block_size=32)
    decoder = random_decoder(quantize=lambda name: held)
    kinds = {name: type(weight) for name, weight in decoder.weights().items()}
    assert {name for name, kind in kinds.items() if kind is QuantizedWeight} == {
        f"{name}.weight" for name in decoder.linears()
    }
    assert kinds.keys() == dict(random_decoder().named_parameters()).keys()
    for name, linear in random_decoder().linears().items():
        expected = quantize(linear.weight, held)
        assert torch.equal(decoder.linears()[name].dense(), expected.dequantize())


def test_a_decoder_is_never_wide_as_a_whole():
    """Tensors that it holds from its construction on: nothing of the quantized linears' own size."""
    spec = Spec("nf4", 32)
    wide, held = Decoder(SHAPE), Decoder(SHAPE, quantize=lambda name: spec if "mlp" in name else None)
    linears = [linear for name, linear in wide.linears().items() if "mlp" in name]
    # A decoder is made without values: what its memory happened to hold before must not matter.
    saved = sum(linear.weight.nbytes - QuantizedWeight(linear.weight.shape, spec).nbytes for linear in linears)
    assert _bytes(held) == _bytes(wide) - saved
    assert isinstance(held.linears()["decoder.layers.0.self_attention.linear_qkv"].weight, torch.nn.Parameter)


def test_weights_are_loaded_by_their_names():
    source = dict(random_decoder().named_parameters())
    decoder = Decoder(SHAPE, quantize=lambda name: Spec("int8", 32))
    load_weights(decoder, source.items())
    name = "decoder.layers.1.mlp.linear_fc2"
    assert torch.equal(
        decoder.linears()[name].dense(), quantize(source[f"{name}.weight"], Spec("int8", 32)).dequantize()
    )
    with pytest.raises(ValueError, match=r"mlp.linear_fc2.weight: shape \[3, 3\], expected \[32, 48\]"):
        load_weights(decoder, [(f"{name}.weight", torch.zeros(3, 3))])
    with pytest.raises(ValueError, match="the checkpoint lacks"):
        load_weights(decoder, [(name, value) for name, value in source.items() if "linear_fc1.weight" not in name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_is_refused_by_its_name(value, place):
    decoder = Decoder(SHAPE, quantize=lambda name: Spec("nf4", 64))
    source = {name: tensor.detach().clone() for name, tensor in random_decoder().named_parameters()}
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    source[name].view(-1)[place] = value
    with pytest.raises(ValueError, match=f"{name}: holds values that are infinite or NaN"):
        load_weights(decoder, source.items())


def _bytes(decoder: Decoder) -> int:
    return sum(tensor.nbytes for tensor in (*decoder.parameters(), *decoder.buffers()))


def test_without_bitsandbytes_the_bits_are_the_same(monkeypatch):
    held = quantize(normal(64, 96), Spec())
    before = held.dequantize()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import that fails, as where it is not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    quantization_kernels.serves.cache_clear()
    try:
        assert not quantization_kernels.serves("cpu")
        assert torch.equal(held.dequantize(), before)
        assert torch.equal(quantize(normal(64, 96), Spec()).packed, held.packed)
    finally:
        quantization_kernels.serves.cache_clear()


def test_dequantizing_says_nothing_and_draws_nothing():
    """bitsandbytes warns at its import of kernels that nobody asked for; a run's log has no place for it."""
    code = """
import torch
from steps.config.peft import Quantization
from steps.engine.model.quantization import quantize
before = torch.random.get_rng_state()
quantize(torch.ones(64, 64), Quantization()).dequantize()
assert torch.equal(before, torch.random.get_rng_state())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
