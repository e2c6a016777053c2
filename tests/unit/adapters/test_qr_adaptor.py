"""QR-Adaptor: its settings, its arithmetic against the tensors, and a search whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.adapters import adapted, section, shake, train
from support.packed import SHAPE, random_decoder, random_rows, write_base, write_packed

from steps.artifacts.opening import Artifact
from steps.artifacts.record import digest_files, read
from steps.config.peft.qr_adaptor import QRAdaptor
from steps.convert.merge_lora.schema import Config as MergeConfig
from steps.engine.adapters import base
from steps.engine.adapters.proxy import Proxy
from steps.engine.adapters.qr_adaptor import QRAdaptorMethod
from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.hf import open_directory
from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.checkpoint.merge import merge, open_adapter
from steps.engine.data.batches import MicroBatch
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.model.quantization import as_held, quantize
from steps.engine.progress import SILENT
from steps.engine.train.loss import batch_loss
from steps.errors import ArtifactError
from steps.shapes import account

GIVEN = {
    "type": "qr_adaptor", "ranks": [2, 4, 8], "alpha": 6, "layer_bits": [8, 2], "layer_ranks": [4, 2], "block_size": 32,
}  # fmt: skip
SEARCHED = {
    "type": "qr_adaptor", "ranks": [2, 4], "alpha": 6, "bits": [2, 4, 8], "block_size": 32, "calibration_rows": 4,
    "proxy_steps": 1, "population": 4, "generations": 1, "refinements": 2, "dropout": 0.1,
}  # fmt: skip


def problems(**settings):
    typed = section({"type": "qr_adaptor", "ranks": [2, 4], **settings})
    return [str(problem) for problem in (*typed.check(10), *account.misfits(typed, SHAPE))]


def test_settings_that_cannot_work_are_told_before_anything_starts():
    assert problems() == []
    assert problems(layer_bits=[4, 4], layer_ranks=[2, 4]) == []
    assert problems(quantization={"type": "nf4"}) == [
        "peft.quantization: has no place beside peft.type=qr_adaptor, which quantizes each layer by itself. "
        "Leave it out; peft.bits, peft.block_size and peft.double_quant say how, peft.layer_bits in what."
    ]
    assert problems(bits=[], ranks=[2]) == ["peft.bits: is empty: there is nothing to choose from"]
    assert problems(layer_bits=[4, 4, 8]) == [
        "peft.layer_bits: has 3 entries, but the model has 2 layers. Allowed: 2 of them, or null to search for them"
    ]
    assert problems(bits=[4, 8], layer_bits=[2, 4]) == [
        "peft.layer_bits: 2 is none of peft.bits. Allowed: 4, 8. Add it to peft.bits, or choose another."
    ]
    assert problems(ranks=[4, 64]) == [
        "peft.ranks: rank 64 is above that of linear_qkv, which is [64, 32]. Allowed: 1 to 32"
    ]


def test_a_budget_that_nothing_fits_in_says_what_is_needed():
    (told,) = problems(bits=[8], budget_bits=4.0)
    assert told.startswith("peft.budget_bits: 4 bits are 0.020 MB here, but the least of peft.bits and peft.ranks in ")
    needed = float(told.partition("Allowed: ")[2].split()[0])
    # Eight bits, less the two of the adapters' ranks between the least and the middle one.
    assert 4 < needed < 8
    assert problems(bits=[8], budget_bits=needed) == []
    # Rounded up to hundredths, and each of the eight linears to whole bytes.
    assert len(problems(bits=[8], budget_bits=needed - 0.02)) == 1


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_memory_by_arithmetic_is_the_memory_of_the_tensors(bits, double_quant):
    typed = section({**GIVEN, "double_quant": double_quant, "layer_bits": [bits, bits], "layer_ranks": [4, 4]})
    decoder = random_decoder()
    held = {name: quantize(linear.weight, typed.held(name)) for name, linear in decoder.linears().items()}
    assert {weight.code.bits for weight in held.values()} == {bits}
    adapters = base.attach(random_decoder(), base.create(typed, SHAPE), list(decoder.linears()), 0)
    trained = sum(value.nbytes for value in adapters.parameters().values())
    expected = sum(weight.nbytes for weight in held.values()) + trained
    assert sum(typed.layer_bytes(layer, bits, 4) for layer in account.layers(typed, SHAPE)) == expected


def test_each_layer_has_its_own_rank_and_a_checkpoint_one_shape():
    adapters = adapted(GIVEN)
    shake(adapters)
    for name, module in adapters.modules.items():
        rank, saved = {"0": 4, "1": 2}[name.split(".")[2]], module.saved()
        assert module.linear_in.weight.shape[0] == module.linear_out.weight.shape[1] == rank
        assert saved["linear_in.weight"].shape[0] == saved["linear_out.weight"].shape[1] == 4
        delta = saved["linear_out.weight"] @ saved["linear_in.weight"] * (6 / 8)
        (factors,) = adapters.method.factors(name, saved, {}).values()
        # The zeros of the padding change the order of the sums at most.
        torch.testing.assert_close(factors.delta(), delta, rtol=1e-6, atol=1e-7)
        assert len(factors.a) == rank
    assert account.trainable(section(GIVEN), SHAPE) < account.trainable(section({**GIVEN, "layer_ranks": None}), SHAPE)


def test_what_was_saved_is_filled_in_again_without_the_padding():
    one, other = adapted(GIVEN), adapted(GIVEN, seed=8)
    shake(one)
    other.load({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert all(torch.equal(value, other.parameters()[name]) for name, value in one.parameters().items())


def test_lower_ranks_start_as_the_head_of_higher_ones():
    high, low = (adapted({**GIVEN, "layer_ranks": ranks}) for ranks in ([8, 8], [2, 4]))
    for name, module in low.modules.items():
        weight = module.linear_in.weight
        assert torch.equal(weight, high.modules[name].linear_in.weight[: len(weight)])


def sensitive_decoder(layers: int, loud: int) -> Decoder:
    """A random decoder in which one layer says ten times as much as any other."""
    decoder = random_decoder(replace(SHAPE, num_layers=layers))
    for number, layer in enumerate(decoder.decoder.layers):
        if number != loud:
            layer.self_attention.linear_proj.weight.mul_(0.1)
            layer.mlp.linear_fc2.weight.mul_(0.1)
    return decoder


def spoken(decoder: Decoder, rows: int, tokens: int) -> list[MicroBatch]:
    """Text that the decoder itself draws: no other weights can expect to do better on it."""
    generator, batches = torch.Generator().manual_seed(1), []
    for _ in range(rows):
        ids = torch.randint(SHAPE.vocab_size, (1,), generator=generator)
        while len(ids) < tokens:
            chances = torch.softmax(decoder(ids, [0, len(ids)])[-1].float(), -1)
            ids = torch.cat((ids, torch.multinomial(chances, 1, generator=generator)))
        batches.append(MicroBatch(ids, [0, tokens], torch.arange(tokens - 1), ids[1:]))
    return batches


@pytest.mark.parametrize("loud", [0, 3])
def test_the_layer_that_quantization_hurts_most_gets_the_most_bits(loud):
    """4 layers, all in 4 bits at most on average: 8 bits for one are paid for by two others."""
    with torch.no_grad():
        batches = spoken(sensitive_decoder(4, loud), rows=6, tokens=60)
    settings = {**SEARCHED, "population": 8, "generations": 3, "refinements": 6, "calibration_rows": 6}
    method = QRAdaptorMethod(section(settings), replace(SHAPE, num_layers=4))
    calibration = base.Calibration(
        lambda: sensitive_decoder(4, loud), lambda rows: batches[:rows], batch_loss, 5, SILENT
    )
    settled = method.settle(calibration)
    told = json.loads(settled.documents["qr_adaptor.json"])
    assert max(range(4), key=told["layer_sensitivity_nats"].__getitem__) == loud
    bits = settled.section.layer_bits
    assert bits[loud] == max(bits) > min(bits)
    assert bits.count(bits[loud]) == 1 or sum(bits) / 4 > 4
    trials = told["trials"]
    assert max(trial["bytes"] for trial in trials) <= told["budget_bytes"]
    assert told["trials"][told["chosen"]]["loss"] < trials[0]["loss"]
    assert method.settle(calibration) == settled


def test_sensitivity_is_the_divergence_of_the_outputs():
    """Against torch's own distributions on whole logits."""
    decoder, batches = random_decoder(), spoken(random_decoder(), rows=2, tokens=30)
    typed = section(SEARCHED)
    proxy = Proxy(decoder, batches, batch_loss, [[2, 4]] * 2, typed.held_in, lambda one: pytest.fail(str(one)), 1, 1e-3)
    got = proxy.sensitivity(SILENT)
    plain, batch = random_decoder(), batches[0]
    whole = torch.distributions.Categorical(logits=plain(batch.input_ids, [0, 30])[batch.trained])
    for layer in range(2):
        changed = random_decoder()
        for name, linear in changed.linears().items():
            if name.split(".")[2] == str(layer):
                linear.weight.copy_(quantize(linear.weight, typed.held_in(2)).dequantize())
        few = torch.distributions.Categorical(logits=changed(batch.input_ids, [0, 30])[batch.trained])
        # float32, and both ways sum over 29 tokens of 61 logits.
        assert got[layer] == pytest.approx(torch.distributions.kl_divergence(whole, few).mean().item(), rel=1e-4)
    assert all(torch.equal(value, dict(plain.named_parameters())[name]) for name, value in decoder.named_parameters())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("qr")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


def test_a_run_searches_once_trains_as_chosen_and_reports(root, tmp_path):
    home = tmp_path / "lora"
    train(root, peft=SEARCHED, checkpoint={"save": str(home)})
    record, chosen = read(home), open_adapter(home).section
    told = json.loads((home / "qr_adaptor.json").read_text())
    best = told["trials"][told["chosen"]]
    assert chosen["layer_bits"] == best["layer_bits"]
    assert chosen["layer_ranks"] == best["layer_ranks"]
    assert record.facts["peft"] == chosen
    assert record.facts["average_bits"] == sum(chosen["layer_bits"]) / 2
    assert record.facts["identity"]["peft.layer_bits"] is None
    assert {"qr_adaptor.json", "qr_adaptor.md", "qr_adaptor.svg"} <= set(record.files)
    assert record.digest == digest_files(home)[0]
    assert record.facts["trainable_parameters"] == account.trainable(section(chosen), SHAPE)
    # What is given is not searched for, and comes to the same bits as having found it.
    train(root, peft={**SEARCHED, **{key: chosen[key] for key in ("layer_bits", "layer_ranks")}},
          checkpoint={"save": str(tmp_path / "given")})  # fmt: skip
    one, other = Checkpoint.open(home), Checkpoint.open(tmp_path / "given")
    assert all(torch.equal(tensor.load(), other.tensors[name].load()) for name, tensor in one.tensors.items())
    assert not (tmp_path / "given" / "qr_adaptor.json").exists()


def test_going_on_elsewhere_does_not_search_again(root, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    train(
        root, peft=SEARCHED, train={"train_iters": 6}, checkpoint={"save": str(first)}, scheduler={"lr_decay_iters": 12}
    )
    train(root, peft=SEARCHED, checkpoint={"save": str(tmp_path / "whole")}, scheduler={"lr_decay_iters": 12})
    monkeypatch.setattr(QRAdaptorMethod, "settle", lambda *_: pytest.fail("searched again"))
    train(root, peft=SEARCHED, checkpoint={"save": str(second), "load": str(first)}, scheduler={"lr_decay_iters": 12})
    one, other = Checkpoint.open(second), Checkpoint.open(tmp_path / "whole")
    assert all(torch.equal(tensor.load(), other.tensors[name].load()) for name, tensor in one.tensors.items())
    for name in QRAdaptorMethod.documents:
        assert (second / name).read_text() == (first / name).read_text()
    with pytest.raises(ArtifactError, match="peft.ranks"):
        train(root, peft={**SEARCHED, "ranks": [2, 8]}, checkpoint={"save": str(tmp_path / "x"), "load": str(first)})


@pytest.mark.parametrize("into", ["dequantized", "full"])
def test_merging_into_what_was_trained_on_gives_the_model_that_was_trained(into, root, tmp_path):
    train(root, peft=GIVEN, checkpoint={"save": str(tmp_path / "lora")})
    adapter = open_adapter(tmp_path / "lora")
    method = base.create(adapter.section, SHAPE)
    held = partial(as_held, method.section.held) if into == "dequantized" else None
    merge(megatron_source(root / "base"), adapter, method.merge, tmp_path / "out", base_fingerprint=None, held=held)
    trained = adapted(GIVEN)
    trained.load({name: tensor.load() for name, tensor in adapter.checkpoint.tensors.items()})
    out = open_directory(tmp_path / "out")
    merged = Decoder(out.config)
    load_weights(merged, ((k, v.load()) for k, v in mapping.to_megatron(out.config, out.tensors).items()))
    ids = torch.arange(40) % SHAPE.vocab_size
    with torch.no_grad():
        off = (merged(ids, [0, 40]) - trained.decoder.eval()(ids, [0, 40])).abs().max()
    # float32, two ways of summing, logits of order 10; or what 2 bits do to a layer.
    assert off < 3e-4 if into == "dequantized" else off > 0.1


def test_whether_there_is_anything_to_dequantize_is_known_before_the_merge():
    asked = MergeConfig(lora_checkpoint="x", base_hf_path="z", output_hf_path="y", merge_into="dequantized")
    for case, refused in ((GIVEN, []), ({"type": "lora"}, ["base_not_quantized"])):
        facts = {"peft": section(case).model_dump()}
        adapter = Artifact("lora_checkpoint", "checkpoint_lora", "x", None, facts=facts)
        base_model = Artifact("base_hf_path", "checkpoint_hf", "z", None)
        found = asked.check_inputs({"lora_checkpoint": adapter, "base_hf_path": base_model})
        assert [problem.name for problem in found] == refused


def test_only_what_is_not_given_is_searched_for(root, tmp_path):
    train(
        root, peft={**SEARCHED, "layer_bits": [4, 8], "budget_bits": 8.0}, checkpoint={"save": str(tmp_path / "lora")}
    )
    told = json.loads((tmp_path / "lora" / "qr_adaptor.json").read_text())
    assert {tuple(trial["layer_bits"]) for trial in told["trials"]} == {(4, 8)}
    assert len({tuple(trial["layer_ranks"]) for trial in told["trials"]}) > 1


def test_a_layer_without_adapters_has_no_rank_to_choose():
    typed = QRAdaptor(ranks=[2, 4], target_modules=["*.layers.1.*"])
    bits, ranks = typed.choices(account.layers(typed, SHAPE))
    assert bits == [[2, 4, 8], [2, 4, 8]]
    assert ranks == [[2], [2, 4]]
