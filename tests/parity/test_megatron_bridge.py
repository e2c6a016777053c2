"""The hand-over to Megatron-Bridge against the genuine package, up to the call that starts its training.

Needs an interpreter that has megatron.bridge: this one, or the one STEPS_BRIDGE_PYTHON names (it wants other versions
of some packages than the rest of the tests). CONTRIBUTING.md tells how to make it; without it these tests are skipped.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.bridge import PYTHON

from steps.engine.checkpoint import megatron
from steps.engine.checkpoint.megatron import Checkpoint, unstacked

TESTS = Path(__file__).parents[1]


pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="megatron.bridge is not installed; STEPS_BRIDGE_PYTHON can name an interpreter that has it"
)

SEQ_LENGTH = 32
EOS = 2
#: [input_ids, loss_mask, seq_start_id] of packed rows: three documents, one document, and one of two tokens.
TRAIN = [
    ([5, 6, 7, EOS, 8, 9, EOS, 10, EOS], [0, 1, 1, 0, 1, 1, 0, 1, 0], [0, 4, 7]),
    (list(range(3, 3 + SEQ_LENGTH)), [0] * 10 + [1] * (SEQ_LENGTH - 11) + [0], [0]),
    ([11, EOS], [1, 0], [0]),
]
VALID = [([20, 21, EOS], [0, 1, 0], [0])]
RESOLVED: dict[str, Any] = {
    "engine": "megatron_bridge",
    "run": {"env": {"nodes": 2}},
    "recipe": {
        "_target_": "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_finetune_config",
        "seq_length": SEQ_LENGTH,
        "packed_sequence": True,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 4,
        "sequence_parallel": True,
    },
    "dataset": {"num_workers": 3, "dataset_kwargs": {"pad_to_max_length": True}},
    "train": {
        "train_iters": 7,
        "global_batch_size": 24,
        "micro_batch_size": 1,
        "eval_interval": 0,
        "eval_iters": 5,
        "log_interval": 3,
    },
    "optimizer": {
        "lr": 3e-4,
        "min_lr": 1e-5,
        "weight_decay": 0.02,
        "adam_beta1": 0.85,
        "adam_beta2": 0.9,
        "adam_eps": 1e-7,
        "clip_grad": 0.5,
    },
    "scheduler": {"lr_decay_style": "linear", "lr_warmup_iters": 2, "lr_decay_iters": 6},
    "peft": {
        "type": "lora",
        "dim": 16,
        "alpha": 48,
        "dropout": 0.25,
        "dropout_position": "post",
        "target_modules": ["linear_qkv", "*.layers.0.*.linear_proj"],
        "exclude_modules": [],
        "lora_A_init_method": "kaiming",
        "lora_B_init_method": "zero",
        "lora_dtype": "bfloat16",
        # Ours, without fields there: turned into what it has, or off.
        "use_rslora": True,
        "match_all_linear": False,
        "lora_plus_ratio": 1.0,
        "init_lora_weights": None,
        "calibration_rows": 4,
        "quantization": None,
    },
    "checkpoint": {"save_interval": 5, "load": None, "ckpt_step": None},
    "logger": {"tensorboard_dir": None, "wandb_project": "w", "wandb_exp_name": "e"},
    "rng": {"seed": 99},
    # Whatever else Megatron-Bridge has; the first four are what lets it validate without CUDA packages.
    "model": {
        "moe_token_dispatcher_type": "alltoall",
        "moe_flex_dispatcher_backend": None,
        "moe_permute_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": "bfloat16",
    },
    "ddp": {"grad_reduce_in_fp32": False},
    "dist": {"distributed_timeout_minutes": 33},
    "mixed_precision": {"grad_reduce_in_fp32": False},
    "rerun_state_machine": {"check_for_nan_in_loss": False},
    "profiling": {"use_pytorch_profiler": True},
}
#: Adapters on the small model of the probe: 2 layers, hidden 32, 4 heads in 2 groups of 8 channels, ffn 48.
ADAPTERS: list[dict[str, Any]] = [
    {"type": "lora", "dim": 4, "alpha": 8},
    {"type": "lora", "dim": 4, "alpha": 8, "target_modules": ["*.layers.0.*.linear_qkv"]},
    {"type": "dora", "dim": 4, "alpha": 8, "target_modules": ["linear_qkv", "linear_proj"]},
    {"type": "canonical_lora", "dim": 4, "alpha": 8},
    {"type": "lora", "dim": 4, "alpha": 8, "match_all_linear": True, "target_modules": ["linear_qkv"]},
    {"type": "lora", "dim": 4, "alpha": 8, "exclude_modules": ["linear_fc1", "down_proj"]},
    {
        "type": "canonical_lora",
        "dim": 4,
        "alpha": 8,
        "target_modules": ["q_proj", "k_proj", "linear_v", "*.mlp.down_proj"],
    },
]


def changed(**sections: Any) -> dict[str, Any]:
    """RESOLVED with keys added."""
    made = copy.deepcopy(RESOLVED)
    for section, values in sections.items():
        made.setdefault(section, {}).update(values)
    return made


def write_split(root: Path, split: str, rows: list[Any]) -> None:
    """A split as DESIGN says: int32, uint8, int32 lists, zstd; one row in a file, to meet several files."""
    folder = root / "splits" / split
    folder.mkdir(parents=True)
    for number, (ids, mask, starts) in enumerate(rows):
        columns = {
            "input_ids": pa.array([ids], pa.list_(pa.int32())),
            "loss_mask": pa.array([mask], pa.list_(pa.uint8())),
            "seq_start_id": pa.array([starts], pa.list_(pa.int32())),
        }
        pq.write_table(pa.table(columns), folder / f"{number:05d}.parquet", compression="zstd", row_group_size=64)


def write_base(root: Path, **shape: int) -> None:
    """A base checkpoint as far as it is looked at here: its shape and its tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = root / "iter_0000000"
    (folder / "tokenizer").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("0")
    (folder / ".metadata").touch()
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": shape}))
    words = {"<unk>": 0, "<s>": 1, "</s>": EOS, **{f"w{index}": index for index in range(3, 64)}}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer" / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(kind))


def write_adapter(folder: Path, shapes: dict[str, list[int]], section: dict[str, Any]) -> Path:
    """A checkpoint_lora of ours with random values of these shapes; returns its iter folder."""
    generator = torch.Generator().manual_seed(0)
    layers = [0] if "*.layers.0.*.linear_qkv" in section.get("target_modules", ()) else [0, 1]
    tensors = {
        unstacked(key, layer): torch.randn(shape[1:], generator=generator)
        for key, shape in shapes.items()
        for layer in layers
    }
    return megatron.write(folder, tensors, num_layers=2, run_config={})


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What genuine Megatron-Bridge made of RESOLVED, ADAPTERS and the broken configurations, in one process."""
    assert PYTHON is not None
    root = tmp_path_factory.mktemp("bridge")
    write_split(root / "packed", "train", TRAIN)
    write_split(root / "packed", "valid", VALID)
    write_split(root / "packed", "test", VALID)
    write_base(root / "base", num_layers=52, hidden_size=2688)
    for resolved in (RESOLVED, *BROKEN.values()):
        resolved["dataset"]["nano3_packed_sft_dir"] = str(root / "packed")
        resolved["checkpoint"] |= {"pretrained_checkpoint": str(root / "base"), "save": str(root / "out" / "lora")}
    job = {
        "resolved": RESOLVED,
        "packed_dir": str(root / "packed"),
        "base": str(root / "base"),
        "whole": {**{name: values for name, values in RESOLVED.items() if name != "peft"}, "optimizer": {"lr": 2e-6}},
        "broken": list(BROKEN.values()),
        "adapters": [
            {
                "peft": section,
                "checkpoint": str(write_adapter(root / f"adapter{index}" / "ours", SHAPES[index], section)),
            }
            for index, section in enumerate(ADAPTERS)
        ],
    }
    (root / "job.json").write_text(json.dumps(job))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [PYTHON, "-m", "support.bridge_probe", str(root / "job.json"), str(root / "result.json")],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {"root": root, **json.loads((root / "result.json").read_text())}


BROKEN = {
    "everything": changed(
        optimizer={"learning_rate": 1e-4, "use_distributed_optimizer": "perhaps"},
        train={"train_iters": "many", "micro_batch_size": 2},
        peft={"lora_A_init_method": "gaussian", "dropuot": 0.1},
        model={"params_dtype": "bfloat17"},
        dataset={"packed_sequence_specs": {"packed_train_data_path": "elsewhere.parquet"}},
    ),
    "unknown section": changed(optimiser={"lr": 1.0}),
    "method": changed(peft={"type": "vblora"}),
    "only torch": changed(
        peft={
            "lora_plus_ratio": 16.0,
            "init_lora_weights": "pissa",
            "quantization": {"type": "nf4"},
            "lora_A_init_method": "uniform",
        }
    ),
    "canonical excludes": changed(
        peft={
            "type": "canonical_lora",
            "lora_dtype": None,
            "use_rslora": False,
            "target_modules": [],
            "exclude_modules": ["linear_q"],
        }
    ),
    "only lora": changed(peft={"type": "canonical_lora", "target_modules": ["q_proj"], "use_rslora": False}),
    "class refuses": changed(peft={"type": "dora", "lora_dtype": None}),
    "length": changed(model={"seq_length": 64}),
    "shape": changed(model={"hidden_size": 576}),
    "recipe": changed(recipe={"_target_": "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nan_config"}),
    "documents": changed(recipe={"context_parallel_size": 2}),
}


def refused(probe: dict[str, Any], name: str) -> dict[str, dict[str, str]]:
    """The problems of one broken configuration, by where they sit."""
    outcome = probe["refused"][list(BROKEN).index(name)]
    assert outcome["kind"] == "ConfigError"
    return {problem["where"]: problem for problem in outcome["problems"]}


def test_genuine_finetune_is_called_with_the_container_and_the_forward_step(probe: dict[str, Any]) -> None:
    assert probe["called_with"] == {"config": "ConfigContainer"}
    assert probe["forward_step"] == "megatron.bridge.training.gpt_step.forward_step"


@pytest.mark.parametrize(
    "section", ["optimizer", "scheduler", "rng", "ddp", "dist", "rerun_state_machine", "profiling"]
)
def test_every_key_of_a_section_is_in_the_container(probe: dict[str, Any], section: str) -> None:
    received = probe["container"][section]
    assert {key: received[key] for key in RESOLVED[section]} == RESOLVED[section]


def test_the_recipe_section_shapes_the_model(probe: dict[str, Any]) -> None:
    model = probe["container"]["model"]
    said = {key: value for key, value in RESOLVED["recipe"].items() if key not in ("_target_", "packed_sequence")}
    assert {key: model[key] for key in said} == said
    own = {key: value for key, value in RESOLVED["model"].items() if key != "params_dtype"}
    assert {key: model[key] for key in own} == own
    assert model["params_dtype"] == "torch.bfloat16"


def test_the_other_spelling_of_the_recipe_is_found_and_told(probe: dict[str, Any]) -> None:
    assert probe["container"]["model"]["class"] == "Nemotron3NanoProvider"
    assert any("nemotron_3_nano_peft_config is used" in line for line in probe["log"])


def test_training_keys_go_where_the_release_keeps_them(probe: dict[str, Any]) -> None:
    train, container = RESOLVED["train"], probe["container"]
    received = container["train"] | container.get("validation", {})
    same = ("train_iters", "global_batch_size", "micro_batch_size", "eval_iters")
    assert {key: received[key] for key in same} == {key: train[key] for key in same}
    assert container["logger"]["log_interval"] == train["log_interval"]
    # 0 means "only at the end" here and divides by zero there.
    assert received["eval_interval"] > train["train_iters"]


def test_weight_decay_reaches_the_scheduler_that_sets_it(probe: dict[str, Any]) -> None:
    scheduler = probe["container"]["scheduler"]
    assert (scheduler["start_weight_decay"], scheduler["end_weight_decay"]) == (0.02, 0.02)


def test_a_preset_of_mixed_precision_takes_single_keys(probe: dict[str, Any]) -> None:
    received = probe["container"]["mixed_precision"]
    assert received["grad_reduce_in_fp32"] is False
    assert received["bf16"] is True  # what the preset says and we do not touch


def test_the_adapter_is_ours_and_complete(probe: dict[str, Any]) -> None:
    received = probe["container"]["peft"]
    ours = (
        "use_rslora",
        "match_all_linear",
        "lora_plus_ratio",
        "init_lora_weights",
        "calibration_rows",
        "quantization",
    )
    expected = {key: value for key, value in RESOLVED["peft"].items() if key not in ("type", "lora_dtype", *ours)}
    expected["alpha"] = 48 * 4  # rsLoRA's scale, alpha / sqrt(16), as LoRA's alpha / 16
    assert received["class"] == "LoRA"
    assert not set(ours) & set(received)
    assert "peft.use_rslora: alpha / sqrt(dim) is handed over as alpha 192" in probe["log"]
    assert {key: received[key] for key in expected} == expected
    assert received["lora_dtype"] == "torch.bfloat16"


def test_checkpoints_are_ours_and_never_the_recipe_s(probe: dict[str, Any]) -> None:
    received, save = probe["container"]["checkpoint"], str(probe["root"] / "out" / "lora")
    assert received["pretrained_checkpoint"] == str(probe["root"] / "base")
    assert (received["save"], received["load"], received["save_interval"]) == (save, save, 5)
    assert probe["container"]["logger"]["tensorboard_dir"] is None


def test_the_tokenizer_is_the_base_s(probe: dict[str, Any]) -> None:
    assert probe["container"]["tokenizer"]["tokenizer_model"] == str(probe["root"] / "base/iter_0000000/tokenizer")
    assert probe["splits"]["eos"] == EOS


def test_the_dataset_points_at_our_rows(probe: dict[str, Any]) -> None:
    dataset = probe["container"]["dataset"]
    specs = dataset.get("offline_packing_specs") or dataset["packed_sequence_specs"]
    packed, handed = probe["root"] / "packed" / "splits", probe["root"] / "out" / "lora.bridge_data"
    train, valid = (
        (packed / "train", packed / "valid") if probe["reads_parquet"] else (handed / "train.npy", handed / "valid.npy")
    )
    assert (specs["packed_train_data_path"], specs["packed_val_data_path"]) == (str(train), str(valid))
    assert specs["packed_sequence_size"] == dataset["seq_length"] == SEQ_LENGTH
    assert (dataset["num_workers"], dataset["seed"]) == (3, 99)
    assert (dataset["do_validation"], dataset["do_test"]) == (True, False)
    assert dataset["dataset_kwargs"] == {"pad_to_max_length": True, "answer_only_loss": True}


@pytest.mark.parametrize(("split", "rows"), [("train", TRAIN), ("valid", VALID)])
def test_megatron_bridge_reads_and_collates_our_rows(probe: dict[str, Any], split: str, rows: list[Any]) -> None:
    batch = probe["splits"][split]
    assert batch["class"] == ("GPTSFTPackedParquetDataset" if probe["reads_parquet"] else "GPTSFTPackedDataset")
    assert len(batch["tokens"]) == len(rows)
    for index, (ids, mask, starts) in enumerate(rows):
        spans = list(zip(starts, [*starts[1:], len(ids)], strict=True))
        tokens = [token for start, end in spans for token in ids[start : end - 1]]
        labels = [token for start, end in spans for token in ids[start + 1 : end]]
        trained = [bit for start, end in spans for bit in mask[start : end - 1]]
        positions = [position for start, end in spans for position in range(end - start - 1)]
        fill = SEQ_LENGTH - len(tokens)
        assert batch["tokens"][index] == tokens + [EOS] * fill
        assert batch["labels"][index] == labels + [EOS] * fill
        assert batch["loss_mask"][index] == trained + [0] * fill
        assert batch["position_ids"][index] == positions + [0] * fill
        ends = [sum(end - start - 1 for start, end in spans[: count + 1]) for count in range(len(spans))]
        boundaries = [0, *ends] + ([SEQ_LENGTH] if fill else [])
        assert batch["cu_seqlens"][index][: len(boundaries)] == boundaries
        assert set(batch["cu_seqlens"][index][len(boundaries) :]) <= {-1}


def test_megatron_bridge_validates_the_container(probe: dict[str, Any]) -> None:
    assert probe["validated"] == ""


def test_all_weights_are_trained_where_there_is_no_adapter(probe: dict[str, Any]) -> None:
    """The recipe is one for both, and trains LoRA unless it is told so."""
    assert probe["whole"] == {"peft": None, "lr": 2e-6, "validated": ""}


def test_facts_are_read_from_its_run_config(probe: dict[str, Any]) -> None:
    expected = {key: RESOLVED["peft"][key] for key in ("dim", "target_modules", "exclude_modules")}
    expected["alpha"] = 48 * 4  # rsLoRA's scale, alpha / sqrt(16), as LoRA's alpha / 16
    assert probe["run_config_facts"] == {"method": "lora", **expected, "iteration": 5, "finished": False}


def linear(name: str, rank: int, inside: int, outside: int) -> dict[str, list[int]]:
    """The two tensors of one adapted linear, stacked over the 2 layers."""
    key = f"decoder.layers.{name}"
    return {f"{key}.linear_in.weight": [2, rank, inside], f"{key}.linear_out.weight": [2, outside, rank]}


QKV, PROJ = ("self_attention.linear_qkv.adapter", 32, 64), ("self_attention.linear_proj.adapter", 32, 32)
FC1, FC2 = ("mlp.linear_fc1.adapter", 32, 96), ("mlp.linear_fc2.adapter", 48, 32)
SHAPES = [
    {
        key: shape
        for name, inside, outside in (QKV, PROJ, FC1, FC2)
        for key, shape in linear(name, 4, inside, outside).items()
    },
    linear(QKV[0], 4, 32, 64),  # one of two layers adapted: still [2, …]
    {
        **linear(QKV[0], 4, 32, 64),
        **linear(PROJ[0], 4, 32, 32),
        f"decoder.layers.{QKV[0]}.weight_magnitude": [2, 64],
        f"decoder.layers.{PROJ[0]}.weight_magnitude": [2, 32],
    },
    {
        **linear(f"{QKV[0]}.adapter_q", 4, 32, 32),
        **linear(f"{QKV[0]}.adapter_k", 4, 32, 16),
        **linear(f"{QKV[0]}.adapter_v", 4, 32, 16),
        **linear(PROJ[0], 4, 32, 32),
        **linear(f"{FC1[0]}.adapter_up", 4, 32, 48),
        **linear(f"{FC1[0]}.adapter_gate", 4, 32, 48),
        **linear(FC2[0], 4, 48, 32),
    },
]
SHAPES += [
    SHAPES[0],  # every linear of the layers, and not the output layer
    {**linear(QKV[0], 4, 32, 64), **linear(PROJ[0], 4, 32, 32)},
    {
        **linear(f"{QKV[0]}.adapter_q", 4, 32, 32),
        **linear(f"{QKV[0]}.adapter_k", 4, 32, 16),
        **linear(f"{QKV[0]}.adapter_v", 4, 32, 16),
        **linear(FC2[0], 4, 48, 32),
    },
]
NAMES = ["lora", "lora on one layer", "dora", "canonical_lora", "every linear", "excluding", "Hugging Face's names"]


@pytest.mark.parametrize("index", range(len(ADAPTERS)), ids=NAMES)
def test_genuine_adapters_have_the_names_and_shapes_of_checkpoint_lora(probe: dict[str, Any], index: int) -> None:
    made = probe["adapters"][index]
    assert made["class"] == {"lora": "LoRA", "dora": "DoRA", "canonical_lora": "CanonicalLoRA"}[ADAPTERS[index]["type"]]
    assert made["shapes"] == SHAPES[index]
    assert all(key.endswith("._extra_state") for key in made["others"])


@pytest.mark.parametrize("index", [0, *range(2, len(ADAPTERS))], ids=[NAMES[0], *NAMES[2:]])
def test_adapters_of_either_engine_are_read_by_the_other(probe: dict[str, Any], index: int) -> None:
    folder = probe["root"] / f"adapter{index}"
    assert all("._extra_state" in key for key in probe["adapters"][index]["unmatched"])
    for checkpoint, theirs in (("ours", "loaded.pt"), ("saved", "saved.pt")):
        read = {name: tensor.load() for name, tensor in Checkpoint.open(folder / checkpoint).tensors.items()}
        expected = torch.load(folder / theirs)
        assert set(read) == set(expected)
        assert all(torch.equal(read[name], expected[name]) for name in read)


def test_why_an_adapter_on_some_layers_of_a_plain_decoder_is_refused(probe: dict[str, Any]) -> None:
    """Megatron-Core's own check, which it makes on every load and on the first save."""
    refused = [name for name, made in zip(NAMES, probe["adapters"], strict=True) if made["integrity"]]
    assert refused == ["lora on one layer"]
    assert "Invalid access pattern" in probe["adapters"][1]["integrity"]


def test_all_that_is_wrong_is_told_at_once(probe: dict[str, Any]) -> None:
    problems = refused(probe, "everything")
    assert set(problems) == {
        "optimizer.learning_rate",
        "optimizer.use_distributed_optimizer",
        "train.train_iters",
        "train.micro_batch_size",
        "peft.lora_A_init_method",
        "peft.dropuot",
        "model.params_dtype",
        "dataset.packed_sequence_specs.packed_train_data_path",
    }
    assert problems["peft.dropuot"]["hint"] == "Did you mean dropout?"
    assert problems["train.train_iters"]["allowed"].startswith("an integer")
    assert problems["peft.lora_A_init_method"]["allowed"] == "xavier, normal, kaiming, zero"


def test_refusals_name_the_key(probe: dict[str, Any]) -> None:
    assert refused(probe, "unknown section")["optimiser"]["hint"] == "Did you mean optimizer?"
    assert refused(probe, "method")["peft.type"]["allowed"] == "canonical_lora, dora, lora"
    found = refused(probe, "only torch")
    assert set(found) == {
        "peft.lora_plus_ratio", "peft.init_lora_weights", "peft.quantization", "peft.lora_A_init_method",
    }  # fmt: skip
    assert found["peft.lora_plus_ratio"]["what"] == "Megatron-Bridge's LoRA has no such setting, and it is 16.0"
    half = refused(probe, "only lora")
    assert set(half) == {"peft.lora_dtype", "peft.target_modules"}
    assert half["peft.target_modules"]["what"].endswith("on 'linear_q' without one on linear_k, linear_v")
    assert "canonical LoRA cannot exclude" in refused(probe, "canonical excludes")["peft.exclude_modules"]["what"]
    assert "pre-adapter dropout" in refused(probe, "class refuses")["peft"]["what"]
    assert refused(probe, "length")["recipe.seq_length"]["name"] == "seq_length_mismatch"
    assert "hidden_size 576 (base: 2688)" in refused(probe, "shape")["recipe._target_"]["what"]
    assert refused(probe, "recipe")["recipe._target_"]["hint"].startswith("Did you mean nemotron_3_nano_")
    assert refused(probe, "documents")["recipe.context_parallel_size"]["hint"] == "Pack again with pad_multiple=4."
