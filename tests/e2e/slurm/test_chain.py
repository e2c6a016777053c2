"""The tiny chain as Slurm jobs that wait for each other, followed from other processes to a merged model."""

from __future__ import annotations

import json
import time

from support.steps import steps


def test_a_chain_is_submitted_at_once_and_ends_in_a_merged_model(cluster, tmp_path):
    profile = '[here]\nexecutor = "slurm"\ntime = "20"\nenv_vars = {OMP_NUM_THREADS = "1"}\n'
    (tmp_path / "env.toml").write_text(profile)

    def run(*arguments: str, code: int = 0) -> str:
        done = steps(*arguments, cwd=tmp_path, env=cluster.env)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    started = time.monotonic()
    said = run(
        "run", "peft/megatron_bridge", "-c", "tiny", "--upstream", "-b", "here",
        "train.train_iters=3", "train.global_batch_size=2", "train.eval_iters=1", "scheduler.lr_warmup_iters=0",
    )  # fmt: skip
    assert [line.split(":")[0].split()[-3] for line in said.splitlines()[:4]] == [
        "data_prep/demo_chat", "data_prep/sft_packing", "convert/hf_to_megatron", "peft/megatron_bridge",
    ]  # fmt: skip
    assert said.count(", waits for") == 2
    assert time.monotonic() - started < 120, "it waited for the jobs"
    run("run", "convert/merge_lora", "-c", "tiny", "-b", "here", "--after", "latest")
    listed = json.loads(run("jobs", "list", "--json"))
    assert [row["step"] for row in listed] == [
        "data_prep/demo_chat", "data_prep/sft_packing", "convert/hf_to_megatron", "peft/megatron_bridge",
        "convert/merge_lora",
    ]  # fmt: skip
    run("jobs", "logs", "-f", "merge_lora")
    listed = json.loads(run("jobs", "list", "--json"))
    assert {row["state"] for row in listed} == {"succeeded"}, listed
    times = {row["step"]: (row["started_at"], row["ended_at"]) for row in listed}
    assert times["data_prep/demo_chat"][1] <= times["data_prep/sft_packing"][0]
    assert times["peft/megatron_bridge"][1] <= times["convert/merge_lora"][0]
    record = json.loads((tmp_path / "output/tiny/merged/artifact.json").read_text())
    assert record["producer"]["job"] == listed[-1]["id"]
    assert "succeeded" in run("jobs", "status", "merge_lora")
