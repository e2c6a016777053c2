"""Whole small runs in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.packed import SHAPE, config, random_decoder, random_rows, write_base, write_packed

from steps.artifacts.opening import open_artifact
from steps.artifacts.record import Record, read
from steps.config.validate import validate
from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.progress import Silent
from steps.engine.train.finetune import finetune
from steps.errors import StepFailed, StepsError
from steps.peft.megatron_bridge.schema import BASE, DATA, Config


class Recording(Silent):
    def __init__(self):
        self.rows, self.lines = [], []

    def metrics(self, values):
        self.rows.append(dict(values))

    def log(self, message):
        self.lines.append(message)

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows if "loss" in row]


@pytest.fixture
def root(tmp_path):
    write_base(tmp_path / "base")
    write_packed(tmp_path / "packed", random_rows(20), random_rows(6, seed=9))
    return tmp_path


def train(root: Path, **sections) -> Recording:
    data, progress = config(root, **sections), Recording()
    typed, _ = validate(Config, data)
    inputs = {
        DATA: open_artifact(str(root / "packed"), "packed_parquet", DATA),
        BASE: open_artifact(str(root / "base"), "checkpoint_megatron", BASE),
    }
    finetune(typed.plan(inputs), Record(type="checkpoint_lora"), progress)
    return progress


def adapter(root: Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in Checkpoint.open(root / "lora", iteration).tensors.items()}


def test_the_loss_falls_and_the_record_tells_the_run(root):
    progress = train(root, train={"train_iters": 30})
    losses = progress.losses()
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    record = read(root / "lora")
    assert record.facts["iteration"] == 30
    assert record.facts["finished"] is True
    assert (record.facts["loss_first"], record.facts["loss_last"]) == (losses[0], losses[-1])
    assert record.facts["valid_loss_last"] < record.facts["valid_loss_first"]
    assert record.facts["trainable_parameters"] == sum(tensor.numel() for tensor in adapter(root).values())
    assert record.digest
    assert record.files
    assert (record.facts["method"], record.facts["dim"], record.facts["alpha"]) == ("lora", 4, 8)
    assert record.facts["base_fingerprint"] == "base"


def test_a_quantized_base_is_told_of_and_recorded(root):
    quantization = {"type": "nf4", "block_size": 32}
    lines = train(root, peft={"quantization": quantization}).lines
    # 4 bits a value, one byte for each 32 of them, and on so small a model 12 bytes a linear that count.
    assert any(line.startswith("base held in nf4: 0.0 MB, 0.27 of its bf16 size") for line in lines), lines
    facts = read(root / "lora").facts
    assert facts["peft"]["quantization"] == {
        "type": "nf4", "block_size": 32, "double_quant": True, "compute_dtype": None,
    }  # fmt: skip
    assert not [line for line in train(root, checkpoint={"save": str(root / "plain")}).lines if "held in" in line]


def test_a_run_does_not_go_on_with_another_base(root):
    train(root)
    with pytest.raises(StepsError, match="peft.quantization"):
        train(root, train={"train_iters": 14}, peft={"quantization": {"type": "nf4"}})


def test_offload_does_nothing_on_a_cpu_and_says_so(root):
    plain = train(root, checkpoint={"save": str(root / "plain")})
    progress = train(root, optimizer={"offload": True})
    assert any("optimizer.offload has no effect" in line for line in progress.lines)
    assert not any("offload" in line for line in plain.lines)
    assert progress.losses() == plain.losses()
    # It decides where work is done, not which: the same run goes on without it.
    assert len(train(root, train={"train_iters": 13}).losses()) == 1


def test_reported_rows(root):
    row = next(row for row in train(root).rows if row["iteration"] == 2 and "loss" in row)
    assert set(row) == {
        "iteration", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_second", "seconds",
    }  # fmt: skip
    assert row["lr"] == 0.005
    assert 0 < row["trained_tokens"] < row["tokens"] <= 4 * 48


def test_the_base_on_disk_and_in_memory_stays_bit_equal(root, monkeypatch):
    from steps.engine.train import finetune as module

    seen = {}
    attach = module.adapters.attach

    def watch(decoder, *rest):
        seen["decoder"] = decoder
        return attach(decoder, *rest)

    monkeypatch.setattr(module.adapters, "attach", watch)
    train(root)
    before = dict(random_decoder().named_parameters())
    after = {name: value for name, value in seen["decoder"].named_parameters() if "adapter" not in name.split(".")}
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) and after[name].grad is None for name in before)
    stored = Checkpoint.open(root / "base")
    assert all(torch.equal(before[name], stored.read(name)) for name in before)


def test_the_reported_loss_is_the_mean_over_all_trained_tokens_of_the_global_batch(root):
    """Held against plain PyTorch on each document alone."""
    reported = train(root, train={"train_iters": 3}).losses()[0]
    from steps.engine.data.batches import Order
    from steps.engine.data.shards import PackedSplit

    decoder, split, order = random_decoder(), PackedSplit(root / "packed", "train"), Order(20, 7)
    losses = []
    for position in range(4):
        pack = split[order[position]]
        for start, end in zip(pack.starts, [*pack.starts[1:], len(pack.input_ids)], strict=True):
            ids = torch.from_numpy(pack.input_ids[start:end].astype("int64"))
            logits = decoder(ids, [0, len(ids)])
            each = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            losses.append(each[torch.from_numpy(pack.loss_mask[start : end - 1].astype(bool))])
    assert reported == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


def test_micro_batches_only_split_the_work(root):
    """float32 sums in another order; Adam's first steps divide tiny gradients by themselves, hence 1e-4."""
    curves, weights = [], []
    for size in (1, 2, 4):
        curves.append(
            train(root, train={"micro_batch_size": size}, checkpoint={"save": str(root / f"lora{size}")}).losses()
        )
        weights.append({name: tensor.load() for name, tensor in Checkpoint.open(root / f"lora{size}").tensors.items()})
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)
    for other in weights[1:]:
        assert all(torch.allclose(weights[0][name], value, rtol=0, atol=1e-4) for name, value in other.items())


def test_recomputation_changes_no_bit_also_with_dropout(root):
    train(root, peft={"dropout": 0.3})
    plain = adapter(root)
    train(root, peft={"dropout": 0.3}, train={"recompute_granularity": "full"}, checkpoint={"save": str(root / "r")})
    again = {name: tensor.load() for name, tensor in Checkpoint.open(root / "r").tensors.items()}
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_adapters_on_some_layers_only(root):
    train(root, peft={"target_modules": ["*.layers.1.*.linear_qkv"]})
    linear = "decoder.layers.1.self_attention.linear_qkv.adapter."
    assert set(adapter(root)) == {f"{linear}linear_in.weight", f"{linear}linear_out.weight"}
    key = "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"
    assert Checkpoint.open(root / "lora").shape(key) == (2, 4, 32)


def test_the_checkpoint_tells_how_to_merge_it_and_megatron_bridge_how_to_build_it(root):
    from steps.engine.adapters import base
    from steps.engine.checkpoint import merge

    train(root, peft={"lora_dtype": "float32", "dropout": 0.1}, train={"train_iters": 3})
    section = Checkpoint.open(root / "lora").run_config["peft"]
    assert section["_target_"] == "megatron.bridge.peft.lora.LoRA"
    assert section["lora_dtype"] == {"_target_": "torch.float32", "_call_": False}
    assert "type" not in section
    read_back = base.create(merge.open_adapter(root / "lora").section, SHAPE).section
    assert (read_back.type, read_back.dim, read_back.alpha, read_back.dropout) == ("lora", 4, 8, 0.1)
    assert read_back.lora_dtype == "float32"


def test_bfloat16_follows_float32(root):
    exact = train(root, train={"precision": "float32"}, checkpoint={"save": str(root / "a")}).losses()
    fast = train(root, train={"precision": "bfloat16"}, checkpoint={"save": str(root / "b")}).losses()
    assert fast != exact
    assert fast == pytest.approx(exact, rel=0.02)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_save(root):
    from steps.engine.train import loss

    calls, original = 0, loss.cross_entropy_sum

    def explode(*arguments):
        nonlocal calls
        calls += torch.is_grad_enabled()
        loss = original(*arguments)
        return loss * float("nan") if calls == 9 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "cross_entropy_sum", explode)
        with pytest.raises(StepFailed, match="iteration 5: the loss is nan") as caught:
            train(root)
    assert caught.value.name == "non_finite_loss"
    assert read(root / "lora").facts["iteration"] == 3
    train(root)
    undisturbed = adapter(root)
    train(root, checkpoint={"save": str(root / "whole")})
    whole = {name: tensor.load() for name, tensor in Checkpoint.open(root / "whole").tensors.items()}
    assert all(torch.equal(undisturbed[name], whole[name]) for name in whole)


def test_a_learning_rate_that_is_far_too_large_is_noticed_for_real(root):
    with pytest.raises(StepFailed, match=r"iteration \d+: the (loss|gradient norm) is (nan|inf)"):
        train(root, optimizer={"lr": 1e25, "clip_grad": 0.0}, scheduler={"lr_warmup_iters": 0})


def test_rows_without_a_trained_token_stop_the_run(root):
    rows = [{**row, "loss_mask": [0] * len(row["loss_mask"])} for row in random_rows(8)]
    write_packed(root / "packed", rows)
    with pytest.raises(StepFailed, match="iteration 1: none of the 4 packed rows") as caught:
        train(root)
    assert caught.value.name == "no_trained_tokens"


def test_tokens_that_the_base_does_not_know_stop_the_run(root):
    rows = random_rows(4)
    rows[2]["input_ids"][5] = 61
    write_packed(root / "packed", rows)
    with pytest.raises(StepFailed, match="token 61, but the base model knows 61 tokens") as caught:
        train(root)
    assert caught.value.name == "tokenizer_mismatch"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"peft": {"dim": 8}}, "peft.dim: is 8, but .* was trained with 4"),
        ({"peft": {"target_modules": ["linear_qkv"]}}, "peft.target_modules"),
        ({"optimizer": {"lr": 0.02}}, r"optimizer.lr: is 0\.02"),
        ({"train": {"global_batch_size": 8}}, "train.global_batch_size"),
        ({"rng": {"seed": 8}}, "rng.seed"),
    ],
)
def test_a_place_that_holds_another_run_is_refused_by_name(root, change, where):
    train(root, train={"train_iters": 3})
    kept = adapter(root)
    with pytest.raises(StepsError, match=where) as caught:
        train(root, **change)
    assert caught.value.name == "run_mismatch"
    assert all(torch.equal(kept[name], value) for name, value in adapter(root).items())


def test_another_base_and_other_data_are_other_runs(root):
    train(root)
    write_base(root / "base", seed=1, fingerprint="other")
    with pytest.raises(StepsError, match="checkpoint.pretrained_checkpoint: is not what .* was trained with"):
        train(root)
    write_base(root / "base")
    write_packed(root / "packed", random_rows(20, seed=2), random_rows(6, seed=9))
    with pytest.raises(StepsError, match="dataset.nano3_packed_sft_dir: is not what"):
        train(root)


def test_a_finished_run_has_nothing_to_do_and_is_not_touched(root):
    train(root)
    before = (root / "lora" / "artifact.json").read_bytes()
    progress = train(root)
    assert progress.rows == []
    assert "nothing to do" in progress.lines[-1]
    assert (root / "lora" / "artifact.json").read_bytes() == before


def test_a_longer_run_goes_on(root):
    constant = {"scheduler": {"lr_decay_style": "constant"}}
    train(root, **constant, train={"train_iters": 7})
    progress = train(root, **constant)
    assert [row["iteration"] for row in progress.rows if "loss" in row] == [8, 9, 10, 11, 12]
    whole = train(root, **constant, checkpoint={"save": str(root / "whole")})
    assert whole.losses()[7:] == progress.losses()
    with pytest.raises(StepsError, match="train.train_iters: is 5, but the run in .* has come to iteration 12"):
        train(root, **constant, train={"train_iters": 5})


def test_ckpt_step_goes_back_and_comes_to_the_same_bits(root):
    train(root)
    first = adapter(root)
    progress = train(root, checkpoint={"ckpt_step": 6})
    assert [row["iteration"] for row in progress.rows if "loss" in row] == list(range(7, 13))
    assert all(torch.equal(first[name], value) for name, value in adapter(root).items())
    with pytest.raises(StepsError, match="no iteration 5 is saved in .*Allowed: 3, 6, 9, 12"):
        train(root, checkpoint={"ckpt_step": 5})


def test_a_vocabulary_that_megatron_padded_trains_like_the_one_it_stands_for(root):
    from dataclasses import replace

    from steps.engine.checkpoint import megatron

    plain = train(root).losses()
    base = Checkpoint.open(root / "base")
    tensors = {name: tensor.load() for name, tensor in base.tensors.items()}
    padded = replace(SHAPE, vocab_size=64)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], torch.full((3, padded.hidden_size), 9.0)])
    megatron.write(root / "base", tensors, num_layers=2, run_config=base.run_config)
    (root / "base" / "artifact.json").unlink()
    again = train(root, checkpoint={"save": str(root / "padded")})
    assert Checkpoint.open(root / "base").tensors["embedding.word_embeddings.weight"].shape[0] == 64
    assert again.losses() == plain


def test_load_starts_from_another_directory(root):
    train(root)
    progress = train(root, checkpoint={"load": str(root / "lora"), "ckpt_step": 9, "save": str(root / "more")})
    assert [row["iteration"] for row in progress.rows if "loss" in row] == [10, 11, 12]
    more = {name: tensor.load() for name, tensor in Checkpoint.open(root / "more").tensors.items()}
    assert all(torch.equal(more[name], value) for name, value in adapter(root).items())
    with pytest.raises(StepsError, match="checkpoint.load: there is no checkpoint_lora"):
        train(root, checkpoint={"load": str(root / "nowhere"), "save": str(root / "other")})


def test_files_of_others_are_never_overwritten(root):
    (root / "lora").mkdir()
    (root / "lora" / "thesis.txt").write_text("mine")
    with pytest.raises(StepsError, match="was not made by steps"):
        train(root)
    assert (root / "lora" / "thesis.txt").read_text() == "mine"


def test_an_update_that_ruins_the_adapter_is_not_saved(root):
    with pytest.raises(StepFailed, match=r"iteration 1: the weights are not finite any more") as caught:
        train(
            root, train={"train_iters": 1}, optimizer={"lr": 1e36, "min_lr": 1e36, "weight_decay": 1e38},
            scheduler={"lr_warmup_iters": 0}, checkpoint={"save_interval": 1},
        )  # fmt: skip
    assert caught.value.name == "non_finite_loss"
    assert not (root / "lora" / "artifact.json").exists()
