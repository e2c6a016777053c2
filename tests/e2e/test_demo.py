"""The demo's promises and every command of the README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Shell lines of the README that are rehearsed here, not run: the demo itself, this test suite, a run of an hour.
NOT_RUN = {"make demo", "make test", "steps run peft/compare -c tweets --upstream parallel=2"}


def summaries(directory: Path) -> dict[str, dict]:
    jobs = (path for path in (directory / ".steps/jobs").iterdir() if (path / "summary.json").exists())
    return {re.sub(r"^\d+-\d+-|-\w+$", "", job.name): json.loads((job / "summary.json").read_text()) for job in jobs}


def test_the_chain_ran_in_order_and_the_loss_fell(demo):
    directory, output = demo.directory, demo.output
    order = re.findall(r"^\[\d/5\] (\S+)", output, flags=re.M)
    assert order[-2:] == ["peft/megatron_bridge", "convert/merge_lora"]
    assert len(order) == 5
    training = summaries(directory)["peft-megatron_bridge"]
    assert training["loss_last"] < training["loss_first"] - 0.1
    assert f"{training['loss_last']:,.4g}" in output
    assert summaries(directory)["convert-merge_lora"]["sample_answer"].strip() in output


def test_the_demo_fits_into_a_small_machine(demo):
    assert demo.peak_bytes < 4e9


def test_the_loss_curve_itself_fell(demo):
    directory = demo.directory
    (job,) = (directory / ".steps/jobs").glob("*peft-megatron_bridge*")
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    third = len(losses) // 3
    assert sum(losses[-third:]) / third < sum(losses[:third]) / third - 0.1


def test_the_merged_model_answers_in_transformers(demo):
    transformers = pytest.importorskip("transformers")
    import torch

    path = demo.directory / "output/tiny/merged"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])


def test_a_second_run_of_the_chain_makes_only_what_is_missing(demo):
    directory = demo.directory
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["steps", "run", "convert/merge_lora", "-c", "tiny", "--upstream", "-d", "--json"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert [entry["step"] for entry in json.loads(done.stdout)["steps"]] == ["convert/merge_lora"]


def test_every_command_of_the_readme_works_as_it_stands(demo):
    directory = demo.directory
    text = (ROOT / "README.md").read_text()
    before, _, cluster = text.partition("## On a cluster\n")
    text = before + cluster.partition("\n## ")[2]  # test_documented_commands.py has those
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    shown = {line.partition("#")[0].strip() for kind, body in blocks if kind != "bash" for line in body.splitlines()}
    assert shown - {""} == NOT_RUN
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in NOT_RUN:
        dry = "-n" if command.startswith("make ") else "-d"
        subprocess.run([*command.split(), dry], cwd=ROOT, env=environment, check=True, capture_output=True)
    for kind, body in blocks:
        if kind == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", body], cwd=directory, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, body + done.stdout + done.stderr
    # The commands in the table of the demo are the same steps, one by one: each finds its work done, or does it again.
    table = re.findall(r"^\| `(steps run [^`]+)`", text, flags=re.M)
    assert len(table) == 5
    for command in table:
        done = subprocess.run(command.split(), cwd=directory, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_make_demo_in_a_fresh_clone(tmp_path):
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    done = subprocess.run(["make", "demo"], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sample answer: " in done.stdout


def test_the_flow_picture_shows_every_step_and_the_readme_lists_it():
    from steps.dispatch import catalog

    picture, readme = (ROOT / "docs/flow.svg").read_text(), (ROOT / "README.md").read_text()
    for step in catalog.catalog().values():
        assert f">{step.id}<" in picture
        assert f"[{step.id}]" in readme
