"""nf4 and double quantization against bitsandbytes, bit by bit; the linear against its Linear4bit."""

from __future__ import annotations

import pytest
import torch

from steps.config.peft import Quantization
from steps.engine.model import quantization, quantization_kernels
from steps.engine.model.layers import Linear
from steps.engine.model.quantization import quantize
from steps.engine.model.quantization_codes import CODES, dynamic_map

bnb = pytest.importorskip("bitsandbytes", reason="extra parity")

# One block and less, whole blocks, blocks across rows, a short block at the end, more than one piece, many scales.
SHAPES = [(64, 96), (1, 7), (1, 250), (3, 50), (576, 576), (130, 78), (300, 1024)]
CPU = torch.device("cpu")


def weights(shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)


def theirs(weight, block_size, double):
    return bnb.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=double, quant_storage=torch.uint8
    )


def test_the_codes():
    assert torch.equal(torch.tensor(CODES["nf4"].values), bnb.functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(CPU), bnb.functional.create_dynamic_map())


@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_scales_and_values_are_theirs(shape, block_size, dtype, double):
    weight = weights(shape, dtype)
    packed, state = theirs(weight, block_size, double)
    held = quantize(weight, Quantization(block_size=block_size, double_quant=double))
    assert torch.equal(held.packed, packed.view(-1))
    assert torch.equal(held.scales, state.absmax)
    if double:
        assert torch.equal(held.scales_absmax, state.state2.absmax)
        assert torch.equal(held.scales_offset, state.offset.view(1))
        assert torch.equal(dynamic_map(CPU), state.state2.code)
    # As one row: their CPU kernel starts a block anew at each row, and is wrong where a block runs across two.
    state.shape = (1, weight.numel())
    for wanted in (torch.float32, torch.bfloat16):
        state.dtype = wanted
        expected = bnb.functional.dequantize_4bit(packed, state).view(shape)
        assert torch.equal(held.dequantize(wanted), expected)
        assert torch.equal(held.dequantize_here(held.absmax()).to(wanted), expected)


def test_scales_of_every_size_round_as_theirs():
    """A million scales, as wide apart as layers of real models are, blocks of zeros among them."""
    generator = torch.Generator().manual_seed(2)
    scales = torch.randn(4096, 256, generator=generator).abs() * torch.logspace(-6, 1, 4096)[:, None]
    scales[100:103] = 0
    values = scales.view(-1)[:-77] - scales.mean()
    index, state = bnb.functional.quantize_blockwise(values, blocksize=256)
    mine, absmax = quantization._quantized_scales(values)
    assert torch.equal(mine, index)
    assert torch.equal(absmax, state.absmax)
    zeros = torch.zeros(300)
    assert torch.equal(
        quantization._quantized_scales(zeros)[0], bnb.functional.quantize_blockwise(zeros, blocksize=256)[0]
    )


@pytest.mark.parametrize("block_size", [32, 64, 128, 1024, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_their_kernel_serves_and_has_our_bits(dtype, block_size):
    assert quantization_kernels.serves("cpu"), "bitsandbytes is installed, but its kernel is not used"
    held = quantize(weights((576, 192)), Quantization(block_size=block_size))
    absmax = held.absmax()
    found = quantization_kernels.dequantize(held, absmax, dtype)
    # 2048: a block size that it has only compiled code for.
    assert (found is None) == (block_size == 2048)
    if found is not None:
        assert torch.equal(found, held.dequantize_here(absmax).to(dtype))


def test_what_does_not_fit_their_kernel_is_done_here():
    short = quantize(weights((3, 50)), Quantization())
    assert quantization_kernels.dequantize(short, short.absmax(), torch.float32) is None
    eight = quantize(weights((64, 64)), Quantization(type="int8"))
    assert quantization_kernels.dequantize(eight, eight.absmax(), torch.float32) is None
    whole = quantize(weights((64, 64)), Quantization())
    assert quantization_kernels.dequantize(whole, whole.absmax(), torch.float64) is None


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_linear_computes_what_linear4bit_does(dtype, compute):
    """Forward and gradient of the input; both dequantize and call one product each, so the bits agree."""
    weight, bias = weights((96, 128), dtype), weights((96,), dtype)
    reference = bnb.nn.Linear4bit(128, 96, compute_dtype=compute, compress_statistics=True, quant_type="nf4")
    reference.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    reference.bias = torch.nn.Parameter(bias, requires_grad=False)
    reference = reference.to("cpu")
    ours = Linear(128, 96, bias=True).to(dtype)
    ours.weight.copy_(weight)
    ours.bias.copy_(bias)
    ours.quantize(Quantization(), compute)
    inputs = [weights((40, 128), dtype).mul_(20).requires_grad_() for _ in range(2)]
    out, expected = ours(inputs[0]), reference(inputs[1])
    assert out.dtype == expected.dtype == dtype
    assert torch.equal(out, expected)
    grad = weights((40, 96), dtype)
    out.backward(grad)
    expected.backward(grad)
    if (dtype, compute) == (torch.bfloat16, torch.float32):
        # For the gradient they round the weight to the dtype it came in, which they do not for the product.
        off = (inputs[0].grad - inputs[1].grad).float().norm() / inputs[1].grad.float().norm()
        assert off < 2**-8
    else:
        assert torch.equal(inputs[0].grad, inputs[1].grad)
