"""NeMo-RL's adapter blocks and Megatron-Bridge's `_target_`, as a user's files and command lines hold them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from steps.config.nemo_rl import BLOCKS
from steps.config.peft import section_class
from steps.config.validate import validate_adopted
from steps.dispatch import catalog
from steps.dispatch.compose import compose
from steps.errors import ConfigError
from steps.peft.megatron_bridge.schema import Config

STEP = catalog.find("peft/megatron_bridge")
MEGATRON, DTENSOR = "policy.megatron_cfg.peft", "policy.dtensor_cfg.lora_cfg"
#: A file in the shape of NeMo-RL's examples/configs/sft.yaml: both blocks whole, and keys that say other things.
NEMO_RL = """
sft: {max_num_epochs: 1, max_num_steps: 60}
policy:
  model_name: meta-llama/Llama-3.2-1B
  train_global_batch_size: 32
  train_micro_batch_size: 1
  max_total_sequence_length: 512
  dtensor_cfg:
    _v2: true
    enabled: true
    lora_cfg:
      enabled: true
      target_modules: []
      exclude_modules: []
      match_all_linear: true
      dim: 8
      alpha: 24
      dropout: 0.1
      dropout_position: post
      lora_A_init: uniform
      use_triton: true
  dynamic_batching:
    train_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}
  generation: {broken: "${", token: "${oc.env:NOT_SET_ANYWHERE}"}
  megatron_cfg:
    enabled: false
    optimizer: {lr: 5.0e-6}
    peft:
      enabled: false
      target_modules: [linear_qkv]
      exclude_modules: []
      dim: 6
      alpha: 32
      dropout: 0.0
      dropout_position: pre
      lora_A_init_method: xavier
      lora_B_init_method: zero
      a2a_experimental: false
      lora_dtype: None
logger: {log_dir: logs, wandb_enabled: true, wandb_project: mine}
cluster: {gpus_per_node: 1}
"""


def composed(tmp_path, *overrides: str, mine: str = "defaults: [tiny, nemo]\n", nemo: str = NEMO_RL):
    (tmp_path / "nemo.yaml").write_text(nemo)
    (tmp_path / "mine.yaml").write_text(mine)
    return compose(STEP, str(tmp_path / "mine.yaml"), overrides, adopt=Config.adopt)


def typed(tmp_path, *overrides: str, **files: str):
    """The typed peft section, and the notes."""
    config, notes = validate_adopted(Config, composed(tmp_path, *overrides, **files).told)
    return config.peft, notes


def refused(tmp_path, *overrides: str, **files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        typed(tmp_path, *overrides, **files)
    return str(caught.value)


def test_a_whole_file_is_taken_as_it_is(tmp_path):
    peft, notes = typed(tmp_path)
    assert peft.type == "canonical_lora"
    assert (peft.dim, peft.alpha, peft.dropout, peft.dropout_position) == (8, 24, 0.1, "post")
    assert (peft.target_modules, peft.match_all_linear, peft.targets_asked) == ([], True, [])
    # What NeMo-RL's uniform draws is kaiming uniform.
    assert peft.lora_A_init_method == "kaiming"
    told = "\n".join(notes)
    for line in (
        f"{MEGATRON}: not read, its enabled is false",
        f"{DTENSOR}: read as peft, type canonical_lora",
        f"{DTENSOR}.use_triton: has no effect here",
        f"{DTENSOR}.match_all_linear: means every linear of the layers; the output layer",
        "policy.train_global_batch_size: has no effect here; train.global_batch_size says that",
        "cluster: has no effect here; run.env says that",
        "policy.dynamic_batching, policy.generation, policy.dtensor_cfg._v2, logger.log_dir, logger.wandb_enabled: "
        "NeMo-RL's own",
    ):
        assert line in told


def test_only_our_keys_are_left_and_each_knows_its_line(tmp_path):
    made = composed(tmp_path, "policy.dtensor_cfg.lora_cfg.dim=12")
    assert not {"policy", "sft", "cluster"} & set(made.data)
    assert made.data["logger"] == {"wandb_project": "mine"}
    assert not [key for key in made.sources if key.startswith(("policy", "sft", "cluster", "logger.log_dir"))]
    assert made.sources["peft.dim"] == "command line"
    assert made.sources["peft.alpha"] == "nemo.yaml:17"
    assert made.sources["peft.target_modules"] == "nemo.yaml:13"
    assert made.sources["train.train_iters"].startswith("tiny.yaml:")


def test_what_others_take_from_the_policy_is_resolved_before_it_goes(tmp_path):
    mine = "defaults: [tiny, nemo]\nrecipe: {seq_length: '${policy.max_total_sequence_length}'}\n"
    assert composed(tmp_path, mine=mine).data["recipe"]["seq_length"] == 512
    message = refused(tmp_path, "recipe.seq_length=${policy.generation.token}")
    assert "NOT_SET_ANYWHERE is not set" in message
    assert "policy.generation" not in message


def test_the_other_block_by_the_command_line(tmp_path):
    switched = [f"{MEGATRON}.enabled=true", "policy.megatron_cfg.enabled=true", "policy.dtensor_cfg.enabled=false"]
    peft, notes = typed(tmp_path, *switched)
    assert (peft.type, peft.dim, peft.target_modules, peft.lora_dtype) == ("lora", 6, ["linear_qkv"], None)
    assert f"{DTENSOR}: not read, policy.megatron_cfg is the backend" in notes
    assert (
        f"{MEGATRON}.lora_dtype: null is the base's dtype in NeMo-RL; here the adapter's parameters are float32"
        in notes
    )
    assert any(note.startswith(f"{MEGATRON}.a2a_experimental: has no effect") for note in notes)


def test_overrides_alone_stand_on_a_shipped_configuration(tmp_path):
    peft, _ = typed(tmp_path, f"{MEGATRON}.dim=4", f"{MEGATRON}.lora_dtype=torch.bfloat16", mine="defaults: tiny\n")
    assert (peft.type, peft.dim, peft.alpha, peft.lora_dtype) == ("lora", 4, 32, "bfloat16")


def test_automodel_cfg_is_the_later_name_of_dtensor_cfg(tmp_path):
    peft, _ = typed(tmp_path, nemo=NEMO_RL.replace("dtensor_cfg", "automodel_cfg"))
    assert (peft.type, peft.dim) == ("canonical_lora", 8)


def test_no_block_is_enabled(tmp_path):
    peft, notes = typed(tmp_path, f"{DTENSOR}.enabled=false")
    assert (peft.type, peft.dim) == ("lora", 16)  # tiny's own
    assert "this step always trains adapters: as the peft section says" in notes


@pytest.mark.parametrize(
    ("overrides", "mine", "expected"),
    [
        (["peft.dim=5"], "defaults: [tiny, nemo]\n", 5),
        ([f"{DTENSOR}.dim=9"], "defaults: [tiny, nemo]\npeft: {dim: 5}\n", 9),
        ([], "defaults: [tiny, nemo]\npeft: {dim: 5}\n", 5),
        ([], "defaults: [nemo, tiny]\n", 16),
        (["peft={dim: 3}"], "defaults: [tiny, nemo]\n", 3),
        (["peft.dim=8"], "defaults: [tiny, nemo]\n", 8),
    ],
)
def test_the_stronger_layer_wins_key_by_key(overrides, mine, expected, tmp_path):
    peft, _ = typed(tmp_path, *overrides, mine=mine)
    assert (peft.dim, peft.alpha) == (expected, 32 if mine.startswith("defaults: [nemo") else 24)


def test_what_gives_way_is_told(tmp_path):
    _, notes = typed(tmp_path, "peft.dim=5")
    assert f"{DTENSOR}.dim: 8 gives way to peft.dim (command line)" in notes


def test_a_shipped_file_of_the_same_name_is_another_layer(tmp_path):
    (tmp_path / "tiny.yaml").write_text("defaults: tiny\npolicy: {megatron_cfg: {peft: {dim: 4}}}\n")
    made = compose(STEP, str(tmp_path / "tiny.yaml"), adopt=Config.adopt)
    assert made.data["peft"]["dim"] == 4
    assert made.sources["peft.dim"] == "tiny.yaml:2"
    assert made.sources["peft.alpha"].startswith("config/tiny.yaml:")


@pytest.mark.parametrize(
    ("overrides", "mine", "message"),
    [
        # One place says two things.
        ([f"{MEGATRON}.dim=4", "peft.dim=5"], "defaults: tiny\n",
         f"{MEGATRON}.dim: means peft.dim 4, but peft.dim is 5 (from command line). Leave one of the two out."),
        ([], "defaults: tiny\npeft: {alpha: 1}\npolicy: {megatron_cfg: {peft: {alpha: 2}}}\n",
         f"{MEGATRON}.alpha: means peft.alpha 2, but peft.alpha (mine.yaml:2) is 1 (from mine.yaml:3)."),
        ([], "defaults: tiny\npeft: {type: dora}\npolicy: {megatron_cfg: {peft: {dim: 2}}}\n",
         f"{MEGATRON}: means peft.type 'lora', but peft.type (mine.yaml:2) is 'dora' (from mine.yaml:3)."),
        # Which block counts.
        ([f"{MEGATRON}.enabled=true", "policy.megatron_cfg.enabled=true"], "defaults: [tiny, nemo]\n",
         f"{MEGATRON} and {DTENSOR} are both enabled, and which of the two counts is not said (from nemo.yaml:"),
        ([f"{MEGATRON}.dim=1", f"{DTENSOR}.dim=1"], "defaults: tiny\n",
         "Set policy.megatron_cfg.enabled=false or policy.dtensor_cfg.enabled=false."),
        (["policy.dtensor_cfg.enabled=false"], "defaults: [tiny, nemo]\n",
         f"{DTENSOR}: is enabled, but its backend is not: policy.dtensor_cfg.enabled is false"),
        (["policy.dtensor_cfg.enabled=on"], "defaults: [tiny, nemo]\n",
         "policy.dtensor_cfg.enabled: 'on' is not true or false (from command line)"),
        # At the key that was written.
        ([f"{MEGATRON}.dmi=4"], "defaults: tiny\n",
         f"{MEGATRON}.dmi: unknown key (from command line). Did you mean {MEGATRON}.dim?"),
        ([], "defaults: tiny\npolicy:\n  dtensor_cfg:\n    lora_cfg:\n      lora_A_init_method: xavier\n",
         f"{DTENSOR}.lora_A_init_method: unknown key (from mine.yaml:5). Did you mean {DTENSOR}.lora_A_init?"),
        ([f"{MEGATRON}.use_dora=true"], "defaults: tiny\n", f"{MEGATRON}.use_dora: unknown key (from command line)"),
        ([f"{DTENSOR}.dim=0"], "defaults: tiny\n",
         f"{DTENSOR}.dim: 0 is out of range (from command line). Allowed: >= 1"),
        ([f"{DTENSOR}.dim=ten"], "defaults: tiny\n", f"{DTENSOR}.dim: 'ten' is not an integer (from command line)"),
        ([f"{MEGATRON}.alpha=-1"], "defaults: tiny\n", f"{MEGATRON}.alpha: -1 is out of range"),
        ([f"{MEGATRON}.dropout=1"], "defaults: tiny\n", f"{MEGATRON}.dropout: 1 is out of range"),
        ([f"{MEGATRON}.enabled=yes"], "defaults: tiny\n", f"{MEGATRON}.enabled: 'yes' is not true or false"),
        ([f"{MEGATRON}.lora_dtype=float16"], "defaults: tiny\n",
         f"{MEGATRON}.lora_dtype: 'float16' is not one of the choices (from command line). Allowed: float32, bfloat16"),
        ([f"{DTENSOR}.lora_A_init=normal"], "defaults: tiny\n", "Allowed: xavier, uniform"),
        ([f"{MEGATRON}.target_modules=[3]"], "defaults: tiny\n", f"{MEGATRON}.target_modules.0: 3 is not text"),
        ([f"{MEGATRON}.restore_from=/a/b"], "defaults: tiny\n",
         f"{MEGATRON}.restore_from: starting from the adapter of another run is not supported (from command line)."),
        ([f"{MEGATRON}.target_modules=[linear_qkv]", f"{MEGATRON}.exclude_modules=[linear_fc1]"], "defaults: tiny\n",
         f"{MEGATRON}.exclude_modules: target_modules and exclude_modules are both given (from command line)."),
        ([f"{MEGATRON}.target_modules=[q_proj]"], "defaults: tiny\n",
         f"{MEGATRON}.target_modules: 'q_proj' matches no module (from command line). Allowed: linear_qkv, "
         "linear_proj, linear_fc1, linear_fc2. q_proj is part of linear_qkv here: write linear_qkv, or adapt it by "
         "itself with peft.type=canonical_lora."),
        # What is meant and would be passed over.
        (["policy.megatron_cfg.pfet.dim=4"], "defaults: tiny\n", f"Did you mean {MEGATRON}?"),
        (["policy.dtensor_cfg.peft.dim=4"], "defaults: tiny\n", f"Did you mean {DTENSOR}?"),
        (["policy.megatorn_cfg.peft.dim=4"], "defaults: tiny\n", "Did you mean policy.megatron_cfg?"),
        (["policy=3"], "defaults: tiny\n", "policy: 3 is not a section with keys (from command line)"),
        ([f"{MEGATRON}=3"], "defaults: tiny\n", f"{MEGATRON}: 3 is not a section with keys (from command line)"),
    ],
)  # fmt: skip
def test_a_fault_is_told_where_it_was_written(overrides, mine, message, tmp_path):
    assert message in refused(tmp_path, *overrides, mine=mine)


def test_all_faults_are_told_at_once(tmp_path):
    wrong = ["dmi=1", "dim=0", "alpha=x", "dropout=1", "dropout_position=mid"]
    message = refused(
        tmp_path, *(f"{MEGATRON}.{text}" for text in wrong), "train.train_iters=no", mine="defaults: tiny\n"
    )
    assert re.findall(r"^[\w.]+", message, re.M) == [
        f"{MEGATRON}.dim", f"{MEGATRON}.alpha", f"{MEGATRON}.dropout", f"{MEGATRON}.dropout_position",
        f"{MEGATRON}.dmi", "train.train_iters",
    ]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.key)
def test_a_block_takes_what_our_keys_take(block):
    """Every field has an annotation of ours or a reason not to, and none is called twice."""
    schema = block.schema().model_fields
    assert set(schema) == {*block.fields, *block.own}
    for field, ours in block.fields.items():
        info = section_class(block.method).model_fields[ours]
        assert schema[field].annotation == info.annotation
        assert schema[field].metadata == info.metadata


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("megatron.bridge.peft.lora.LoRA", "lora"),
        ("megatron.bridge.peft.dora.DoRA", "dora"),
        ("megatron.bridge.peft.canonical_lora.CanonicalLoRA", "canonical_lora"),
    ],
)
def test_megatron_bridge_s_target_is_a_type(target, expected, tmp_path):
    made = composed(tmp_path, mine=f"defaults: tiny\npeft: {{_target_: {target}, dim: 4}}\n")
    assert made.data["peft"] == {"type": expected, "dim": 4, "alpha": 32}
    assert made.sources["peft.type"] == "mine.yaml:2"


@pytest.mark.parametrize("target", ["megatron.bridge.peft.lora.VLMLoRA", "peft.LoraConfig", "lora", 3])
def test_another_target_is_refused(target, tmp_path):
    message = refused(tmp_path, mine=f"defaults: tiny\npeft: {{_target_: {target}}}\n")
    assert "peft._target_: " in message
    assert "is no adapter method that is known here (from mine.yaml:2). Allowed: peft.type adalora, " in message


def test_reading_it_imports_no_torch():
    code = (
        "import sys; from steps.peft.megatron_bridge.schema import Config;"
        "Config.adopt({'policy': {'megatron_cfg': {'peft': {'dim': 4}}}}, {});"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'omegaconf')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
