"""peft/compare: ordinary jobs side by side, each once; what fails is told and takes nothing with it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.packed import PACK_SIZE, random_decoder, random_rows, write_base, write_packed

from steps import machine
from steps.artifacts.opening import open_artifact
from steps.artifacts.record import read
from steps.config import yaml12
from steps.config.validate import validate
from steps.errors import ConfigError
from steps.peft.compare.schema import BASE, DATA, Config

pytest.importorskip("matplotlib", reason="extra report")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    write_base(path / "base", true=True)
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


def config(inputs: Path, variants: list[dict], **changes) -> dict:
    data = {
        "engine": "torch",
        "recipe": {"seq_length": PACK_SIZE},
        "dataset": {"nano3_packed_sft_dir": str(inputs / "packed")},
        "train": {"train_iters": 4, "global_batch_size": 4, "eval_interval": 2, "eval_iters": 2},
        "peft": {"type": "lora", "dim": 4, "alpha": 8},
        "checkpoint": {"pretrained_checkpoint": str(inputs / "base"), "save": "runs"},
        "variants": variants,
        "seeds": [7],
        "output_dir": "report",
    }
    return data | changes


def compare(cwd: Path, data: dict, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(cwd, data), cwd=cwd, capture_output=True, text=True, timeout=timeout)


def command(cwd: Path, data: dict) -> list[str]:
    (cwd / "compare.yaml").write_text(yaml12.dump(data))
    return [sys.executable, "-m", "steps", "run", "peft/compare", "-c", "compare.yaml"]


def jobs(cwd: Path) -> list[str]:
    return sorted(str(path.relative_to(cwd)) for path in cwd.glob("runs/*/*/.steps/jobs/*"))


def report(cwd: Path) -> dict:
    return json.loads((cwd / "report" / "report.json").read_text())


LORA = {"name": "lora", "set": ["peft.dim=2", "peft.alpha=4"], "lr": [0.001, 0.02]}
FULL = {"name": "full", "set": ["peft=null"], "lr": [0.003]}
WILD = {"name": "wild", "set": [], "lr": [1e30]}


@pytest.fixture(scope="module")
def compared(inputs, tmp_path_factory):
    """Two that end well and one that cannot, and the same command once more."""
    cwd = tmp_path_factory.mktemp("compared")
    data = config(inputs, [LORA, WILD, FULL], seeds=[7, 8], parallel=2)
    first = compare(cwd, data)
    before = jobs(cwd), report(cwd) if first.returncode == 0 else {}
    return cwd, first, before, compare(cwd, data)


def test_every_variant_has_its_row_and_a_failure_takes_no_other_with_it(compared):
    _, first, (started, told), _ = compared
    assert first.returncode == 0, first.stdout + first.stderr
    rows = {row["name"]: row for row in told["variants"]}
    assert list(rows) == ["lora", "wild", "full"]
    assert rows["wild"]["error"]
    assert rows["wild"]["runs"] == 0
    assert "non_finite_loss" in rows["wild"]["error"]
    assert "Failed: wild. The same command runs only what is missing." in told["remarks"]
    assert (rows["lora"]["runs"], rows["full"]["runs"]) == (2, 2)
    # Two rates from the first seed, the better one from the second; one rate from both; the wild one once.
    runs = [(run["variant"], run["lr"], run["seed"]) for run in told["runs"]]
    best = min((run for run in told["runs"] if run["variant"] == "lora" and run["seed"] == 7),
               key=lambda run: run["valid_loss"])  # fmt: skip
    assert sorted(runs) == sorted(
        [("lora", 0.001, 7), ("lora", 0.02, 7), ("lora", best["lr"], 8), ("wild", 1e30, 7),
         ("full", 0.003, 7), ("full", 0.003, 8)]
    )  # fmt: skip
    assert rows["lora"]["lr"] == best["lr"]
    assert len(started) == 6


def test_numbers_are_those_of_the_runs_own_records(compared):
    _, _, (_, told), _ = compared
    row = next(row for row in told["variants"] if row["name"] == "full")
    losses = []
    for run in (run for run in told["runs"] if run["variant"] == "full"):
        facts = read(Path(run["directory"]) / "checkpoint").facts
        losses.append(facts["valid_loss_last"])
        assert run["base_loss"] == facts["valid_loss_first"]
        assert run["trainable"] == facts["trainable_parameters"] == facts["parameters"]
        assert [number for number, _ in run["curve"]] == [1, 2, 3, 4]
        assert [number for number, _ in run["valid"]] == [0, 2, 4]
        assert run["curve"][0][1] == facts["loss_first"]
        assert run["peak_bytes"] > 1e8
    assert row["valid_loss"] == {"mean": pytest.approx(sum(losses) / 2), "low": min(losses), "high": max(losses)}
    assert row["share"] == 1.0
    lora = next(row for row in told["variants"] if row["name"] == "lora")
    assert lora["share"] == pytest.approx(lora["trainable"] / (lora["parameters"] + lora["trainable"]))
    assert told["base_loss"] == pytest.approx(told["runs"][0]["base_loss"])


def test_table_pictures_and_page(compared):
    cwd, *_ = compared
    place = cwd / "report"
    table = (place / "table.md").read_text()
    lines = table.splitlines()
    assert lines[0].startswith("| variant | method | learning rate | trained parameters | share | valid loss |")
    assert lines[-1].startswith("- ")
    assert "| wild | - | 1e+30 |" in table
    assert {path.stem for path in place.glob("*.png")} == {"parameters", "time", "memory", "curves"}
    for picture in place.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert (place / f"{picture.stem}.svg").read_text().count("<svg") == 1
    page = (place / "report.html").read_text()
    assert page.count("<svg") == 4
    # Nothing is fetched: the only addresses are names of XML namespaces.
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page.replace('xlink:href="#', 'href="#'))
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    record = read(place)
    assert record.type == "comparison_report"
    assert list(record.facts["variants"]) == ["lora", "wild", "full"]
    assert record.facts["variants"]["full"]["lr"] == 0.003
    assert "non_finite_loss" in record.facts["variants"]["wild"]["error"]


def test_the_same_command_runs_only_what_is_missing(compared):
    cwd, _, (started, told), second = compared
    assert second.returncode == 0, second.stderr
    new = sorted(set(jobs(cwd)) - set(started))
    assert len(new) == 1
    assert new[0].startswith("runs/wild/")
    again = report(cwd)
    for run in (*told["runs"], *again["runs"]):
        if run["error"]:  # measured anew
            run.update(seconds=None, peak_bytes=None)
    assert again == told


def test_stopped_and_given_again_it_comes_to_the_same_report(inputs, tmp_path):
    """Stopped while a run trains: that run goes on, the one before it is not started again."""
    quick = {"name": "quick", "set": ["peft.dim=2", "peft.alpha=4"]}
    long = {"name": "long", "set": ["train.train_iters=400", "checkpoint.save_interval=1", "train.eval_interval=0"]}
    data = config(inputs, [quick, long])
    (tmp_path / "whole").mkdir()
    assert compare(tmp_path / "whole", data).returncode == 0
    cwd = tmp_path / "stopped"
    cwd.mkdir()
    process = subprocess.Popen(command(cwd, data), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not list(cwd.glob("runs/long/*/checkpoint/iter_0000003")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not (cwd / "report").exists()
    # Nothing of it still runs.
    assert not subprocess.run(["pgrep", "-f", str(cwd)], capture_output=True).stdout
    before = jobs(cwd)
    assert len(before) == 2
    assert compare(cwd, data).returncode == 0
    assert len(set(jobs(cwd)) - set(before)) == 1
    one, other = report(tmp_path / "whole"), report(cwd)
    for run, again in zip(one["runs"], other["runs"], strict=True):
        for key in ("variant", "lr", "seed", "valid_loss", "curve", "trainable", "error"):
            assert run[key] == again[key], key


def faults(inputs, variants, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Config, config(inputs, variants, **changes))
    return str(caught.value)


def test_everything_that_is_wrong_is_told_at_once_before_anything_trains(inputs):
    wrong = [
        {"name": "a", "set": ["peft.type=lroa"]},
        {"name": "b", "set": ["peft.dmi=4"]},
        {"name": "b", "set": ["optimizer.lr=fast"]},
        {"name": "c", "set": ["peft.dim"]},
        {"name": "d", "set": ["rng.seed=5"]},
        {"name": "../e", "set": []},
        {"name": "f", "set": ["~checkpoint"]},
        {"name": "g", "set": ["~train.ietrs"]},
    ]
    told = faults(inputs, wrong)
    for part in (
        "variants.0 (a): peft.type:", "variants.1 (b): peft.dmi: unknown key", "Did you mean peft.dim?",
        "variants.2 (b): optimizer.lr:", "variants.3 (c): peft.dim: is neither an option nor key=value",
        "variants.4 (d): rng.seed: is decided by the comparison", "2 variants are named 'b'", "'../e' is no name",
        "variants.6 (f): checkpoint: is decided", "variants.7 (g): train.ietrs: there is no such key to delete",
    ):  # fmt: skip
        assert part in told, part
    assert "seeds: [3, 3] holds a seed twice" in faults(inputs, [LORA], seeds=[3, 3])
    with pytest.raises(ConfigError, match=r"variants.0.sett: unknown key"):
        validate(Config, config(inputs, [{"name": "a", "sett": []}]))


def test_a_variant_of_another_method_leaves_the_common_methods_settings_behind(inputs):
    peft = {"type": "lora", "dim": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["linear_qkv"]}
    variants = [{"name": "v", "set": ["peft.type=vblora"]}, {"name": "l", "set": []}]
    typed, _ = validate(Config, config(inputs, variants, peft=peft))
    one, other = (variant.trial(typed.common(), None, 7, typed.runs) for variant in typed.compared)
    assert one.config["peft"] == {"type": "vblora", "dim": 4, "dropout": 0.1, "target_modules": ["linear_qkv"]}
    assert other.config["peft"] == peft


def test_a_variant_is_any_dotlist(inputs):
    data = config(
        inputs, [{"name": "v", "set": ["~train.eval_iters", "+train.log_interval=2", "peft.target_modules.0=x"]}]
    )
    data["peft"] = {"type": "lora", "target_modules": ["linear_qkv", "linear_proj"]}
    typed = Config.model_validate(data)
    (variant,) = typed.compared
    made = variant.trial(typed.common(), None, 7, typed.runs).config
    assert made["train"] == {"train_iters": 4, "global_batch_size": 4, "eval_interval": 2, "log_interval": 2}
    assert made["peft"]["target_modules"] == ["x", "linear_proj"]


def test_data_made_anew_at_the_same_path_are_other_data(inputs):
    typed, _ = validate(Config, config(inputs, [LORA]))
    (variant,) = typed.compared
    one, other = (variant.trial(typed.common(), 0.1, 7, typed.runs, [digest]) for digest in ("a", "b"))
    assert one.directory != other.directory
    assert one.config["peft"] == other.config["peft"]


def check_inputs(inputs, data):
    typed, _ = validate(Config, data)
    opened = {
        DATA: open_artifact(str(inputs / "packed"), "packed_parquet", DATA),
        BASE: open_artifact(str(inputs / "base"), "checkpoint_megatron", BASE),
    }
    return list(typed.check_inputs(opened))


def test_what_the_base_cannot_take_is_told_before_anything_trains(inputs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wide = {"name": "wide", "set": ["peft.dim=400"]}
    (problem,) = check_inputs(inputs, config(inputs, [LORA, wide]))
    assert problem.where == "variants.1 (wide): peft.dim"
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "available_bytes", lambda: 300_000_000)
    problems = check_inputs(inputs, config(inputs, [LORA, FULL]))
    assert [problem.name for problem in problems] == ["not_enough_memory"] * 2
    assert problems[1].where == "variants.1 (full)"
    assert "the expected peak of" in problems[1].what
    monkeypatch.setattr(machine, "available_bytes", lambda: 700_000_000)
    (problem,) = check_inputs(inputs, config(inputs, [LORA, FULL], parallel=2))
    assert problem.where == "parallel"
    assert not check_inputs(inputs, config(inputs, [LORA, FULL], parallel=1))


def test_a_dry_run_shows_what_each_variant_comes_to(inputs, tmp_path):
    variants = [{"name": "lora", "set": []}, {"name": "full", "set": ["peft=null"]}]
    data = config(inputs, variants)
    shown = subprocess.run([*command(tmp_path, data), "-d"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout[shown.stdout.index("NAME ") :].splitlines()
    whole = sum(value.numel() for value in random_decoder().parameters())
    lora = 2 * 4 * sum((32 + 64, 32 + 32, 32 + 2 * 48, 48 + 32))  # layers, rank, in + out of each linear
    assert [line.split()[:2] for line in lines[1:3]] == [["lora", f"{lora:,}"], ["full", f"{whole:,}"]]
    told = subprocess.run(
        [*command(tmp_path, data), "-d", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    step = json.loads(told.stdout)["steps"][0]
    assert step["account"] is None
    peaks = {name: account["memory_bytes"] for name, account in step["accounts"].items()}
    assert peaks["full"] > peaks["lora"] > 0
