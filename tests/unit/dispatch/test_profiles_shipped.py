"""The profiles in the package: one for each step, usable as they are; the starters of `steps profiles init`."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

import pytest

from steps.dispatch import catalog, profiles
from steps.dispatch.plan import Place, prepare
from steps.dispatch.profiles import env_files

SHIPPED = profiles.names(env_files.tables(os.devnull))
STARTERS = sorted((env_files.SHIPPED / "starters").glob("*.toml"))
KINDS = ("slurm", "lepton")


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path, monkeypatch):
    """An empty project directory and a shell in which nothing is set but what Python needs."""
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    for name in set(os.environ) - {"PATH", "HOME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"}:
        monkeypatch.delenv(name)


def profile_of(kind: str, step: str) -> str:
    category, _, name = step.partition("/")
    return f"{kind}_{category.removeprefix('data_')}_{name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", sorted(catalog.catalog()))
def test_every_step_has_a_profile_with_which_its_default_can_be_planned(kind, step):
    name = profile_of(kind, step)
    assert name in SHIPPED
    planned = prepare(catalog.find(step), "default", place=Place(name, attached=False))
    assert not planned.problems
    assert planned.spec.executor == kind
    assert planned.spec.image.startswith("nvcr.io/nvidia/nemo:")
    gpus = planned.spec.environment.gpus_per_node
    one_gpu = step.startswith("eval/") or step == "peft/compare"
    expected = (8, 8) if step.endswith("/megatron_bridge") else (1, 1) if one_gpu else (1, 0)
    assert (planned.spec.nprocs, gpus) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_is_sound_and_described(name):
    found = profiles.load(name)
    assert found.description
    assert found.chain[0].startswith("profiles/")


def test_no_name_is_shipped_twice():
    every = [name for path in env_files.SHIPPED.glob("*.toml") for name in env_files.tomllib.loads(path.read_text())]
    assert sorted(every) == sorted(SHIPPED)


def test_the_files_are_inside_the_package_and_at_the_root_of_the_repository():
    inside = resources.files("steps") / "profiles"
    assert {entry.name for entry in inside.iterdir() if entry.name.endswith(".toml")} == {
        "local.toml",
        "slurm.toml",
        "lepton.toml",
    }
    root = Path(__file__).parents[3] / "profiles"
    assert root.resolve() == env_files.SHIPPED.resolve()


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_find_each_others_output_on_shared_storage(kind, monkeypatch):
    monkeypatch.setenv("STEPS_WORKSPACE", "/shared/me")

    def paths(step: str, *keys: str) -> list[str]:
        config = prepare(catalog.find(step), "default", place=Place(profile_of(kind, step))).spec.config
        found = []
        for key in keys:
            value = config
            for part in key.split("."):
                value = value[part]
            found.append(os.path.normpath(value))
        return found

    [packed] = paths("data_prep/sft_packing", "output_dir")
    [base] = paths("convert/hf_to_megatron", "megatron_path")
    training = paths(
        "peft/megatron_bridge",
        "dataset.nano3_packed_sft_dir",
        "checkpoint.pretrained_checkpoint",
        "checkpoint.save",
    )
    lora, merged_base = paths("convert/merge_lora", "lora_checkpoint", "base_megatron_path")
    assert training == [packed, base, lora]
    assert merged_base == base
    assert paths("convert/megatron_to_hf", "megatron_path") == [base]
    assert paths("data_prep/sft_packing", "blend_path") == ["/shared/me/data/blend.json"]
    assert all(path.startswith("/shared/me/") for path in (packed, base, lora))


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "lepton",
            ["peft.dim=16", "recipe.seq_length=8192", "train.train_iters=2000"],
            {"dim": 16, "seq_length": 8192, "train_iters": 2000},
        ),
        (
            "slurm",
            ["peft.dim=32", "recipe.tensor_model_parallel_size=8", "train.global_batch_size=64"],
            {"dim": 32, "tensor_model_parallel_size": 8, "global_batch_size": 64},
        ),
    ],
)
def test_the_documented_commands_plan(kind, overrides, expected):
    step = catalog.find("peft/megatron_bridge")
    planned = prepare(step, "default", overrides, place=Place(f"{kind}_peft_megatron_bridge", attached=kind != "slurm"))
    assert not planned.problems
    config = planned.spec.config
    assert {**config["peft"], **config["recipe"], **config["train"]}.items() >= expected.items()
    assert planned.spec.torchrun
    assert planned.spec.image == "nvcr.io/nvidia/nemo:25.11.nemotron_3_nano"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_come_from_the_shell_and_are_passed_as_secrets(kind, monkeypatch):
    step = catalog.find("peft/megatron_bridge")
    place = Place(f"{kind}_peft_megatron_bridge")
    assert prepare(step, "default", place=place).spec.secret_env == {}
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_shell")
    spec = prepare(step, "default", place=place).spec
    assert spec.secret_env == {"HF_TOKEN": "hf_of_the_shell"}
    assert "hf_of_the_shell" not in repr((spec.config, spec.env, spec.environment))


# The starters


def uncommented(text: str) -> str:
    """The file with every value switched on that stands there as a comment."""
    return re.sub(r"^# (?=\[|\"?\w+\+?\"? = )", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.stem)
def test_a_starter_is_readable_in_a_terminal_of_80_columns(path):
    assert max(map(len, path.read_text().splitlines())) < 80


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.stem)
def test_a_starter_carries_every_shipped_profile_of_its_kind(path):
    Path("env.toml").write_text(path.read_text())
    for name in SHIPPED:
        if name.startswith(f"{path.stem}_") and not name.endswith("_defaults"):
            found = profiles.load(name)
            assert f"env.toml [{path.stem}_base]" in found.chain
            assert f"profiles/{path.stem}.toml [{path.stem}_defaults]" in found.chain


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.stem)
def test_what_a_starter_shows_as_a_comment_works_too(path, monkeypatch):
    text = uncommented(path.read_text())
    assert text.count("#") < path.read_text().count("#") - 5
    # What is there with and without the sign is there twice.
    seen, lines = set(), []
    for line in text.splitlines():
        key = line.partition("=")[0].strip() if "=" in line and not line.startswith("#") else None
        if line.startswith("["):
            seen = set()
        if key is None or key not in seen:
            lines.append(line)
        seen.add(key)
    Path("env.toml").write_text(re.sub(r"<[^<>]+>", "/shared", "\n".join(lines)))
    for name in [f"{path.stem}_cpu_base", "two_nodes", f"{path.stem}_peft_megatron_bridge"]:
        assert profiles.load(name).executor == path.stem
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_shell")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path(".ssh").mkdir()
    Path(".ssh/id_ed25519").touch()
    planned = prepare(catalog.find("peft/megatron_bridge"), "default", place=Place("two_nodes"))
    assert not planned.problems
    assert planned.spec.nodes == 2
    assert planned.spec.secret_env == ({"HF_TOKEN": "hf_of_the_shell"} if path.stem == "slurm" else {})


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.stem)
def test_a_starter_filled_in_can_be_planned(path):
    Path("env.toml").write_text(re.sub(r"<[^<>]+>", "/shared", path.read_text()))
    planned = prepare(catalog.find("peft/megatron_bridge"), "default", place=Place(f"{path.stem}_peft_megatron_bridge"))
    assert not planned.problems
    assert planned.spec.env["HF_HOME"] == ("/shared/hf" if path.stem == "slurm" else "/mnt/shared/hf")
