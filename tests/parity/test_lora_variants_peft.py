"""LoRA and its variants against Hugging Face peft: scale, learning rates, and where the factors start."""

from __future__ import annotations

import pytest
import torch
from support.peft_pairs import ADAMW, EXACT, THROUGH, LinearPair, ModelPair, off

from steps.config.peft.lora import LoRA
from steps.engine.adapters.starts import activations, principal
from steps.engine.data.batches import MicroBatch

peft = pytest.importorskip("peft")

VARIANTS = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dropout in eval": ({"dropout": 0.3}, {"lora_dropout": 0.3}),
}


def pair(ours=None, theirs=None, **options) -> LinearPair:
    section = LoRA(dim=4, **{"alpha": 10, **(ours or {})})
    settings = peft.LoraConfig(r=4, target_modules=["proj"], **{"lora_alpha": 10, **(theirs or {})})
    both = LinearPair(section, settings, **options)
    both.mine.eval()
    both.theirs.eval()
    return both


@pytest.fixture(params=EXACT, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("ours", "theirs"), VARIANTS.values(), ids=VARIANTS)
def test_forward_and_gradients(ours, theirs, bias, dtype):
    both = pair(ours, theirs, dtype=dtype, bias=bias)
    mine, expected = both.outputs()
    assert off(mine, expected) < EXACT[dtype]
    assert off(mine, both.mine.project(both.x)) > 0.1
    for got, wanted in both.gradients():
        assert off(got, wanted) < EXACT[dtype]


def test_dropout_in_training_drops_what_peft_drops(dtype):
    both = pair({"dropout": 0.3}, {"lora_dropout": 0.3}, dtype=dtype)
    calm, _ = both.outputs()
    found = []
    for side in (both.mine, both.theirs):
        torch.manual_seed(0)  # the same values are dropped
        found.append(side.train()(both.x))
    assert off(*found) < EXACT[dtype]
    assert off(found[0], calm) > 0.1


@pytest.mark.parametrize(("ours", "theirs"), VARIANTS.values(), ids=VARIANTS)
def test_three_adamw_steps(ours, theirs, dtype):
    both = pair(ours, theirs, dtype=dtype)
    before = [mine.detach().clone() for mine, _ in both.tensors()]
    both.train(3)
    for old, (mine, expected) in zip(before, both.tensors(), strict=True):
        assert off(mine, old) > 0.01
        assert off(mine, expected) < EXACT[dtype]


@pytest.mark.parametrize(("ours", "theirs"), VARIANTS.values(), ids=VARIANTS)
def test_merged_weights_are_pefts_to_the_bit(ours, theirs):
    """Float32 factors on a bfloat16 base: product, scale and sum in float32, one rounding at the end."""
    both = pair(ours, theirs, base_dtype=torch.bfloat16)
    before = both.mine.weight.clone()
    mine, expected = both.merged()
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, expected)
    assert not torch.equal(mine, before)


def test_lora_plus_steps(dtype):
    """B learns 16 times as fast as A; both are decayed."""
    from peft.optimizers import create_loraplus_optimizer

    both = pair({"lora_plus_ratio": 16.0}, dtype=dtype)
    optimizer = create_loraplus_optimizer(
        both.model, torch.optim.AdamW, lr=ADAMW.lr, loraplus_lr_ratio=16, betas=(0.9, 0.95), eps=ADAMW.adam_eps,
        loraplus_weight_decay=ADAMW.weight_decay,
    )  # fmt: skip
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {0.01, 0.16}
    (_, a), (_, b) = both.tensors()
    start = a.detach().clone(), b.detach().clone()
    both.train(3, reference=optimizer)
    for mine, expected in both.tensors():
        assert off(mine, expected) < EXACT[dtype]
    assert (b - start[1]).abs().mean() > 8 * (a - start[0]).abs().mean()


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("alpha", [4, 10, 3])
def test_a_start_from_the_weight_is_pefts(name, shape, alpha):
    """The product of the factors at the start, which knows no signs of singular vectors, and after three steps.

    peft takes the start away from the base's weight, we subtract it on the way: the linears compute the same.
    """
    options = {"shape": shape, "moved": False}
    both = pair(
        {"alpha": alpha, "init_lora_weights": name}, {"lora_alpha": alpha, "init_lora_weights": name}, **options
    )
    scale = both.method.section.scale
    (a, peft_a), (b, peft_b) = both.tensors()
    update = both.theirs.get_delta_weight("default")
    assert off(scale * b @ a, update) < 1e-5  # float32 on both sides, one by SVD, one by eigenvectors
    rank = torch.linalg.matrix_rank(both.mine.weight - update)
    assert rank == 16 - 4 if name == "pissa" or alpha == 4 else rank == 16
    before = b.detach() @ a.detach()
    for mine, expected in (both.outputs(), next(both.gradients())):
        assert off(mine, expected) < 2e-5
    both.train(3)
    assert off(b @ a, before) > 0.01
    # A step of Adam turns with the sign of a gradient, so flipped vectors stay flipped.
    assert off(b @ a, peft_b @ peft_a) < 2e-5
    mine, expected = both.merged()
    assert off(mine, expected) < 1e-5


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_moved_start_keeps_a_bfloat16_base_whole(name):
    """peft rounds the rest of the weight to bfloat16, and the merged weight again; we round once. Both against float64,
    with the same factors."""
    both = pair({"init_lora_weights": name}, {"init_lora_weights": name}, base_dtype=torch.bfloat16, moved=False)
    base = both.mine.weight.double()
    draw = torch.Generator().manual_seed(0)
    moves = [0.02 * torch.randn(mine.shape, generator=draw) for mine, _ in both.tensors()]
    starts, ends = [], []
    for side in (0, 1):
        a, b = (pair[side].detach().double() for pair in both.tensors())
        starts.append(2.5 * b @ a)
        for tensors, move in zip(both.tensors(), moves, strict=True):
            tensors[side].data.add_(move)
        a, b = (pair[side].detach().double() for pair in both.tensors())
        ends.append(2.5 * b @ a)
    mine, theirs = both.merged()
    errors = [
        (merged.double() - (base + end - start)).abs().max().item()
        for merged, start, end in zip((mine, theirs), starts, ends, strict=True)
    ]
    half_a_step = base.abs().max().item() * 2**-8
    assert errors[0] <= half_a_step
    assert errors[0] < errors[1]


def test_principal_vectors_of_a_large_weight_are_the_best_ones():
    """Beyond 2,048 they come from subspace iterations. A random matrix is the worst there is: no singular value stands
    out, and the subspace is not unique to any digit; what it leaves of the weight is."""
    weight = torch.randn(2100, 2060, generator=torch.Generator().manual_seed(0)) / 2060**0.5
    a, b = principal(weight, 8, 2.5, torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(weight)
    explained = (weight.norm() ** 2 - (weight - 2.5 * b @ a).norm() ** 2) / values[:8].square().sum()
    assert 0.99 < explained <= 1.0001
    again, _ = principal(weight, 8, 2.5, torch.Generator().manual_seed(1))
    assert torch.equal(a, again)


def test_eva_finds_pefts_directions(tmp_path):
    """Of one batch, on a Llama. The paper's are the right singular vectors of the activations themselves; peft's
    incremental PCA takes their mean away first. Given each activation and its negative, whose mean is zero, it finds
    the singular vectors; the signs are anybody's."""
    rank = 32
    section = LoRA(dim=rank, init_lora_weights="eva")
    settings = peft.LoraConfig(
        r=rank, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, whiten=False), task_type="CAUSAL_LM"
    )
    both = ModelPair(tmp_path, "llama", torch.float32, section, settings, moved=False)
    rows, length = both.ids.shape
    bounds = [length * row for row in range(rows + 1)]
    batch = MicroBatch(both.ids.flatten(), bounds, torch.tensor([0]), torch.tensor([0]))
    both.method.start(both.adapters, [batch])

    def mirrored(inputs, mask, name):
        flat = inputs[0].flatten(0, -2)
        return torch.cat((flat, -flat))

    peft.initialize_lora_eva_weights(
        both.model, [{"input_ids": both.ids}], prepare_layer_inputs_fn=mirrored, show_progress_bar=False
    )
    compared = 0
    for name, module in both.adapters.modules.items():
        mine = module.linear_in.weight.detach().double()
        for layer in both.layers(name):
            theirs = layer.get_parameter("lora_A.default.weight").detach().double()
            assert theirs.shape == mine.shape
            # The same subspace: projections agree. Float32 singular vectors, with neighbours as near as 1 %.
            assert off(mine.T @ mine, theirs.T @ theirs) < 1e-4
            # And in the same order: each direction by itself, up to its sign.
            assert (mine * theirs).sum(1).abs().median() > 0.999
            compared += 1
    assert compared == 7 * both.config.num_layers
    mine, theirs = both.logits()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=THROUGH[torch.float32])


def test_eva_of_many_batches_is_the_decomposition_of_all_of_them(tmp_path):
    """The definition, with every activation at once in float64; what is kept between batches is twice the rank."""
    section = LoRA(dim=4, init_lora_weights="eva", target_modules=["linear_fc2"])
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    both = ModelPair(tmp_path, "llama", torch.float32, section, settings, moved=False)
    draw = torch.Generator().manual_seed(2)
    batches = [
        MicroBatch(torch.randint(97, (40,), generator=draw), [0, 40], torch.tensor([0]), torch.tensor([0]))
        for _ in range(6)
    ]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in both.adapters.modules}
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: seen[name].append(arguments[0].double()))
        for name, module in both.adapters.modules.items()
    ]
    found = activations(both.adapters, batches, 4)
    for hook in hooks:
        hook.remove()
    for name, directions in found.items():
        rows = torch.cat(seen[name])
        assert len(rows) == 240
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        kept = (rows @ directions.double().T).norm() ** 2
        # What forgetting costs: a little of what the best four directions explain.
        assert 0.97 < kept / values[:4].square().sum() <= 1 + 1e-6
        assert right.shape[1] == directions.shape[1]
