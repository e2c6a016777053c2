"""Bad settings of the fine-tuning step as a person meets them: real processes, the message, the exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.packed import random_rows, write_base, write_packed
from support.steps import steps

STEP = "peft/megatron_bridge"
CONFIG = """
defaults: tiny
recipe: {seq_length: 48}
dataset: {nano3_packed_sft_dir: packed}
train: {train_iters: 1, eval_iters: 0}
scheduler: {lr_warmup_iters: 0}
peft: {dim: 2}
checkpoint: {pretrained_checkpoint: base, save: lora}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with and without its record, data, a configuration, and an adapter trained on them."""
    root = tmp_path_factory.mktemp("place")
    write_base(root / "base")
    write_base(root / "another", seed=7, fingerprint="another")
    shutil.copytree(root / "base", root / "bare")
    (root / "bare" / "artifact.json").unlink()
    write_packed(root / "packed", random_rows(4))
    (root / "mine.yaml").write_text(CONFIG)
    done = steps("run", STEP, "-c", "mine.yaml", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft.dim=33"], "peft.dim: rank 33 is above that of linear_qkv, which is [64, 32] (and 3 more"),
        (["peft.target_modules=[linear_qvk]"], "peft.target_modules: 'linear_qvk' matches no module"),
    ],
)  # fmt: skip
def test_a_misfit_has_the_same_words_and_code_before_the_start_and_in_the_job(place, overrides, message):
    """The job finds it only where the base has no record to tell its shape beforehand."""
    for options in (["-d"], ["checkpoint.pretrained_checkpoint=bare"]):
        done = steps("run", STEP, "-c", "mine.yaml", *options, "checkpoint.save=lora2", *overrides, cwd=place)
        assert message in done.stderr + done.stdout
        assert done.returncode == 3
        assert not (place / "lora2").exists()


def test_a_real_run_says_too_what_has_no_effect(place):
    asked = ["peft.type=waveft", "peft.n_frequency=9", "policy.max_grad_norm=0.1"]
    done = steps("run", STEP, "-c", "mine.yaml", *asked, "checkpoint.save=wave", cwd=place)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert "note: peft.dim: waveft has no such setting; 2 (mine.yaml:7) is left out" in notes
    assert any("policy.max_grad_norm" in note for note in notes)
    assert json.loads((place / "wave" / "artifact.json").read_text())["facts"]["method"] == "waveft"


def test_nemo_rl_s_block_is_run_and_only_our_keys_are_written_down(place):
    block = "policy.dtensor_cfg.lora_cfg"
    asked = [f"{block}.dim=3", f"{block}.target_modules=[q_proj,down_proj]", f"{block}.use_triton=true"]
    sheet = steps("run", STEP, "-c", "mine.yaml", "-d", "--json", *asked, "checkpoint.save=lora3", cwd=place)
    (told,) = json.loads(sheet.stdout)["steps"]
    assert f"{block}: read as peft, type canonical_lora" in told["notes"]
    assert f"{block}.use_triton: has no effect here: the engine chooses its kernels" in told["notes"]
    assert told["config"]["peft"] == {
        "dim": 3, "type": "canonical_lora", "alpha": 32, "target_modules": ["q_proj", "down_proj"],
    }  # fmt: skip
    done = steps("run", STEP, "-c", "mine.yaml", *asked, "checkpoint.save=lora3", cwd=place)
    assert done.returncode == 0, done.stderr
    record = json.loads((place / "lora3" / "artifact.json").read_text())
    assert record["facts"]["method"] == "canonical_lora"
    assert record["facts"]["dim"] == 3
    job = max((place / ".steps" / "jobs").iterdir())
    assert not any("policy" in (job / name).read_text() for name in ("job.yaml", "config.yaml"))
    again = steps("jobs", "rerun", job.name, cwd=place)
    assert "nothing to do" in again.stdout
    assert again.returncode == 0


def test_a_file_handed_straight_to_the_step_may_hold_the_block_too(place):
    path = place / "direct.yaml"
    made = steps("run", STEP, "-c", "mine.yaml", "-d", "--json", "checkpoint.save=lora4", cwd=place)
    config = json.loads(made.stdout)["steps"][0]["config"]
    del config["peft"]["dim"], config["peft"]["alpha"]
    config["policy"] = {"megatron_cfg": {"peft": {"dim": 3, "alpha": 6, "a2a_experimental": False}}}
    command = [sys.executable, "-m", "steps.peft.megatron_bridge.step", "--config", str(path)]
    for dim, code, message in (
        (0, 3, "error: policy.megatron_cfg.peft.dim: 0 is out of range (from direct.yaml:1)"),
        (3, 0, "policy.megatron_cfg.peft: read as peft, type lora"),
    ):
        config["policy"]["megatron_cfg"]["peft"]["dim"] = dim
        path.write_text(json.dumps(config))
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        assert message in done.stdout + done.stderr
        assert done.returncode == code
    assert json.loads((place / "lora4" / "artifact.json").read_text())["facts"]["dim"] == 3


@pytest.mark.parametrize("damage", ["another base", "truncated", "truncated, no record", "method", "setting"])
def test_an_adapter_that_cannot_be_merged(place, damage, tmp_path):
    adapter = tmp_path / "lora"
    shutil.copytree(place / "lora", adapter)
    overrides = ["base_megatron_path=base"]
    (folder,) = adapter.glob("iter_*")
    if damage == "another base":
        overrides, message = ["base_megatron_path=another"], "was trained on another base than another (fingerprints"
    elif damage.startswith("truncated"):
        part = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        message = f"is damaged: {folder.name}/{part.name} is missing or has another size"
        if "no record" in damage:
            (adapter / "artifact.json").unlink()
            message = f"{folder} is damaged: decoder.layers."
    else:
        (adapter / "artifact.json").unlink()
        run_config = folder / "run_config.yaml"
        line, message = {
            "method": ("  type: hyperlora\n", "adapter.type: the adapter's method 'hyperlora' is not known to this"),
            "setting": ("  type: lora\n  decay: 3\n", "adapter.decay: the setting decay of lora is not known to this"),
        }[damage]
        text = run_config.read_text()
        assert "  type: lora\n" in text
        run_config.write_text(text.replace("  type: lora\n", line))
    done = steps(
        "run", "convert/merge_lora", "-c", "tiny", *overrides, f"lora_checkpoint={adapter}",
        f"output_hf_path={tmp_path / 'merged'}", cwd=place,
    )  # fmt: skip
    assert message in done.stderr + done.stdout
    assert done.returncode == 4
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "merged").exists()
