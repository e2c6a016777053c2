"""The command line as a person types it: real processes, exit codes, messages, and nothing heavy imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.steps import steps

HEAVY = ("torch", "transformers", "nemo_run", "pyarrow", "numpy", "tokenizers")
LIGHT = [
    ["list"],
    ["list", "--tree"],
    ["list", "--json"],
    ["show", "peft/megatron_bridge"],
    ["show", "sft_packing", "--json"],
    ["run", "data_prep/demo_chat", "-c", "tiny", "-d"],
    ["run", "convert/merge_lora", "-c", "tiny", "--upstream", "-d"],
    ["run", "convert/merge_lora", "-c", "tiny", "--upstream", "-d", "--json"],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_the_front_door_is_light(arguments, tmp_path):
    code = (
        "import sys\nfrom steps.dispatch.cli import main\n"
        f"sys.argv = ['steps', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] == ["[]"]
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".steps").exists(), "a dry run leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        # A typo never runs a job (the model project executes it).
        (["run", "peft/megatron_bridge", "-c", "tiny", "--dryrun"], 2, "--dryrun"),
        (["run", "peft/megatron_bridge", "-c", "tiny", "--dry"], 2, "--dry"),
        (["run", "peft/megatron_bridge", "-c", "tiny", "dryrun"], 2, "dryrun: is neither an option nor key=value"),
        (["run", "peft/megatron_brigde", "-c", "tiny", "-d"], 2, "Did you mean peft/megatron_bridge?"),
        (["run", "merge_lroa", "-d"], 2, "Did you mean merge_lora?"),
        (["run", "peft/megatron_bridge", "-r", "local", "-b", "local"], 2, "-r and -b exclude each other"),
        (["run", "demo_chat", "-c", "tiny", "-d", "--force-squash"], 2, "--force-squash re-imports a container image"),
        (["run", "demo_chat", "-c", "tiny", "--json"], 2, "--json goes with --dry-run"),
        (["list", "--", "x"], 2, "only `run` takes arguments behind --"),
        (["list", "--produces", "packed_parket"], 2, "Did you mean packed_parquet?"),
        (["list", "--category", "pefft"], 2, "Did you mean peft?"),
        (["show", "nothing"], 2, "there is no step 'nothing'"),
        (["run", "peft/megatron_bridge", "-c", "tinny", "-d"], 3, "Did you mean tiny?"),
        (["run", "peft/megatron_bridge", "-c", "tiny", "-d", "peft.dmi=8"], 3, "Did you mean peft.dim?"),
        (["run", "peft/megatron_bridge", "-c", "tiny", "-d", "train=5"], 3, "train: 5 is not a section with keys"),
        (["run", "peft/megatron_bridge", "-c", "tiny", "-d", "peft.type=lorra"], 3, "Did you mean lora?"),
        (
            ["run", "peft/megatron_bridge", "-c", "tiny", "-d", "optimizer.lr=${oc.env:NOT_SET}"],
            3,
            "NOT_SET is not set",
        ),
        (["run", "peft/megatron_bridge", "-c", "tiny", "-d"], 4, "missing_packed_parquet"),
        (["run", "peft/megatron_bridge", "-c", "tiny"], 4, "missing_checkpoint_megatron"),
        (["run", "demo_chat", "-c", "tiny", "-d", "--", "--x"], 2, "takes no arguments behind --"),
        (["run", "peft/megatron_bridge", "-d", "peft.dmi=4", "train.train_iters=abc"], 3, "Did you mean peft.dim?"),
        (
            ["run", "demo_chat", "-c", "tiny", "-d", "output_dir=/etc/passwd/x"],
            4,
            "/etc/passwd is no directory",
        ),
        (["run", "demo_chat", "-c", "tiny", "-d", "output_dir=/etc"], 4, "was not made by steps"),
        (["run", "demo_chat", "-c", "tiny", "-d", f"output_dir={'x' * 300}"], 4, "name too long"),
        (["run", "demo_chat", "-c", "tiny", "-r", "nowhere"], 5, "there is no profile 'nowhere'"),
        (["run", "demo_chat", "-c", "tiny", "-d", "run.env.nodes=2"], 3, "run.env.nodes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_with_a_way_out(arguments, code, message, tmp_path):
    done = steps(*arguments, cwd=tmp_path)
    assert message in done.stderr, done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".steps").exists(), "nothing ran"


@pytest.mark.parametrize("config", ["tiny", "default"])
def test_all_mistakes_at_once_with_their_sources(config, tmp_path):
    done = steps(
        "run", "peft/megatron_bridge", "-c", config, "-d", "peft.dmi=8", "peft.dim=x", "trane.x=1", cwd=tmp_path
    )
    assert done.returncode == 3
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 3
    assert done.stderr.count("from command line") == 3


def test_an_output_inside_an_input_is_refused(tmp_path):
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text("{}\n")
    tiny = ["run", "sft_packing", "-c", "tiny", "-d", "blend_path=chats"]
    done = steps(*tiny, "output_dir=chats/packed", cwd=tmp_path)
    assert done.returncode == 4
    assert "output_dir: chats/packed lies in the input chats (blend_path)" in done.stderr
    assert steps(*tiny, "output_dir=packed", cwd=tmp_path).returncode == 0


def test_processes_for_a_step_that_takes_one_are_noted(tmp_path):
    done = steps("run", "demo_chat", "-c", "tiny", "-d", "run.env.nprocs_per_node=4", cwd=tmp_path)
    assert done.returncode == 0
    assert "data_prep/demo_chat always runs as one process" in done.stdout


def test_filters_follow_is_a(tmp_path):
    def found(*arguments):
        return {entry["id"] for entry in json.loads(steps("list", "--json", *arguments, cwd=tmp_path).stdout)}

    assert "data_prep/demo_chat" in found("--produces", "training_jsonl")
    assert "data_prep/sft_packing" in found("--consumes", "raw_jsonl")
    assert found("--produces", "checkpoint_lora") == {"convert/hf_to_lora", "peft/megatron_bridge"}
    assert found("--category", "convert", "--consumes", "checkpoint_lora") == {
        "convert/lora_to_hf",
        "convert/merge_lora",
    }


def test_tables_are_whole_in_a_pipe_and_narrow_terminals_cut_no_id(tmp_path):
    done = steps("list", cwd=tmp_path, env={"COLUMNS": "40"})
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert "packed_parquet, checkpoint_megatron" in rows["peft/megatron_bridge"]
    everything = json.loads(steps("list", "--json", cwd=tmp_path).stdout)
    assert set(rows) == {entry["id"] for entry in everything}


def test_show_tells_everything(tmp_path):
    page = steps("show", "peft/megatron_bridge", cwd=tmp_path).stdout
    for word in ("-c default", "-c tiny", "peft.dim", "Strategies", "Errors", "seq_length_mismatch", "torchrun"):
        assert word in page


def test_dry_run_shows_values_with_their_sources_command_and_masked_environment(tmp_path):
    done = steps(
        "run", "demo_chat", "-c", "tiny", "-d", "max_conversations=7",
        "run.env.env_vars.HF_TOKEN=hf_abcdef", "run.env.env_vars.TOKENIZERS_PARALLELISM=false",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("max_conversations: 7"))
    assert line.endswith("# command line")
    assert "-m steps.data_prep.demo_chat.step --config" in done.stdout
    assert "hf_abcdef" not in done.stdout + done.stderr
    assert "HF_TOKEN=<secret>" in done.stdout
    assert "TOKENIZERS_PARALLELISM=false" in done.stdout


def test_dry_run_json_holds_problems_too(tmp_path):
    done = steps("run", "peft/megatron_bridge", "-c", "tiny", "-d", "--json", cwd=tmp_path)
    data = json.loads(done.stdout)
    assert (done.returncode, data["ok"]) == (4, False)
    assert {problem["name"] for problem in data["problems"]} == {
        "missing_packed_parquet",
        "missing_checkpoint_megatron",
    }


def test_upstream_plans_the_whole_chain_in_order(tmp_path):
    done = steps("run", "convert/merge_lora", "-c", "tiny", "--upstream", "-d", "--json", cwd=tmp_path)
    data = json.loads(done.stdout)
    order = [entry["step"] for entry in data["steps"]]
    assert order[-1] == "convert/merge_lora"
    assert (
        order.index("data_prep/demo_chat") < order.index("data_prep/sft_packing") < order.index("peft/megatron_bridge")
    )
    assert order.index("convert/hf_to_megatron") < order.index("peft/megatron_bridge")
    assert len(order) == 5
    peft = next(entry for entry in data["steps"] if entry["step"] == "peft/megatron_bridge")
    assert peft["inputs"]["dataset.nano3_packed_sft_dir"]["state"] == "made by data_prep/sft_packing"


def test_upstream_says_when_no_step_makes_it_there(tmp_path):
    done = steps(
        "run", "convert/merge_lora", "-c", "tiny", "--upstream", "-d", "lora_checkpoint=elsewhere/lora", cwd=tmp_path
    )
    assert done.returncode == 4
    assert "wants a checkpoint_lora at elsewhere/lora, and no step makes one there" in done.stderr
    assert "peft/megatron_bridge -c tiny writes output/tiny/lora" in done.stderr


def complete(words: str, cwd) -> list[str]:
    """What Tab offers, asked as bash asks it."""
    env = {"_STEPS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return steps(cwd=cwd, env=env).stdout.split()


def test_completion_offers_steps_configs_and_keys(tmp_path):
    assert "peft/megatron_bridge" in complete("steps run pe", tmp_path)
    assert complete("steps run merge", tmp_path) == ["merge_lora"]
    assert complete("steps run merge_lora -c t", tmp_path) == ["tiny"]
    assert "peft.dim=" in complete("steps run peft/megatron_bridge peft.d", tmp_path)
    assert "scheduler.lr_decay_style=cosine" in complete(
        "steps run peft/megatron_bridge scheduler.lr_decay_style=c", tmp_path
    )
