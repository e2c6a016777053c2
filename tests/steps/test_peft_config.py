"""What peft/megatron_bridge refuses before anything starts, and in which words. Nothing here imports torch."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from steps.artifacts.opening import Artifact
from steps.artifacts.record import Record
from steps.config import yaml12
from steps.config.peft import names, section_class
from steps.config.validate import validate
from steps.engine.train import engines
from steps.errors import ArtifactError, ConfigError, Problem, refusal
from steps.peft.megatron_bridge import schema
from steps.peft.megatron_bridge.schema import BASE, DATA, Config
from steps.shapes.model_config import ModelConfig

FOLDER = Path(schema.__file__).parent
SMOLLM2 = ModelConfig(
    family="llama", num_layers=30, hidden_size=576, num_attention_heads=9, num_query_groups=3, kv_channels=64,
    ffn_hidden_size=1536, vocab_size=49152, max_position_embeddings=8192, share_embeddings_and_output_weights=True,
)  # fmt: skip


def shipped(name: str, **sections) -> dict:
    data, _ = yaml12.load(FOLDER / "config" / f"{name}.yaml")
    for section, values in sections.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return data


def artifacts(
    base: dict | None = None, data: dict | None = None, tmp_path: Path = Path("nowhere")
) -> dict[str, Artifact]:
    base = {"tokenizer_digest": "a", "base_fingerprint": "f", "model": SMOLLM2.to_dict(), **(base or {})}
    data = {"tokenizer_digest": "a", "pack_size": 512, **(data or {})}
    return {
        BASE: Artifact(
            BASE, "checkpoint_megatron", "base", tmp_path / "base", Record("checkpoint_megatron"), facts=base
        ),
        DATA: Artifact(DATA, "packed_parquet", "packed", tmp_path / "packed", Record("packed_parquet"), facts=data),
    }


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The shipped configurations' relative paths must not meet what a demo left in the checkout."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_shipped_configs_are_valid(name):
    config, notes = validate(Config, shipped(name))
    assert not notes
    assert config.engine == {"default": "auto", "tiny": "torch"}[name]


def test_auto_takes_megatron_bridge_where_it_is_installed_or_only_it_can_do_it(monkeypatch):
    monkeypatch.setattr(engines, "bridge_installed", lambda: False)
    assert validate(Config, shipped("default"))[0].chosen_engine == "torch"
    parallel = shipped("default", recipe={"tensor_model_parallel_size": 8})
    assert validate(Config, parallel)[0].chosen_engine == "megatron_bridge"
    assert validate(Config, {**parallel, "engine": "torch", "recipe": {"seq_length": 8}})[0].chosen_engine == "torch"
    monkeypatch.setattr(engines, "bridge_installed", lambda: True)
    assert validate(Config, shipped("default"))[0].chosen_engine == "megatron_bridge"


@pytest.mark.parametrize("recipe", [{}, {"tensor_model_parallel_size": 8}, {"tensor_model_parallel_size": "x"}, None])
def test_every_problem_is_told_also_where_the_engine_is_auto(recipe):
    """An unknown key asks for the engine while the configuration has no typed sections yet."""
    data = shipped("default", train={"train_iters": "abc"}, peft={"dmi": 4}, rng={"sede": 4})
    data["recipe"] = data["recipe"] | recipe if recipe is not None else None
    with pytest.raises(ConfigError) as caught:
        validate(Config, data)
    wrong = {problem.where for problem in caught.value.problems}
    assert "train.train_iters" in wrong
    assert "peft.dmi" in wrong or engines.bridge_installed() or recipe == {"tensor_model_parallel_size": 8}


def test_default_is_the_documented_run():
    config, _ = validate(Config, shipped("default"))
    assert config.recipe.target.endswith("nemotron_3_nano.nemotron_3_nano_peft_config")
    assert (config.peft.dim, config.peft.target_modules) == (32, ["linear_qkv", "linear_proj"])
    assert config.recipe.seq_length == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"tensor_model_parallel_size": 8}}, "model_parallel_size: 8 needs the engine megatron_bridge"),
        ({"recipe": {"context_parallel_size": 2}}, "recipe.context_parallel_size: 2 needs the engine"),
        ({"scheduler": {"lr_warmup_iters": 20}}, r"scheduler.lr_warmup_iters: 20 leaves .* below train_iters \(20\)"),
        ({"scheduler": {"lr_warmup_iters": 9, "lr_decay_iters": 5}}, r"below lr_decay_iters \(5\)"),
        ({"optimizer": {"min_lr": 0.1}}, r"optimizer.min_lr: 0.1 is above optimizer.lr"),
        ({"train": {"micro_batch_size": 3}}, "train.global_batch_size: 4 is no multiple of micro_batch_size"),
        ({"run": {"env": {"nprocs_per_node": 3}}}, "no multiple of micro_batch_size .1. times 3 processes"),
        ({"peft": {"dmi": 8}}, r"peft.dmi: unknown key.*Did you mean peft.dim\?"),
        ({"peft": {"dim": 0}}, "peft.dim: 0 is out of range"),
        ({"peft": {"type": "lroa"}}, "peft.type: 'lroa' is not one of the choices"),
        ({"peft": {"alpha": 0}}, "peft.alpha: 0 is out of range. Allowed: > 0"),
        ({"peft": {"alpha": -2.0}}, "peft.alpha: -2.0 is out of range. Allowed: > 0"),
        ({"peft": {"dropout": 1}}, "peft.dropout: 1 is out of range. Allowed: < 1"),
        ({"peft": {"target_modules": ["linear_qkv"], "exclude_modules": ["linear_fc1"]}},
         "peft.exclude_modules: target_modules and exclude_modules are both given. .*; peft.target_modules=.. adapts"),
        ({"peft": {"type": "canonical_lora", "target_modules": ["linear_qkv"]}},
         "'linear_qkv' matches no module.* by themselves: write linear_q, linear_k, linear_v"),
        ({"peft": {"type": "canonical_lora", "exclude_modules": ["*.layers.1.*.linear_fc1"]}},
         r"peft.exclude_modules: .* write \*.layers.1.\*.linear_fc1_gate, \*.layers.1.\*.linear_fc1_up"),
        ({"peft": {"target_modules": ["linear_q"]}}, "linear_q is part of linear_qkv here: write linear_qkv, or adapt"),
        ({"peft": {"type": "dora", "use_rslora": True}},
         "peft.use_rslora: is a setting of type lora. Leave it out, or choose peft.type=lora"),
        ({"peft": {"type": "dora", "dropout_position": "post"}}, "'post' is not one of the choices. Allowed: pre"),
        ({"peft": {"init_lora_weights": "eva", "lora_A_init_method": "kaiming"}}, "no meaning beside init_lora_w"),
        ({"peft": {"quantization": {"type": "int4"}}}, "peft.quantization.type: 'int4' is not one of .* nf4, int8"),
        ({"engine": "megatron"}, r"engine: 'megatron' is not one of the choices.*megatron_bridge"),
        ({"engine": "megatron_bridge"}, "recipe._target_: is required by the engine megatron_bridge"),
        ({"peft": {"quantization": {"type": "nf5"}}}, "peft.quantization.type: 'nf5' is not one of the choices"),
        ({"peft": {"quantization": {"block_size": 48}}}, "peft.quantization.block_size: 48 is not one of the choices"),
        ({"peft": {"quantization": {"blocksize": 64}}}, "peft.quantization.blocksize: unknown key"),
        ({"modle": {}}, "modle: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        validate(Config, shipped("tiny", **change))


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "canonical_lora"},
        {"type": "dora"},
        {"exclude_modules": ["linear_fc1"]},
        {"match_all_linear": True, "target_modules": ["linear_qkv"], "exclude_modules": ["linear_fc1"]},
    ],
    ids=json.dumps,
)
def test_the_shipped_tiny_configuration_leaves_the_targets_to_the_method(peft):
    config, _ = validate(Config, shipped("tiny", peft=peft))
    assert (config.peft.dim, config.peft.alpha) == (16, 32)
    assert not list(config.check_inputs(artifacts()))


@pytest.mark.parametrize(
    ("peft", "problems"),
    [
        ({"lora_plus_ratio": 16.0, "init_lora_weights": "pissa"}, {
            "peft.lora_plus_ratio": "both factors at one learning rate", "peft.init_lora_weights": "called 'pissa'"}),
        ({"quantization": {"type": "nf4"}, "lora_A_init_method": "uniform"}, {
            "peft.quantization": "holds the base as it is", "peft.lora_A_init_method": "Allowed: xavier, kaiming"}),
        ({"type": "dora", "lora_dtype": "bfloat16"}, {"peft.lora_dtype": "Megatron-Bridge's dora has no such setting"}),
        ({"type": "canonical_lora", "target_modules": [], "lora_dtype": "float32", "exclude_modules": ["linear_q"]}, {
            "peft.lora_dtype": "has no such setting", "peft.exclude_modules": "canonical LoRA cannot exclude"}),
        ({"type": "canonical_lora", "target_modules": ["q_proj", "*.layers.0.*"]}, {
            "peft.target_modules": "on 'q_proj' without one on linear_k, linear_v|name of a part at the end"}),
        ({"use_rslora": True, "match_all_linear": True, "lora_dtype": "bfloat16", "calibration_rows": 3}, {}),
        ({"type": "canonical_lora", "target_modules": ["q_proj", "linear_k", "v_proj", "*.layers.0.*.o_proj"]}, {}),
    ],
    ids=lambda value: json.dumps(value) if "peft" not in str(value) else "",
)  # fmt: skip
def test_what_megatron_bridge_cannot_do_is_refused_before_the_start(peft, problems):
    data = shipped("default", engine="megatron_bridge", peft=peft)
    if not problems:
        validate(Config, data)
        return
    with pytest.raises(ConfigError) as caught:
        validate(Config, data)
    assert {problem.where for problem in caught.value.problems} == set(problems)
    for problem in caught.value.problems:
        assert re.search(problems[problem.where], str(problem))
    validate(Config, {**data, "engine": "torch", "train": {**data["train"], "micro_batch_size": 1}})


@pytest.mark.parametrize("method", names())
def test_methods_without_a_class_there_are_refused_and_those_with_one_are_not(method):
    data = shipped("default", engine="megatron_bridge", peft={"type": method})
    del data["peft"]["target_modules"]
    if section_class(method).model_validate({}).bridge_section() is not None:
        validate(Config, data)
        return
    with pytest.raises(
        ConfigError, match=f"peft.type: Megatron-Bridge has no method '{method}'. Allowed: canonical_lora"
    ):
        validate(Config, data)


def test_rank_and_targets_that_do_not_fit_the_base_are_told_together():
    config, _ = validate(Config, shipped("tiny", peft={"dim": 577, "target_modules": ["linear_qvk", "linear_fc2"]}))
    problems = list(config.check_inputs(artifacts()))
    assert [str(problem) for problem in problems] == [
        "peft.target_modules: 'linear_qvk' matches no module. Allowed: linear_qkv, linear_proj, linear_fc1, "
        "linear_fc2. Did you mean linear_qkv?",
        "peft.dim: rank 577 is above that of linear_fc2, which is [576, 1536]. Allowed: 1 to 576",
    ]
    assert isinstance(refusal(problems), ConfigError)
    assert isinstance(refusal([*problems, Problem("x", "is missing")]), ArtifactError)


def test_megatron_bridge_takes_keys_that_are_not_typed_here():
    data = shipped("default", engine="megatron_bridge", model={"a": 1}, train={"exit_interval": 5}, ddp={"b": {"c": 2}})
    _, notes = validate(Config, data)
    assert sorted(note.partition(":")[0] for note in notes) == ["ddp", "model", "train.exit_interval"]
    assert all(note.endswith("passed to Megatron-Bridge") for note in notes)
    with pytest.raises(ConfigError, match="run.enw: unknown key"):
        validate(Config, {**data, "run": {"enw": {}}})
    with pytest.raises(ConfigError, match="train.exit_interval: unknown key"):
        validate(Config, {**data, "engine": "torch"})


@pytest.mark.parametrize(
    ("base", "data", "name", "message"),
    [
        ({}, {"pack_size": 4096}, "seq_length_mismatch", "512 is not the pack_size of the data, 4096"),
        ({"tokenizer_digest": "b"}, {}, "tokenizer_mismatch", "another tokenizer than the base model"),
        ({"model": {**SMOLLM2.to_dict(), "num_layers": 0}}, {}, "target_not_found", "'linear_qkv' matches no module"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(base, data, name, message):
    config, _ = validate(Config, shipped("tiny"))
    problem = next(iter(config.check_inputs(artifacts(base, data))))
    assert problem.name == name
    assert message in str(problem)


def test_inputs_that_fit_or_say_nothing_pass():
    config, _ = validate(Config, shipped("tiny"))
    assert not list(config.check_inputs(artifacts()))
    silent = {key: Artifact(key, item.type, item.value, item.path) for key, item in artifacts().items()}
    assert not list(config.check_inputs(silent))


def test_a_place_with_another_run_is_refused_in_a_dry_run_already(tmp_path):
    save = tmp_path / "lora"
    config, _ = validate(Config, shipped("tiny", checkpoint={"save": str(save)}))
    inputs = artifacts(tmp_path=tmp_path)
    save.mkdir()
    identity = config.plan(inputs).identity()
    Record("checkpoint_lora", facts={"identity": json.loads(json.dumps(identity))}).write(save)
    assert not list(config.check_inputs(inputs))
    other, _ = validate(Config, shipped("tiny", checkpoint={"save": str(save)}, peft={"dim": 3}, rng={"seed": 5}))
    problems = list(other.check_inputs(inputs))
    assert {problem.where for problem in problems} == {"peft.dim", "rng.seed"}
    assert {problem.name for problem in problems} == {"run_mismatch"}
    (save / "artifact.json").unlink()
    (save / "thesis.txt").write_text("mine")
    assert "not made by steps" in str(next(iter(config.check_inputs(inputs))))


def saved(path: Path, *iterations: int, identity: dict | None = None) -> Path:
    """A directory with the files that make it a checkpoint_lora of these iterations."""
    for iteration in iterations:
        (path / f"iter_{iteration:07d}").mkdir(parents=True)
        (path / f"iter_{iteration:07d}" / ".metadata").touch()
    (path / "latest_checkpointed_iteration.txt").write_text(str(iterations[-1]))
    Record("checkpoint_lora", facts={"identity": json.loads(json.dumps(identity))} if identity else {}).write(path)
    return path


@pytest.mark.parametrize(
    ("checkpoint", "train_iters", "where", "message"),
    [
        ({"load": "nowhere"}, 20, "checkpoint.load", "there is no checkpoint_lora at"),
        ({"load": "."}, 20, "checkpoint.load", "holds no checkpoint_lora"),
        ({"load": "lora", "ckpt_step": 7}, 20, "checkpoint.ckpt_step", "no iteration 7 is saved.* Allowed: 5, 10"),
        ({"ckpt_step": 5}, 20, "checkpoint.ckpt_step", "no iteration 5 is saved.* Leave ckpt_step out"),
        ({"save": "lora", "ckpt_step": 7}, 20, "checkpoint.ckpt_step", "no iteration 7 is saved.* Allowed: 5, 10"),
        ({"save": "lora"}, 9, "train.train_iters", "is 9, but the run in .* has come to iteration 10"),
        ({"load": "lora"}, 9, "train.train_iters", "is 9, but the run in .* has come to iteration 10"),
        ({"save": "lora", "ckpt_step": 5}, 9, "", ""),
        ({"save": "lora"}, 10, "", ""),
        ({"load": "lora", "ckpt_step": 10}, 20, "", ""),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_a_place_to_go_on_from_that_the_run_refuses(
    checkpoint, train_iters, where, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config, _ = validate(
        Config, shipped("tiny", checkpoint={"save": "new", **checkpoint}, train={"train_iters": train_iters})
    )
    inputs = artifacts(tmp_path=tmp_path)
    saved(tmp_path / "lora", 5, 10, identity=config.plan(inputs).identity())
    problems = list(config.check_inputs(inputs))
    assert [problem.where for problem in problems] == ([where] if where else [])
    assert not where or re.search(message, str(problems[0]))


def test_a_dry_run_refuses_another_precision_than_the_run_was_computed_in(tmp_path):
    save = tmp_path / "lora"
    inputs = artifacts(tmp_path=tmp_path)
    for precision, refused in (("bfloat16", ["run_mismatch"]), ("float32", []), ("auto", [])):
        sections = {"checkpoint": {"save": str(save)}, "train": {"precision": precision}}
        config, _ = validate(Config, shipped("tiny", **sections))
        save.mkdir(exist_ok=True)
        facts = {"identity": json.loads(json.dumps(config.plan(inputs).identity())), "compute_dtype": "float32"}
        Record("checkpoint_lora", facts=facts).write(save)
        assert [problem.name for problem in config.check_inputs(inputs)] == refused


@pytest.mark.parametrize(
    ("key", "package"), [("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")]
)  # fmt: skip
def test_a_logger_needs_its_package(key, package, tmp_path, monkeypatch):
    """Where it is not on the path; a folder that only has its name does not count."""
    config, _ = validate(Config, shipped("tiny", logger={key: "x"}))
    (tmp_path / package).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    importlib.invalidate_caches()
    (problem,) = config.launch_here()
    assert (problem.where, problem.name) == (f"logger.{key}", "logger_package_missing")
    (tmp_path / package / "__init__.py").touch()
    importlib.invalidate_caches()
    assert not list(config.launch_here())


def test_the_missing_package_is_named_only_where_it_is_needed():
    pytest.importorskip("megatron.core")
    default, _ = validate(Config, shipped("default", engine="megatron_bridge"))
    if engines.bridge_installed():
        assert not list(default.launch_here())
    else:
        (problem,) = default.launch_here()
        assert "megatron-bridge" in str(problem)
        assert problem.name == "megatron_bridge_missing"
    tiny, _ = validate(Config, shipped("tiny"))
    assert not list(tiny.launch_here())
    assert default.wants_torchrun()
    assert not tiny.wants_torchrun()


def test_checking_imports_no_torch():
    code = (
        "import sys; from steps.peft.megatron_bridge.schema import Config; from steps.config.validate import validate;"
        "from steps.config import yaml12; from pathlib import Path;"
        f"c, _ = validate(Config, yaml12.load(Path({str(FOLDER / 'config' / 'default.yaml')!r}))[0]);"
        "list(c.launch_here()); sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_who_chooses_a_method_on_top_of_a_file_is_not_held_to_the_other_methods_settings():
    data = shipped("tiny")
    data["peft"] = {"type": "waveft", "dim": 16, "alpha": 32, "n_frequency": 100}
    sources = {
        "peft.dim": "tiny.yaml:27", "peft.alpha": "tiny.yaml:28", "peft.type": "command line",
        "peft.n_frequency": "command line",
    }  # fmt: skip
    adopted = Config.adopt(data, sources)
    assert adopted.data["peft"] == {"type": "waveft", "n_frequency": 100}
    assert adopted.notes == [
        "peft.dim: waveft has no such setting; 16 (tiny.yaml:27) is left out",
        "peft.alpha: waveft has no such setting; 32 (tiny.yaml:28) is left out",
    ]
    assert set(adopted.sources) == {"peft.type", "peft.n_frequency"}
    assert validate(Config, adopted.data)[0].peft.type == "waveft"


@pytest.mark.parametrize(
    "order",
    [["peft.type", "peft.dim"], ["peft.dim", "peft.type"], []],
    ids=["behind the choice", "before it, in the same layer", "nothing tells"],
)
def test_a_setting_given_for_the_wrong_method_stays_a_fault(order):
    data = shipped("tiny")
    data["peft"] = {"type": "waveft", "dim": 16, "dmi": 3}
    adopted = Config.adopt(data, dict.fromkeys(order, "command line"))
    assert not adopted.notes
    with pytest.raises(ConfigError, match=r"peft.dim: is a setting of type .*\n?.*peft.dmi: unknown key"):
        validate(Config, adopted.data)
