"""sft/megatron_bridge: a model out of a model, resumed to the same bits, taken as a base by every other step."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.packed import PACK_SIZE, SHAPE, random_decoder, random_rows, write_base, write_packed
from support.run_step import run_step
from unit.train.test_loop import Recording

from steps.artifacts.opening import open_artifact
from steps.artifacts.record import Record, read
from steps.config.validate import validate
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.fingerprint import fingerprint
from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.train.finetune import finetune
from steps.sft.megatron_bridge.schema import BASE, DATA, Config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    write_base(path / "base", true=True)
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


def config(inputs, save, **sections) -> dict:
    data = {
        "engine": "torch",
        "recipe": {"seq_length": PACK_SIZE},
        "dataset": {"nano3_packed_sft_dir": str(inputs / "packed")},
        "train": {
            "train_iters": 12, "global_batch_size": 4, "micro_batch_size": 2, "eval_interval": 6, "eval_iters": 2,
        },
        "optimizer": {"lr": 0.003},
        "checkpoint": {"pretrained_checkpoint": str(inputs / "base"), "save": str(save), "save_interval": 6},
        "rng": {"seed": 7},
    }  # fmt: skip
    return {name: {**value, **sections.pop(name, {})} if isinstance(value, dict) else value
            for name, value in data.items()} | sections  # fmt: skip


def train(inputs, save, **sections) -> Recording:
    typed, _ = validate(Config, config(inputs, save, **sections))
    opened = {
        DATA: open_artifact(str(inputs / "packed"), "packed_parquet", DATA),
        BASE: open_artifact(str(inputs / "base"), "checkpoint_megatron", BASE),
    }
    progress = Recording()
    finetune(typed.plan(opened), Record(type="checkpoint_megatron"), progress)
    return progress


def tensors(path, iteration=None) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in Checkpoint.open(path, iteration).tensors.items()}


def plain_curve(inputs, steps: int) -> list[float]:
    """The losses of torch.optim.AdamW on the same rows, by autograd through logits of every document alone."""
    from steps.engine.data.batches import Order
    from steps.engine.data.shards import PackedSplit

    decoder = random_decoder()
    decoder.requires_grad_(True)
    matrices = [value for value in decoder.parameters() if value.ndim > 1]
    vectors = [value for value in decoder.parameters() if value.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    split, order, losses = PackedSplit(inputs / "packed", "train"), Order(20, 7), []
    for step in range(steps):
        each = []
        for position in range(4 * step, 4 * step + 4):
            pack = split[order[position]]
            for start, end in zip(pack.starts, [*pack.starts[1:], len(pack.input_ids)], strict=True):
                ids = torch.from_numpy(pack.input_ids[start:end].astype("int64"))
                logits = decoder(ids, [0, len(ids)])[:-1]
                mask = torch.from_numpy(pack.loss_mask[start : end - 1].astype(bool))
                each.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask])
        loss = torch.cat(each).mean()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = 0.003
        adamw.step()
        losses.append(loss.item())
    return losses


CONSTANT = {"scheduler": {"lr_decay_style": "constant"}}


def test_the_loss_curve_is_that_of_plain_pytorch(inputs, tmp_path):
    found = train(inputs, tmp_path / "sft", **CONSTANT).losses()
    assert found == pytest.approx(plain_curve(inputs, 12), rel=1e-4)
    assert found[-1] < 0.9 * found[0]


def test_bfloat16_keeps_float32_beside_it_and_follows_float32(inputs, tmp_path):
    wide = train(inputs, tmp_path / "wide", train={"train_iters": 30}).losses()
    narrow = train(inputs, tmp_path / "narrow", train={"train_iters": 30, "precision": "bfloat16"}).losses()
    assert narrow == pytest.approx(wide, rel=0.02)
    state = Checkpoint.open(tmp_path / "narrow").training_state()
    weights = tensors(tmp_path / "narrow")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    for name, tensor in weights.items():
        assert state["method"][name].dtype == torch.float32
        assert torch.equal(state["method"][name].bfloat16(), tensor)
    # A rate at which no single update changes a bfloat16: together they do.
    tiny = {"train": {"train_iters": 30, "precision": "bfloat16"}, "optimizer": {"lr": 2e-5, "weight_decay": 0.0}}
    train(inputs, tmp_path / "tiny", **tiny)
    before, after = tensors(inputs / "base"), tensors(tmp_path / "tiny")
    moved = sum(int((after[name] != before[name].bfloat16()).sum()) for name in after)
    assert moved > 0.1 * sum(tensor.numel() for tensor in after.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_ends_in_the_same_bits(precision, inputs, tmp_path):
    options = {"precision": precision}
    train(inputs, tmp_path / "whole", train={"train_iters": 12, **options}, **CONSTANT)
    train(inputs, tmp_path / "parts", train={"train_iters": 6, **options}, **CONSTANT)
    resumed = train(inputs, tmp_path / "parts", train={"train_iters": 12, **options}, **CONSTANT)
    assert len(resumed.losses()) == 6
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_micro_batches_and_recomputation_only_divide_the_work(inputs, tmp_path):
    one = train(inputs, tmp_path / "one", train={"micro_batch_size": 4}).losses()
    four = train(inputs, tmp_path / "four", train={"micro_batch_size": 1}).losses()
    again = train(inputs, tmp_path / "again", train={"micro_batch_size": 1, "recompute_granularity": "full"}).losses()
    assert four == pytest.approx(one, rel=1e-5)
    assert again == four


def test_the_chain_from_packed_rows_to_transformers(inputs, tmp_path):
    done = run_step("sft/megatron_bridge", config(inputs, "sft"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the whole model: " in done.stdout
    record = read(tmp_path / "sft")
    assert (record.type, record.facts["method"], record.facts["finished"]) == ("checkpoint_megatron", "full", True)
    assert record.facts["trainable_parameters"] == record.facts["parameters"] == SHAPE.parameters
    assert record.facts["base_fingerprint"] == fingerprint(megatron_source(tmp_path / "sft").tensors)
    assert record.facts["trained_from"] == read(inputs / "base").facts["base_fingerprint"]

    done = run_step("convert/megatron_to_hf", {"megatron_path": "sft", "hf_path": "hf"}, tmp_path)
    assert done.returncode == 0, done.stderr
    transformers = pytest.importorskip("transformers", reason="extra parity")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(1, 30)
    decoder = random_decoder()
    for name, tensor in tensors(tmp_path / "sft").items():
        decoder.weights()[name].data.copy_(tensor)
    with torch.no_grad():
        expected = decoder(ids, [0, len(ids)])
        torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=0, atol=1e-4)
        assert (expected - random_decoder()(ids, [0, len(ids)])).abs().max() > 0.1

    # The last iteration by name is the same model; an earlier one is another, and is not held against its fingerprint.
    for folder, fits in (("iter_0000012", True), ("iter_0000006", False)):
        evaluated = {
            "base_megatron_path": f"sft/{folder}",
            "dataset": {"nano3_packed_sft_dir": str(inputs / "packed")},
            "output_dir": f"report-{folder}",
        }
        done = run_step("eval/perplexity", evaluated, tmp_path)
        assert done.returncode == 0, done.stderr
        loss = json.loads((tmp_path / f"report-{folder}" / "report.json").read_text())["figures"]["loss"]
        assert (loss == pytest.approx(record.facts["valid_loss_last"], rel=2e-6)) == fits


def test_an_adapter_is_trained_on_it(inputs, tmp_path):
    train(inputs, tmp_path / "sft")
    section = {"peft": {"type": "lora", "dim": 4, "alpha": 8}}
    base = {"checkpoint": {"pretrained_checkpoint": str(tmp_path / "sft"), "save": "lora", "save_interval": 6}}
    done = run_step("peft/megatron_bridge", config(inputs, "lora", **base) | section, tmp_path)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "lora").facts["base_fingerprint"] == read(tmp_path / "sft").facts["base_fingerprint"]


def test_another_steps_model_is_not_trained_into(inputs, tmp_path):
    shutil.copytree(inputs / "base", tmp_path / "other")
    before = sorted(path.name for path in (tmp_path / "other").rglob("*"))
    done = run_step("sft/megatron_bridge", config(inputs, "other"), tmp_path)
    assert done.returncode == 4
    assert "checkpoint.save: other holds a model that no run of this step has trained" in done.stderr
    assert sorted(path.name for path in (tmp_path / "other").rglob("*")) == before


def test_an_adapter_section_is_an_unknown_key(inputs, tmp_path):
    done = run_step("sft/megatron_bridge", config(inputs, "sft") | {"peft": {"type": "lora"}}, tmp_path)
    assert done.returncode == 3
    assert "peft" in done.stderr
