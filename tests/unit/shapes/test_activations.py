"""The arithmetic of shapes/activations.py against what autograd really holds, to the byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.adapters import CASES, section, told
from support.packed import SHAPE, random_decoder

from steps.engine.adapters import base as adapters
from steps.engine.data.batches import MicroBatch
from steps.engine.train.loop import batch_loss
from steps.engine.train.optim import Gradients
from steps.engine.train.trained import Trained, WholeModel
from steps.shapes import activations, targets
from steps.shapes.model_config import ModelConfig

TOKENS, LENGTHS = 384, (100, 30, 254)
#: With sides large enough that what is kept of tokens outweighs everything else.
LARGER = replace(SHAPE, num_layers=3, hidden_size=64, ffn_hidden_size=96, kv_channels=16, vocab_size=300)
MODELS = {
    "llama": LARGER,
    "tied": replace(LARGER, share_embeddings_and_output_weights=True),
    "qwen2": replace(LARGER, family="qwen2", add_qkv_bias=True),
    "qwen3": replace(LARGER, family="qwen3", qk_layernorm=True),
    "one group": replace(LARGER, num_query_groups=1),
    "window": replace(LARGER, window_size=40),
}
DTYPES = ("float32", "bfloat16")


def attached(case: dict, model: ModelConfig, dtype: str, *, recompute: bool = False) -> adapters.Adapters:
    settings = section(case)
    if settings.open:  # as it would settle
        settings = settings.model_copy(
            update={"layer_bits": [8] * model.num_layers, "layer_ranks": [4] * model.num_layers}
        )
    decoder = random_decoder(model, quantize=settings.held, dtype=getattr(torch, dtype), recompute=recompute)
    method = adapters.create(settings, model)
    return adapters.attach(decoder, method, targets.chosen(settings, model.num_layers), seed=3)


@contextlib.contextmanager
def kept_by_autograd(known: set[int]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Storages that are saved for a backward pass meanwhile, each once, by their address; without the known ones."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def measured(trained: Trained) -> tuple[int, int]:
    """Bytes kept by one micro-batch, what it consists of included; and its trained tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(LARGER.vocab_size, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) < 0.5
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    at = mask.nonzero()[:, 0]
    batch = MicroBatch(ids, bounds, at, ids[at])
    decoder = trained.decoder.train()
    held = {tensor.untyped_storage().data_ptr() for tensor in decoder.state_dict(keep_vars=True).values()}
    mine = (batch.input_ids, batch.trained, batch.targets)
    held |= {tensor.untyped_storage().data_ptr() for tensor in mine}
    with kept_by_autograd(held) as found:
        loss = batch_loss(decoder, batch)
    total = sum(storage.nbytes() for storage in found.values()) + sum(tensor.nbytes for tensor in mine)
    loss.backward()
    return total, len(at)


def expected(case: dict, model: ModelConfig, dtype: str, trained: int) -> activations.Activations:
    settings = section(case)
    if settings.open:
        settings = settings.model_copy(
            update={"layer_bits": [8] * model.num_layers, "layer_ranks": [4] * model.num_layers}
        )
    return activations.activations(settings, model, dtype, TOKENS, trained, max(LENGTHS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_trained_itself_keeps_what_it_says(name, dtype):
    whole = WholeModel.of(random_decoder(MODELS[name], dtype=getattr(torch, dtype)))
    Gradients(whole.parameters())
    found, trained = measured(whole)
    told = activations.activations(None, MODELS[name], dtype, TOKENS, trained, max(LENGTHS))
    assert told.kept(recompute=False) == found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=told)
def test_every_method_keeps_what_it_says(case, dtype):
    if case["type"] == "qr_adaptor" and "layer_bits" in case:
        case = {**case, "layer_bits": [8, 4, 8], "layer_ranks": [2, 4, 4]}
    found, trained = measured(attached(case, LARGER, dtype))
    assert expected(case, LARGER, dtype, trained).kept(recompute=False) == found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wanted", [[], ["linear_fc2"], ["*.layers.1.*.linear_proj"]], ids=str)
def test_every_family_keeps_what_is_said(name, dtype, wanted):
    """The same tensors, to the byte, whatever is adapted: nothing is kept before the first adapter."""
    case = {"type": "lora", "dim": 4, "target_modules": wanted}
    found, trained = measured(attached(case, MODELS[name], dtype))
    assert expected(case, MODELS[name], dtype, trained).kept(recompute=False) == found
