"""The decoder's own promises; equality with transformers per family is in tests/parity."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.packed import SHAPE, random_decoder

from steps.engine.model.attention import BLOCK_ROWS, attend
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.model.pointwise import rms_norm, swiglu

VARIANTS = {
    "llama": SHAPE,
    "tied": replace(SHAPE, share_embeddings_and_output_weights=True),
    "bias": replace(SHAPE, add_qkv_bias=True),
    "qk_norm": replace(SHAPE, qk_layernorm=True),
    "window": replace(SHAPE, window_size=5),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_row_gives_each_documents_own_logits(variant):
    decoder = random_decoder(VARIANTS[variant], dtype=torch.float64)
    lengths = [1, BLOCK_ROWS + 9, 7, BLOCK_ROWS, 2, 31]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ids = torch.randint(SHAPE.vocab_size, (bounds[-1],), generator=torch.Generator().manual_seed(1))
    packed = decoder(ids, bounds)
    alone = torch.cat([decoder(ids[start:end], [0, end - start]) for start, end in pairwise(bounds)])
    # Other shapes, other summation order: float64 noise only.
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-11)


def test_a_document_does_not_see_its_neighbours():
    decoder = random_decoder()
    ids = torch.randint(SHAPE.vocab_size, (30,), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:10] = (other[:10] + 1) % SHAPE.vocab_size
    before, after = decoder(ids, [0, 10, 30]), decoder(other, [0, 10, 30])
    assert torch.equal(before[10:], after[10:])
    assert not torch.equal(before[:10], after[:10])


def test_documents_in_another_order_give_the_same_logits():
    decoder = random_decoder(dtype=torch.float64)
    ids = torch.randint(SHAPE.vocab_size, (25,), generator=torch.Generator().manual_seed(3))
    one = decoder(ids, [0, 10, 25])
    other = decoder(torch.cat((ids[10:], ids[:10])), [0, 15, 25])
    torch.testing.assert_close(torch.cat((one[10:], one[:10])), other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3, 200])
def test_attention_is_softmax_over_the_visible_keys(window):
    lengths, groups, heads, channels = [5, BLOCK_ROWS + 3, 1], 2, 3, 4
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, groups, heads, channels), (tokens, groups, channels), (tokens, groups, channels))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(tokens, groups * heads * channels, generator=generator, dtype=torch.float64)

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(tokens)
    seen = (document[:, None] == document) & (at[None] <= at[:, None])
    if window is not None:
        seen &= at[None] > at[:, None] - window
    query, key, value = inputs
    scores = torch.einsum("tghc,sgc->ghts", query, key) / channels**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = torch.einsum("ghts,sgc->tghc", weights, value).flatten(1)

    got = attend(*inputs, lengths, window)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for mine, reference in zip(torch.autograd.grad(got, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


def test_handwritten_gradients_are_the_numerical_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_recomputing_activations_changes_no_bit_of_the_gradient():
    ids = torch.randint(SHAPE.vocab_size, (40,), generator=torch.Generator().manual_seed(4))
    gradients = []
    for recompute in (False, True):
        decoder = random_decoder(recompute=recompute)
        table = decoder.embedding.word_embeddings.weight.requires_grad_()
        decoder(ids, [0, 12, 40]).square().sum().backward()
        gradients.append(table.grad)
    assert torch.equal(*gradients)


def test_every_parameter_is_frozen_and_named_as_megatron_names_it():
    decoder = Decoder(replace(SHAPE, add_qkv_bias=True, qk_layernorm=True))
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    layer = "decoder.layers.1."
    assert {name.removeprefix(layer) for name, _ in decoder.named_parameters() if name.startswith(layer)} == {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }


def test_loading_names_what_is_missing_left_over_or_of_another_shape():
    decoder = random_decoder()
    good = {name: value.clone() for name, value in decoder.named_parameters()}
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    with pytest.raises(ValueError, match=f"lacks {name}"):
        load_weights(decoder, ((key, value) for key, value in good.items() if key != name))
    with pytest.raises(ValueError, match=r"linear_fc3.*no such weight"):
        load_weights(decoder, {**good, "decoder.layers.0.mlp.linear_fc3.weight": good[name]}.items())
    with pytest.raises(ValueError, match=r"linear_fc2.*shape \[48, 32\], expected \[32, 48\]"):
        load_weights(decoder, {**good, name: good[name].T}.items())


@pytest.mark.parametrize("bounds", [[0, 5], [0, 4, 4, 10], [1, 10], [0, 7, 5, 10]])
def test_document_bounds_must_cover_the_row(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        random_decoder()(torch.zeros(10, dtype=torch.int64), bounds)
