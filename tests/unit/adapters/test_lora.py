from __future__ import annotations

import pytest
import torch
from support.packed import SHAPE, random_decoder

from steps.config.peft import names as types
from steps.config.peft import section_class
from steps.config.peft.dora import DoRA
from steps.config.peft.lora import LoRA
from steps.engine.adapters import base
from steps.engine.checkpoint.mapping import part_view
from steps.engine.data.batches import MicroBatch
from steps.errors import ConfigError
from steps.shapes import memory
from steps.shapes.targets import chosen

IDS = torch.randint(SHAPE.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
BOUNDS = [0, 13, 40]


def adapted(section: LoRA, seed: int = 3, **options):
    decoder = random_decoder(**options)
    return base.attach(decoder, base.create(section, SHAPE), chosen(section, SHAPE.num_layers), seed)


def shake(adapters, seed: int = 5) -> None:
    """Give every adapter tensor a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapters.tensors().values():
        tensor.data.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def test_every_typed_section_has_its_method_and_the_other_way_round():
    assert types() == list(base.methods())
    assert all(section_class(name).model_fields["type"].default == name for name in types())


def test_a_fresh_adapter_changes_nothing():
    adapters = adapted(LoRA(dim=4))
    assert torch.equal(adapters.decoder(IDS, BOUNDS), random_decoder()(IDS, BOUNDS))


def test_only_the_adapters_are_trained_under_megatron_bridges_names():
    adapters = adapted(LoRA(dim=4, target_modules=["linear_qkv"]))
    linear = "decoder.layers.0.self_attention.linear_qkv.adapter."
    shapes = {name: list(value.shape) for name, value in adapters.parameters().items() if name.startswith(linear)}
    assert shapes == {f"{linear}linear_in.weight": [4, 32], f"{linear}linear_out.weight": [64, 4]}
    assert len(adapters.parameters()) == len(adapters.tensors()) == 2 * SHAPE.num_layers
    assert all(value.dtype == torch.float32 for value in adapters.parameters().values())


def test_merged_weights_compute_what_the_adapters_compute():
    adapters = adapted(LoRA(dim=4, alpha=6))
    shake(adapters)
    got = adapters.decoder(IDS, BOUNDS)
    merged = random_decoder()
    for name, linear in merged.linears().items():
        tensors = {key: value.data for key, value in adapters.modules[name].state_dict().items()}
        weight = adapters.method.merge(name, linear.weight.data, tensors, {})
        assert not torch.equal(weight, linear.weight)
        linear.weight.data.copy_(weight)
    # float32, two ways of summing; the logits are of order 10.
    torch.testing.assert_close(merged(IDS, BOUNDS), got, rtol=0, atol=2e-4)


def test_merge_is_pure_and_in_float32():
    method = base.create({"type": "lora", "dim": 2, "alpha": 4}, SHAPE)
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5).bfloat16(), torch.randn(6, 2).bfloat16()
    kept = weight.clone()
    merged = method.merge("x", weight, {"linear_in.weight": a, "linear_out.weight": b}, {})
    assert torch.equal(weight, kept)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, weight + 2 * (b.float() @ a.float()))


def test_the_gradient_of_the_in_place_product_is_autograds():
    adapters = adapted(LoRA(dim=4, alpha=8), dtype=torch.float64)
    adapters.decoder.to(torch.float64)
    shake(adapters)
    parameters = list(adapters.parameters().values())
    got = torch.autograd.grad(adapters.decoder(IDS, BOUNDS).square().sum(), parameters)
    plain = random_decoder(dtype=torch.float64)
    for name, linear in plain.linears().items():
        a, b = (value.data.clone().requires_grad_() for value in adapters.modules[name].parameters())
        linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)
        linear.factors = (a, b)
        linear.project = lambda x, linear=linear, a=a, b=b: x @ (linear.weight + 2 * b @ a).T
    factors = [factor for linear in plain.linears().values() for factor in linear.factors]
    expected = torch.autograd.grad(plain(IDS, BOUNDS).square().sum(), factors)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)


def test_the_start_depends_on_seed_and_name_alone():
    full = adapted(LoRA(dim=4)).tensors()
    part = adapted(LoRA(dim=4, target_modules=["linear_fc2"])).tensors()
    assert part
    assert all(torch.equal(full[name], value) for name, value in part.items())
    other = adapted(LoRA(dim=4), seed=4).tensors()
    starts = {name: value for name, value in full.items() if name.endswith("linear_in.weight")}
    assert not any(torch.equal(other[name], value) for name, value in starts.items())
    assert len({value.sum().item() for value in starts.values()}) == len(starts)


@pytest.mark.parametrize(("how", "variance"), [("xavier", 2 / 1064), ("uniform", 2 / 1064), ("kaiming", 1 / 3000)])
def test_start_of_linear_in(how, variance):
    from steps.engine.adapters.starts import matrix

    weight = matrix(how, 64, 1000, base.generator(0, "x"))
    assert weight.var().item() == pytest.approx(variance, rel=0.02)
    bounded = weight.abs().max().item() <= (3 * variance) ** 0.5 * 1.0001
    assert bounded == (how != "xavier")


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(position):
    adapters = adapted(LoRA(dim=4, dropout=0.5, dropout_position=position, target_modules=["*.layers.0.*.linear_qkv"]))
    shake(adapters)
    decoder, (module,) = adapters.decoder, adapters.modules.values()
    linear = decoder.linears()["decoder.layers.0.self_attention.linear_qkv"]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    decoder.eval()
    calm = module(x, linear)
    assert torch.equal(calm, module(x, linear))
    decoder.train()
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([module(x, linear) for _ in range(4000)]).mean(0)
    change = calm - linear.project(x)
    assert not torch.equal(module(x, linear), calm)
    assert (mean - calm).norm() < 0.05 * change.norm()


def test_bfloat16_base_keeps_float32_masters():
    adapters = adapted(LoRA(dim=4), dtype=torch.bfloat16)
    shake(adapters)
    adapters.decoder(IDS, BOUNDS).float().square().sum().backward()
    assert all(value.grad.dtype == value.dtype == torch.float32 for value in adapters.parameters().values())
    assert all(value.dtype == torch.bfloat16 for value in adapted(LoRA(lora_dtype="bfloat16")).parameters().values())


def test_dora_starts_from_the_base_with_bfloat16_factors_too():
    section = DoRA(dim=4, lora_dtype="bfloat16")
    adapters = adapted(section)
    assert torch.equal(adapters.decoder(IDS, BOUNDS), random_decoder()(IDS, BOUNDS))
    held = {name: value for name, value in adapters.parameters().items() if "decoder.layers.0.mlp.linear_fc2." in name}
    assert [str(value.dtype) for value in held.values()] == ["torch.float32", "torch.bfloat16", "torch.bfloat16"]
    nbytes = sum(value.nbytes for value in adapters.parameters().values())
    told = {held.what: held.nbytes for held in memory.held(section, SHAPE, "float32")}
    assert (told["adapter"], told["gradients"], told["moments of Adam"]) == (nbytes, nbytes, 2 * nbytes)


def test_eva_says_so_when_the_data_are_too_few_for_the_rank():
    adapters = adapted(LoRA(dim=16, init_lora_weights="eva", calibration_rows=1))
    batch = MicroBatch(IDS[:10], [0, 10], torch.arange(9), IDS[1:10])
    with pytest.raises(ConfigError, match=r"peft.calibration_rows: 1 rows hold 10 tokens, too few to find 16 dir"):
        adapters.method.start(adapters, [batch])


def test_loading_refuses_tensors_of_another_adapter():
    adapters = adapted(LoRA(dim=4))
    tensors = {name: value.clone() for name, value in adapters.tensors().items()}
    with pytest.raises(ValueError, match="not in the checkpoint"):
        adapters.load(dict(list(tensors.items())[1:]))
    with pytest.raises(ValueError, match="in the checkpoint only"):
        adapted(LoRA(dim=4, target_modules=["linear_qkv"])).load(tensors)
    with pytest.raises(ValueError, match="shape"):
        adapted(LoRA(dim=2)).load(tensors)


def test_an_unknown_method_is_told_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"peft.type: 'lorra' is no adapter method.*Did you mean lora\?"):
        base.create({"type": "lorra"}, SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("linear", "rows", "parts"),
    [("mlp.linear_fc2", 700, ()), ("self_attention.linear_qkv", None, ("q", "v")), ("mlp.linear_fc1", None, ("up",))],
)
def test_merging_by_blocks_of_rows_is_merging_the_whole(linear, rows, parts, dtype):
    """700 rows are two blocks and a rest, q of linear_qkv lies in it group by group."""
    method = base.create({"type": "canonical_lora" if parts else "lora", "dim": 4, "alpha": 7}, SHAPE)
    sizes = {"q": SHAPE.query_size, "v": SHAPE.num_query_groups * SHAPE.kv_channels, "up": SHAPE.ffn_hidden_size}
    rows = rows or {"linear_qkv": SHAPE.qkv_size, "linear_fc1": 2 * SHAPE.ffn_hidden_size}[linear.partition(".")[2]]
    torch.manual_seed(0)
    weight, tensors = torch.randn(rows, 40).to(dtype), {}
    for part in parts or ("",):
        name = f"adapter_{part}." if part else ""
        tensors[f"{name}linear_in.weight"] = torch.randn(4, 40)
        tensors[f"{name}linear_out.weight"] = torch.randn(sizes.get(part, rows), 4)
    before, whole = weight.clone(), weight.float().clone()
    for part, factors in method.factors(linear, tensors, {}).items():
        place = part_view(SHAPE, part, whole.T)
        place += factors.delta().T.reshape(place.shape)
    merged = method.merge(f"decoder.layers.0.{linear}", weight, tensors, {})
    # A product of fewer rows may add in another order: some units in float32's last place of numbers up to 50, and a
    # unit in a narrower dtype's where that decides how it rounds.
    limit = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(merged, whole.to(dtype), rtol=limit, atol=2e-5)
    assert torch.equal(weight, before)
