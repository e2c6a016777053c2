"""Handing a configuration to Megatron-Bridge, without it: a small recipe and containers of the same make stand in.

What genuine Megatron-Bridge makes of it is in tests/parity/test_megatron_bridge.py.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support import packed

from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.fingerprint import fingerprint
from steps.engine.megatron_bridge import data, facts, missing_packages
from steps.engine.megatron_bridge.compose import compose
from steps.engine.megatron_bridge.findings import Findings
from steps.engine.megatron_bridge.recipe import accepts
from steps.engine.megatron_bridge.release import Release
from steps.engine.megatron_bridge.values import Misfit, assign, fit
from steps.engine.progress import SILENT
from steps.errors import ConfigError, StepFailed

RECIPES = "recipes_of_a_small_bridge"


class Backend(enum.Enum):
    flash = 1
    fused = 2


@dataclasses.dataclass
class Model:
    seq_length: int = 2048
    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1
    hidden_size: int = 64
    num_layers: int = 2
    hybrid_override_pattern: str | None = None
    vocab_size: int | None = None
    recompute_granularity: str | None = "selective"
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    params_dtype: torch.dtype = torch.float32
    attention_backend: Backend = Backend.fused
    cuda_graph_scope: list[Backend] = "full"  # type: ignore[assignment]  # as real recipes do
    activation: Callable[[int], int] = abs


@dataclasses.dataclass
class Train:
    train_iters: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    eval_interval: int | None = 1000
    eval_iters: int = 100


@dataclasses.dataclass
class NewTrain:
    train_iters: int | None = None
    micro_batch_size: int = 1


@dataclasses.dataclass
class Validation:
    eval_interval: int = 1000
    eval_iters: int = 100


@dataclasses.dataclass
class Optimizer:
    lr: float | None = None
    weight_decay: float = 0.1
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 0.0


@dataclasses.dataclass
class Scheduler:
    lr_decay_style: Literal["linear", "cosine"] = "linear"
    start_weight_decay: float | None = 0.1
    end_weight_decay: float | None = 0.1


@dataclasses.dataclass
class Checkpoint:
    save: str | None = "nemo_experiments"
    load: str | None = "nemo_experiments"
    pretrained_checkpoint: str | None = None
    load_optim: bool = True
    load_rng: bool = True


@dataclasses.dataclass
class Logger:
    log_interval: int = 100
    tensorboard_dir: str | None = "nemo_experiments/tb"


@dataclasses.dataclass
class Rng:
    seed: int = 1


@dataclasses.dataclass
class Overlap:
    tp_comm_overlap: bool = False


@dataclasses.dataclass
class LoRA:
    target_modules: list[str] = dataclasses.field(default_factory=lambda: ["linear_qkv"])
    exclude_modules: list[str] = dataclasses.field(default_factory=list)
    dim: int = 32
    alpha: int = 32
    lora_A_init_method: str = "xavier"
    lora_dtype: torch.dtype = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        assert self.dim < 1000, "dim is too large"


@dataclasses.dataclass
class Specs:
    packed_sequence_size: int = -1
    packed_train_data_path: Any = None
    packed_val_data_path: Any = None
    packed_metadata_path: Any = None
    pad_seq_to_mult: int = 1


@dataclasses.dataclass(kw_only=True)
class LocalData:
    seq_length: int
    dataset_root: str | None = None
    num_workers: int = 8
    seed: int = 5678
    packed_sequence_specs: Specs | None = None
    dataset_kwargs: dict[str, Any] | None = None
    do_validation: bool = True
    do_test: bool = True


@dataclasses.dataclass(kw_only=True)
class NewLocalData(LocalData):
    """As later releases name it."""

    packed_sequence_specs: None = dataclasses.field(init=False, default=None)
    offline_packing_specs: Specs | None = None
    enable_offline_packing: bool = False


@dataclasses.dataclass(kw_only=True)
class HubData(LocalData):
    dataset_name: str = "squad"


@dataclasses.dataclass
class Container:
    model: Model = dataclasses.field(default_factory=Model)
    train: Any = dataclasses.field(default_factory=Train)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    scheduler: Scheduler = dataclasses.field(default_factory=Scheduler)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    logger: Logger = dataclasses.field(default_factory=Logger)
    rng: Rng = dataclasses.field(default_factory=Rng)
    dataset: Any = dataclasses.field(
        default_factory=lambda: HubData(seq_length=2048, dataset_kwargs={"pad_to_max_length": True}, num_workers=1)
    )
    peft: Any = dataclasses.field(default_factory=lambda: LoRA(target_modules=["linear_qkv", "in_proj"], dim=8))
    comm_overlap: Overlap | None = None
    mixed_precision: str | None = "bf16_mixed"
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)


class Options(TypedDict, total=False):
    seq_length: int
    peft: str
    packed_sequence: bool


def small_peft_config(peft_scheme: str = "lora") -> Container:
    return Container(asked={"peft_scheme": peft_scheme})


def old_finetune_config(seq_length: int, peft: str | None = "lora", packed_sequence: bool = False) -> Container:
    return Container(asked={"seq_length": seq_length, "peft": peft, "packed_sequence": packed_sequence})


def whole_sft_config() -> Container:
    return Container(asked={"all": "weights"})


def new_config() -> Container:
    made = Container(train=NewTrain())
    made.validation = Validation()  # type: ignore[attr-defined]
    return made


def refusing_config(seq_length: int) -> Container:
    raise ValueError("no such length")


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`compose` on the stand-ins, with packed data and a base; keyword arguments are sections of the configuration."""
    module = types.ModuleType(RECIPES)
    for function in (small_peft_config, old_finetune_config, whole_sft_config, new_config, refusing_config):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, RECIPES, module)
    write_split(tmp_path / "packed", "train", [([1, 2, 3, 4, 5], [1, 1, 0, 1, 0], [0, 3])])
    write_split(tmp_path / "packed", "valid", [([1, 2, 3], [1, 1, 0], [0])])

    def run(
        *,
        reads_parquet: bool = True,
        dataset_class: type = LocalData,
        log: list[str] | None = None,
        adapts: bool = True,
        **given: Any,
    ) -> Container:
        sections = {
            "engine": "megatron_bridge",
            "run": {"env": {}},
            **given,
            "recipe": {"_target_": f"{RECIPES}.small_peft_config", "seq_length": 16, **given.get("recipe", {})},
            "checkpoint": {"save": str(tmp_path / "lora"), **given.get("checkpoint", {})},
            "train": {"micro_batch_size": 1, **(given.get("train") or {})},
        }
        release = Release("0", {"lora": LoRA}, dataset_class, Specs, reads_parquet)
        where = data.plan(tmp_path / "packed", tmp_path / "scratch", reads_parquet=reads_parquet)
        lines = [] if log is None else log
        return compose(  # type: ignore[no-any-return]
            sections, tmp_path / "packed", tmp_path / "base", release, where, lines.append, adapts=adapts
        )

    return run


def write_split(root: Path, split: str, rows: list[Any]) -> None:
    folder = root / "splits" / split
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        # Not the order that is asked for: columns are known by name.
        "seq_start_id": pa.array([row[2] for row in rows], pa.list_(pa.int32())),
        "loss_mask": pa.array([row[1] for row in rows], pa.list_(pa.uint8())),
        "input_ids": pa.array([row[0] for row in rows], pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(columns), folder / "00000.parquet", row_group_size=2)


def problems(run: Callable[[], Any]) -> dict[str, Any]:
    with pytest.raises(ConfigError) as caught:
        run()
    return {problem.where: problem for problem in caught.value.problems}


# --- the recipe function -------------------------------------------------------------------------------------------


def test_a_recipe_gets_what_it_takes_and_the_rest_is_set_on_its_model(bridge: Callable[..., Any]) -> None:
    log: list[str] = []
    made = bridge(recipe={"tensor_model_parallel_size": 4}, log=log)
    assert made.asked == {"peft_scheme": "lora"}
    assert (made.model.seq_length, made.model.tensor_model_parallel_size) == (16, 4)
    assert "small_peft_config takes no argument seq_length, tensor_model_parallel_size" in log[0]


def test_arguments_of_older_recipes(bridge: Callable[..., Any]) -> None:
    made = bridge(recipe={"_target_": f"{RECIPES}.old_finetune_config", "packed_sequence": True, "peft": "lora"})
    assert made.asked == {"seq_length": 16, "peft": "lora", "packed_sequence": True}


@pytest.mark.parametrize("asked", ["small_finetune_config", "old_peft_config"])
def test_either_spelling_finds_the_other_and_says_so(bridge: Callable[..., Any], asked: str) -> None:
    log: list[str] = []
    bridge(recipe={"_target_": f"{RECIPES}.{asked}"}, log=log)
    assert log[0].startswith(f"recipe._target_: this release has no {asked}; its ")


@pytest.mark.parametrize("name", ["old_finetune_config", "old_sft_config"])
def test_a_recipe_for_both_is_told_to_train_all_weights(bridge: Callable[..., Any], name: str) -> None:
    made = bridge(adapts=False, recipe={"_target_": f"{RECIPES}.{name}"})
    assert made.asked == {"seq_length": 16, "peft": None, "packed_sequence": True}
    assert made.peft is None


def test_a_recipe_for_all_weights_is_found_by_its_older_name(bridge: Callable[..., Any]) -> None:
    log: list[str] = []
    made = bridge(adapts=False, recipe={"_target_": f"{RECIPES}.whole_finetune_config"}, log=log)
    assert made.asked == {"all": "weights"}
    assert made.peft is None
    assert "its whole_sft_config is used" in log[0]


def test_an_adapter_in_the_recipe_of_all_weights_is_refused(bridge: Callable[..., Any]) -> None:
    target = f"{RECIPES}.old_finetune_config"
    found = problems(lambda: bridge(adapts=False, recipe={"_target_": target, "peft": "lora"}))
    assert found["recipe.peft"].what == "is 'lora', but all weights are trained"


def test_a_recipe_that_is_not_there_names_those_that_are(bridge: Callable[..., Any]) -> None:
    found = problems(lambda: bridge(recipe={"_target_": f"{RECIPES}.smal_config"}))["recipe._target_"]
    assert found.hint == "Did you mean small_peft_config?"
    assert found.name == "recipe_not_found"
    assert "no module" in problems(lambda: bridge(recipe={"_target_": "no_such.module.f"}))["recipe._target_"].what
    assert "no dotted path" in problems(lambda: bridge(recipe={"_target_": "f"}))["recipe._target_"].what


def test_a_recipe_s_own_refusal_is_the_user_s_error(bridge: Callable[..., Any]) -> None:
    found = problems(lambda: bridge(recipe={"_target_": f"{RECIPES}.refusing_config"}))
    assert "no such length" in found["recipe._target_"].what


def test_signatures() -> None:
    def plain(a: int, *, b: int = 0) -> None: ...
    def anything(**options: Any) -> None: ...

    assert accepts(plain) == {"a", "b"}
    assert accepts(anything) is None
    typing_extensions = pytest.importorskip("typing_extensions")
    spelled: Any = lambda **options: None  # noqa: E731
    spelled.__annotations__ = {"options": typing_extensions.Unpack[Options]}
    assert accepts(spelled) == set(Options.__annotations__)


# --- sections ------------------------------------------------------------------------------------------------------


def test_sections_are_set_by_name(bridge: Callable[..., Any]) -> None:
    made = bridge(
        train={"train_iters": 7, "global_batch_size": 4, "log_interval": 3},
        optimizer={"lr": 1},
        scheduler={"lr_decay_style": "cosine"},
        logger={"tensorboard_dir": None},
        rng={"seed": 3},
        model={"params_dtype": "bfloat16", "attention_backend": "flash"},
        comm_overlap={"tp_comm_overlap": True},
        mixed_precision="fp16_mixed",
    )
    assert (made.train.train_iters, made.train.global_batch_size, made.logger.log_interval) == (7, 4, 3)
    assert (made.optimizer.lr, type(made.optimizer.lr)) == (1.0, float)
    assert (made.scheduler.lr_decay_style, made.logger.tensorboard_dir, made.rng.seed) == ("cosine", None, 3)
    assert (made.model.params_dtype, made.model.attention_backend) == (torch.bfloat16, Backend.flash)
    assert made.comm_overlap == Overlap(tp_comm_overlap=True)
    assert made.mixed_precision == "fp16_mixed"


def test_what_a_release_keeps_elsewhere_follows(bridge: Callable[..., Any]) -> None:
    log: list[str] = []
    recipe = {"_target_": f"{RECIPES}.new_config"}
    made = bridge(recipe=recipe, train={"eval_interval": 5, "eval_iters": 6}, log=log)
    # `validation` is no declared field of the stand-in, but it is what the container carries.
    assert made.validation == Validation(5, 6)
    assert "train.eval_interval is validation.eval_interval in Megatron-Bridge" in log


def test_weight_decay_is_the_scheduler_s_too_unless_it_has_its_own(bridge: Callable[..., Any]) -> None:
    made = bridge(optimizer={"weight_decay": 0.0})
    assert (made.optimizer.weight_decay, made.scheduler.start_weight_decay, made.scheduler.end_weight_decay) == (
        0,
        0,
        0,
    )
    made = bridge(optimizer={"weight_decay": 0.0}, scheduler={"end_weight_decay": 0.5})
    assert (made.scheduler.start_weight_decay, made.scheduler.end_weight_decay) == (0.0, 0.5)


def test_words_of_the_torch_engine(bridge: Callable[..., Any]) -> None:
    made = bridge(train={"train_iters": 9, "eval_interval": 0, "precision": "auto", "recompute_granularity": "full"})
    assert made.train.eval_interval == 10  # zero would divide there
    model = made.model
    assert (model.recompute_granularity, model.recompute_method, model.recompute_num_layers) == ("full", "uniform", 1)
    for left_to_it in (None, "auto"):
        assert bridge(train={"recompute_granularity": left_to_it}).model.recompute_granularity == "selective"
    log: list[str] = []
    assert bridge(mixed_precision=None, train={"precision": "bfloat16"}, log=log).mixed_precision is None
    assert "train.precision gives way to mixed_precision" in log
    assert bridge(train={"precision": "bfloat16"}).mixed_precision == "bf16_mixed"
    assert "train.precision" in problems(lambda: bridge(train={"precision": "float32"}))
    offloaded = bridge(optimizer={"offload": True}).optimizer
    assert (offloaded.optimizer_cpu_offload, offloaded.optimizer_offload_fraction) == (True, 1.0)
    assert not bridge(optimizer={"offload": False}).optimizer.optimizer_cpu_offload


def test_it_resumes_from_our_place_and_never_from_the_recipe_s(bridge: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = bridge().checkpoint
    assert checkpoint == Checkpoint(str(tmp_path / "lora"), str(tmp_path / "lora"), str(tmp_path / "base"))
    assert bridge(checkpoint={"load": "/elsewhere"}).checkpoint.load == "/elsewhere"
    assert "checkpoint.save" in problems(lambda: bridge(checkpoint={"save": None}))


def test_an_adapter_of_the_torch_engine_is_loaded_without_its_optimizer(
    bridge: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "lora")
    assert bridge().checkpoint.load_optim
    (folder / "training_state.pt").touch()
    log: list[str] = []
    checkpoint = bridge(log=log).checkpoint
    assert (checkpoint.load_optim, checkpoint.load_rng) == (False, False)
    assert any("was saved by the torch engine" in line for line in log)


def test_empty_sections_leave_the_recipe_alone(bridge: Callable[..., Any]) -> None:
    made = bridge(optimizer=None, scheduler={}, model=None, peft=None, dataset=None, rng=None, comm_overlap=None)
    assert (made.optimizer, made.scheduler, made.peft.dim) == (Optimizer(), Scheduler(), 8)


def test_everything_wrong_at_once_and_each_with_its_key(bridge: Callable[..., Any]) -> None:
    found = problems(
        lambda: bridge(
            recipe={"tensor_model_parallel_sise": 2},
            optimizer={"lrr": 1.0, "lr": "fast"},
            train={"train_iters": 1.5, "micro_batch_size": 2},
            scheduler={"lr_decay_style": "sine"},
            model={"params_dtype": "bfloat17", "activation": "gelu", "hidden_size": True},
            comm_overlap={"tp_overlap": True},
            optimiser={"lr": 1.0},
            peft={"dmi": 4, "alpha": "many", "lora_A_init_method": "uniform"},
            dataset={"sede": 1, "dataset_root": "/x", "packed_sequence_specs": {"packed_val_data_path": "/y"}},
        )
    )
    assert set(found) == {
        "recipe.tensor_model_parallel_sise", "optimizer.lrr", "optimizer.lr", "train.train_iters",
        "train.micro_batch_size", "scheduler.lr_decay_style", "model.params_dtype", "model.activation",
        "model.hidden_size", "comm_overlap.tp_overlap", "optimiser", "peft.dmi", "peft.alpha",
        "peft.lora_A_init_method", "dataset.sede", "dataset.dataset_root",
        "dataset.packed_sequence_specs.packed_val_data_path",
    }  # fmt: skip
    assert found["recipe.tensor_model_parallel_sise"].hint == "Did you mean tensor_model_parallel_size?"
    assert found["optimizer.lrr"].hint == "Did you mean lr?"
    assert found["optimizer.lr"].allowed == "a number or null"
    assert found["scheduler.lr_decay_style"].allowed == "linear, cosine"
    assert found["optimiser"].hint == "Did you mean optimizer?"


@pytest.mark.parametrize(
    ("method", "hint"),
    [("adalora", "Use engine: torch for this method."), ("vblora", "Use engine: torch for this method."),
     ("lroa", "Did you mean lora?")],
)  # fmt: skip
def test_a_method_that_megatron_bridge_lacks_is_refused(bridge: Callable[..., Any], method: str, hint: str) -> None:
    found = problems(lambda: bridge(peft={"type": method}))["peft.type"]
    assert (found.what, found.allowed) == (f"Megatron-Bridge has no method {method!r}", "lora")
    assert found.hint == hint


def test_what_is_off_and_unknown_there_is_told_not_refused(bridge: Callable[..., Any]) -> None:
    log: list[str] = []
    bridge(optimizer={"fused": False}, peft={"use_rslora": None}, log=log)
    assert [line for line in log if "no such setting" in line] == [
        "optimizer.fused: Optimizer has no such setting; it is off, so nothing is lost",
        "peft.use_rslora: LoRA has no such setting; it is off, so nothing is lost",
    ]


# --- the adapter ---------------------------------------------------------------------------------------------------


def test_the_peft_section_over_the_recipe_s_adapter(bridge: Callable[..., Any]) -> None:
    made = bridge(peft={"type": "lora", "dim": 16, "alpha": 64.0, "lora_dtype": "bfloat16"}).peft
    assert made == LoRA(["linear_qkv", "in_proj"], [], 16, 64, "xavier", torch.bfloat16)
    assert type(made.alpha) is int


def test_excluding_drops_the_recipe_s_targets(bridge: Callable[..., Any]) -> None:
    made = bridge(peft={"exclude_modules": ["linear_fc1"]}).peft
    assert (made.target_modules, made.exclude_modules) == ([], ["linear_fc1", "output_layer"])
    both = {"target_modules": ["linear_qkv"], "exclude_modules": ["linear_fc1"]}
    assert "not both" in problems(lambda: bridge(peft=both))["peft.exclude_modules"].what


def test_our_own_settings_become_fields_of_its_class(bridge: Callable[..., Any]) -> None:
    log: list[str] = []
    off = {"match_all_linear": False, "lora_plus_ratio": 1.0, "init_lora_weights": None, "quantization": None}
    made = bridge(peft={"dim": 32, "alpha": 16, "use_rslora": True, "calibration_rows": 8, **off}, log=log).peft
    assert made.alpha == 16 * 32**0.5  # over 32, that is 16 / sqrt(32)
    assert "peft.use_rslora: alpha / sqrt(dim) is handed over as alpha 90.5097" in log
    # The recipe's rank and alpha, 8 and 32, where the section says none.
    assert bridge(peft={"use_rslora": True}).peft.alpha == 32 * 8**0.5
    for every in ({"match_all_linear": True, "target_modules": ["linear_fc2"]}, {"target_modules": []}):
        assert bridge(peft=every, log=log).peft.target_modules == ["linear_qkv", "in_proj"]
    assert "peft.target_modules: every linear, which is linear_qkv, in_proj" in log
    assert bridge(peft={"target_modules": ["o_proj"]}).peft.target_modules == ["linear_proj"]
    assert bridge(peft={"alpha": 1.5}).peft.alpha == 1.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_plus_ratio", 16.0), ("init_lora_weights", "olora"), ("quantization", {"type": "int8"})],
)
def test_what_only_the_torch_engine_has_is_refused_by_name(bridge: Callable[..., Any], key: str, value: Any) -> None:
    found = problems(lambda: bridge(peft={key: value}))
    assert set(found) == {f"peft.{key}"}
    assert found[f"peft.{key}"].what == f"Megatron-Bridge's LoRA has no such setting, and it is {value!r}"


def test_adapters_that_it_does_not_have_or_take(bridge: Callable[..., Any]) -> None:
    assert problems(lambda: bridge(peft={"type": "waveft"}))["peft.type"].allowed == "lora"
    assert "dim is too large" in problems(lambda: bridge(peft={"dim": 1000}))["peft"].what
    assert "recipe.peft" in problems(lambda: bridge(recipe={"peft": "dora"}))
    assert "recipe.packed_sequence" in problems(lambda: bridge(recipe={"packed_sequence": False}))


def test_some_layers_only_where_layers_are_stored_one_by_one(bridge: Callable[..., Any]) -> None:
    one = {"target_modules": ["*.layers.1.*.linear_qkv", "linear_fc2"]}
    found = problems(lambda: bridge(peft=one))["peft.target_modules"]
    assert found.what.startswith("self_attention.linear_qkv is adapted in 1 of 2 layers")
    assert bridge(peft=one, model={"hybrid_override_pattern": "M*"}).peft.target_modules == one["target_modules"]
    bridge(peft={"target_modules": ["*.layers.0.*.linear_qkv", "*.layers.1.*.linear_qkv"]})


# --- the data ------------------------------------------------------------------------------------------------------


def test_shards_are_read_where_they_lie_or_handed_over(bridge: Callable[..., Any], tmp_path: Path) -> None:
    made = bridge(dataset={"nano3_packed_sft_dir": "x", "num_workers": 2}, rng={"seed": 3}).dataset
    splits, scratch = tmp_path / "packed" / "splits", tmp_path / "scratch"
    expected = Specs(16, str(splits / "train"), str(splits / "valid"), scratch / "metadata.json")
    assert made == LocalData(
        seq_length=16, dataset_root=str(tmp_path / "packed"), num_workers=2, seed=3, packed_sequence_specs=expected,
        dataset_kwargs={"pad_to_max_length": True, "answer_only_loss": True}, do_validation=True, do_test=False,
    )  # fmt: skip
    made = bridge(reads_parquet=False).dataset.packed_sequence_specs
    assert (made.packed_train_data_path, made.packed_val_data_path) == (scratch / "train.npy", scratch / "valid.npy")


def test_names_of_later_releases(bridge: Callable[..., Any]) -> None:
    made = bridge(dataset_class=NewLocalData).dataset
    assert made.enable_offline_packing
    assert made.offline_packing_specs.packed_sequence_size == 16


def test_without_a_valid_split_nothing_is_evaluated(bridge: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "packed/splits/valid/00000.parquet").unlink()
    log: list[str] = []
    made = bridge(log=log).dataset
    assert (made.do_validation, made.packed_sequence_specs.packed_val_data_path) == (False, None)
    assert "the data has no valid split: nothing is evaluated" in log
    assert "dataset.do_validation" in problems(lambda: bridge(dataset={"do_validation": True}))


def test_lengths_must_agree(bridge: Callable[..., Any], tmp_path: Path) -> None:
    record = {"type": "packed_parquet", "facts": {"pack_size": 32}}
    (tmp_path / "packed" / "artifact.json").write_text(json.dumps(record))
    found = problems(bridge)["recipe.seq_length"]
    assert (found.name, "pack_size of the data is 32" in found.what) == ("seq_length_mismatch", True)
    assert bridge(recipe={"seq_length": None}).model.seq_length == 32
    (tmp_path / "packed" / "artifact.json").unlink()
    assert problems(lambda: bridge(recipe={"seq_length": None}))["recipe.seq_length"].what == "missing"


def test_context_parallelism_wants_padded_documents(bridge: Callable[..., Any], tmp_path: Path) -> None:
    found = problems(lambda: bridge(recipe={"context_parallel_size": 2}))
    assert found["recipe.context_parallel_size"].hint == "Pack again with pad_multiple=4."
    write_split(tmp_path / "packed", "train", [([1] * 14, [1] * 14, [0, 5])])  # documents of 4 + 1 and 8 + 1 tokens
    assert bridge(recipe={"context_parallel_size": 2}).dataset.packed_sequence_specs.pad_seq_to_mult == 4


def test_rows_handed_over_as_npy(tmp_path: Path) -> None:
    rows = [([1, 2, 3, 4, 5], [1, 1, 0, 1, 0], [0, 3]), ([6, 7], [1, 0], [0]), ([8, 9, 1], [0, 1, 0], [0])]
    write_split(tmp_path / "packed", "train", rows)
    where = data.plan(tmp_path / "packed", tmp_path / "scratch", reads_parquet=False)
    data.write(where, SILENT)
    read = np.load(tmp_path / "scratch/train.npy", allow_pickle=True)
    told = [(row["input_ids"].tolist(), row["loss_mask"].tolist(), row["seq_start_id"]) for row in read]
    assert told == rows
    assert read[0]["input_ids"].dtype == np.int32
    summary = {"max_samples_per_bin": 2, "dataset_max_seqlen": 2, "min_packed_seqlen": 1}
    assert json.loads((tmp_path / "scratch/metadata.json").read_text()) == [summary]
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["metadata.json", "train.npy"]


# --- the base ------------------------------------------------------------------------------------------------------


def write_base(base: Path, **model: Any) -> Path:
    folder = base / "iter_0000000"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (base / "latest_checkpointed_iteration.txt").write_text("0")
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    return folder


def test_the_recipe_must_build_the_base_s_model(bridge: Callable[..., Any], tmp_path: Path) -> None:
    write_base(tmp_path / "base", hidden_size=32, vocab_size=100)
    found = problems(bridge)["recipe._target_"]
    assert (found.name, "hidden_size 64 (base: 32)" in found.what) == ("base_model_mismatch", True)
    made = bridge(model={"hidden_size": 32})
    assert made.model.vocab_size == 100  # else the tokenizer's, padded, and the embedding would not fit


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 1, 1.0),
        (int, 2.0, 2),
        (int | None, None, None),
        (str | Path, "a", "a"),
        (Path | None, "a", Path("a")),
        (torch.dtype, "torch.float16", torch.float16),
        (torch.dtype, "bf16", torch.bfloat16),
        (Backend, "fused", Backend.fused),
        (Literal["a", 1], 1, 1),
        (bool, True, True),
        (list[int], [1], [1]),
        (tuple[float, float], [0.9, 0.95], (0.9, 0.95)),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (Any, object, object),
    ],
)
def test_values_that_fit(hint: Any, value: Any, expected: Any) -> None:
    made = fit(hint, value)
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [(int, 1.5), (int, True), (float, "1"), (bool, 1), (str, 1), (torch.dtype, "Tensor"), (Backend, "slow"),
     (Literal["a"], "b"), (int | None, "x"), (list[int], "ab"), (Callable[[], int], "abs"), (Model, {})],
)  # fmt: skip
def test_values_that_do_not(hint: Any, value: Any) -> None:
    with pytest.raises(Misfit):
        fit(hint, value)


def test_where_a_recipe_itself_goes_beyond_an_annotation_one_may_too() -> None:
    """Model.cuda_graph_scope is a list by annotation and a text in the recipe: a text stays possible, a number not."""
    model, findings = Model(), Findings()
    assign(model, {"cuda_graph_scope": "attn"}, "model", findings)
    assert (model.cuda_graph_scope, findings.problems) == ("attn", [])
    assign(model, {"cuda_graph_scope": 3}, "model", findings)
    assert [problem.where for problem in findings.problems] == ["model.cuda_graph_scope"]


# --- the outcome and the package -----------------------------------------------------------------------------------


def test_facts_of_a_run(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "lora")
    peft = "{_target_: megatron.bridge.peft.dora.DoRA, dim: 4, alpha: 8, target_modules: [x], exclude_modules: []}"
    odd = "extra: !!python/tuple [1, 2]\nother: !!python/object:some.Class {a: 1}\n"
    (folder / "run_config.yaml").write_text(f"peft: {peft}\ntrain: {{train_iters: 0}}\n{odd}")
    assert facts(tmp_path / "lora") == {
        "method": "dora", "dim": 4, "alpha": 8, "target_modules": ["x"], "exclude_modules": [],
        "iteration": 0, "finished": True,
    }  # fmt: skip
    (folder / "run_config.yaml").write_text("peft: null\n")
    with pytest.raises(StepFailed, match="does not say which adapter"):
        facts(tmp_path / "lora")
    with pytest.raises(StepFailed, match="left no checkpoint"):
        facts(tmp_path / "nothing")


def test_facts_of_a_run_of_all_weights(tmp_path: Path) -> None:
    packed.write_base(tmp_path / "sft")
    path = tmp_path / "sft/iter_0000000/run_config.yaml"
    written = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**written, "peft": None, "train": {"train_iters": 5}}))
    found = facts(tmp_path / "sft", adapts=False)
    assert (found["iteration"], found["finished"]) == (0, False)
    assert found["model"] == packed.SHAPE.to_dict()
    assert found["base_fingerprint"] == fingerprint(megatron_source(tmp_path / "sft").tensors)
    path.write_text(yaml.safe_dump({**written, "peft": {"_target_": "x.LoRA"}, "train": {"train_iters": 5}}))
    with pytest.raises(StepFailed, match="holds an adapter, not a model"):
        facts(tmp_path / "sft", adapts=False)


def test_without_megatron_bridge_the_package_is_named_and_nothing_imported() -> None:
    """In a process where megatron.core is found and megatron.bridge is not."""
    script = """
import importlib.util, sys
genuine = importlib.util.find_spec
def find_spec(name, package=None):
    if name.startswith("megatron"):
        return None if name == "megatron.bridge" else genuine("json")
    return genuine(name, package)
importlib.util.find_spec = find_spec
from pathlib import Path
from steps.engine import megatron_bridge
from steps.engine.progress import SILENT
from steps.errors import StepFailed
problem, = megatron_bridge.missing_packages()
assert problem.name == "megatron_bridge_missing", problem
try:
    megatron_bridge.finetune({"checkpoint": {"save": "x"}}, packed_dir=Path("."), base=Path("."), progress=SILENT)
except StepFailed as error:
    print(error)
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "torch")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs the package megatron-bridge, which is not installed here" in done.stdout
    assert "NeMo container" in done.stdout


def test_missing_core_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "megatron-core" in missing_packages()[0].what
