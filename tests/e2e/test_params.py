"""`steps params` and the account on the sheet of a dry run, in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from support.packed import PACK_SIZE, SHAPE, random_rows, write_base, write_packed
from support.steps import steps

HEAVY = ("torch", "transformers", "nemo_run", "pyarrow", "numpy", "tokenizers", "huggingface_hub", "omegaconf")


def rows(text: str, title: str) -> dict[str, list[str]]:
    """The cells of a table by the first one of each line."""
    return {line.split("  ")[0]: line.split() for line in lines(text, title)}


def lines(text: str, title: str) -> list[str]:
    """The lines of a table."""
    return text.partition(f"\n{title}\n")[2].partition("\n\n")[0].splitlines()


def tables(text: str) -> list[str]:
    """Every line of both tables, without the notes at the end."""
    held = lines(text, "Memory of each process")
    last = next(number for number, line in enumerate(held) if line.startswith(("total", "expected peak")))
    return [*lines(text, "Parameters"), *held[: last + 1]]


def test_two_tables_that_fit_80_columns(tmp_path):
    done = steps("params", "7B", "peft.dim=16", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, tables(done.stdout))) <= 80
    parameters = rows(done.stdout, "Parameters")
    assert " ".join(parameters["linear_qkv"]) == "linear_qkv 12288 x 4096 32/32 1,610,612,736 8,388,608 0.5181"
    assert " ".join(parameters["total"]) == "total 6,738,415,616 33,685,504 0.4974"
    memory = rows(done.stdout, "Memory of each process")
    assert " ".join(memory["weights of linears"]) == "weights of linears bfloat16 12,952,010,752 12.95 GB"
    assert " ".join(memory["total"]) == "total 14,015,799,296 14.02 GB"
    assert "activations come on top" in done.stdout


def test_the_length_of_the_rows_adds_what_depends_on_them(tmp_path):
    done = steps("params", "7B", "peft.dim=16", "recipe.seq_length=4096", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, tables(done.stdout))) <= 80
    held, memory = (
        rows(text, "Memory of each process")
        for text in (steps("params", "7B", "peft.dim=16", cwd=tmp_path).stdout, done.stdout)
    )
    assert {name: memory.get(name) for name in held if name != "total"} == {
        name: cells for name, cells in held.items() if name not in ("total", "activations come on top")
    } | {"activations come on top": None}
    assert {"activations", "logits, or a layer backward", "the process itself", "expected peak"} <= set(memory)
    less = steps(
        "params", "7B", "peft.dim=16", "recipe.seq_length=4096", "train.recompute_granularity=full", cwd=tmp_path
    ).stdout  # fmt: skip
    first, second = (
        int(text["expected peak"][2].replace(",", "")) for text in (rows(less, "Memory of each process"), memory)
    )
    assert 14 * 10**9 < first < second


def test_the_largest_numbers_fit_too(tmp_path):
    done = steps("params", "70b", "peft.type=canonical_lora", "peft.dim=256", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, tables(done.stdout))) <= 80


def test_json_for_programs(tmp_path):
    done = steps(
        "params", "Llama-2-7B", "peft.type=canonical_lora", "peft.dim=16", "peft.target_modules=[q_proj, v_proj]",
        "peft.quantization.type=nf4", "train.precision=bfloat16", "--json", cwd=tmp_path,
    )  # fmt: skip
    data = json.loads(done.stdout)
    assert (data["model"]["source"], data["model"]["num_layers"]) == ("the shipped shapes", 32)
    assert data["peft"]["quantization"]["double_quant"] is True
    total = data["parameters"][-1]
    assert (total["name"], total["parameters"], total["trainable"]) == ("total", 6_738_415_616, 8_388_608)
    assert f"{total['share']:.6f}" == "0.001243"
    held = {row["what"]: row["nbytes"] for row in data["memory"]}
    assert held["weights of linears"] == 6_476_005_376 // 2
    assert data["memory_bytes"] == sum(held.values())
    assert data["notes"] == ["activations come on top"]


def test_a_checkpoint_that_steps_made(tmp_path):
    write_base(tmp_path / "base")
    done = steps("params", "base", "peft.dim=2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"][-1]["parameters"] == SHAPE.parameters


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (["llama-2-7c"], 2, ["Did you mean llama-2-7b?"]),
        (["7B", "peft.dim"], 2, ["peft.dim: is neither an option nor key=value"]),
        (["7B", "--jsn"], 2, ["--jsn"]),
        ([], 2, ["MODEL"]),
        (["7B", "peft.dmi=16", "peft.alpha=x", "pefft.dim=1"], 3, [
            "peft.dmi: unknown key (from command line). Did you mean peft.dim?", "peft.alpha: 'x' is not a number",
            "pefft: unknown key",
        ]),
        (["7B", "peft.type=lorra"], 3, ["Did you mean lora?"]),
        (["7B", "peft.dim=0"], 3, ["peft.dim: 0 is out of range"]),
        (["7B", "peft=5"], 3, ["peft"]),
        (["7B", "train.train_iters=5"], 3, ["train.train_iters: unknown key", "Allowed: micro_batch_size, precision"]),
        (["7B", "train.precision=float16"], 3, ["train.precision: 'float16' is not one of the choices"]),
        (["smollm2-135m", "peft.dim=1000"], 3, ["peft.dim: rank 1000 is above that of", "Allowed: 1 to 576"]),
        (["7B", "peft.target_modules=[q_proj, linear_fc3]"], 3, [
            "q_proj is part of linear_qkv here", "'linear_fc3' matches no module (from command line)",
        ]),
        (["7B", "peft.target_modules=[linear_fc2]", "peft.exclude_modules=[linear_fc1]"], 3, ["are both given"]),
        (["7C", "peft.dmi=1"], 2, ["7C: is neither a path", "Did you mean peft.dim?"]),
        (["./nowhere"], 4, ["there is no model at ./nowhere"]),
        (["org/model"], 4, ["config.json of org/model is not in the local cache and cannot be fetched"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_refused_with_a_way_out(arguments, code, messages, tmp_path):
    done = steps("params", *arguments, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    for message in messages:
        assert message in done.stderr, done.stderr
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_nothing_heavy_is_imported(tmp_path):
    write_base(tmp_path / "base")
    for model in ("7B", "base"):
        code = (
            "import sys\nfrom steps.dispatch.cli import main\n"
            f"sys.argv = ['steps', 'params', {model!r}, 'peft.type=dora', 'peft.dim=4']\n"
            "try: main()\nexcept SystemExit as end: code = end.code\n"
            f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\nsys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.splitlines()) == (0, ["[]"])


def dry_run(directory, *arguments: str):
    return steps(
        "run", "peft/megatron_bridge", "-c", "tiny", "-d", "dataset.nano3_packed_sft_dir=packed",
        "checkpoint.pretrained_checkpoint=base", f"recipe.seq_length={PACK_SIZE}", *arguments, cwd=directory,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("account")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(8), random_rows(2, seed=9))
    return path


def test_a_dry_run_shows_the_same_account(root):
    settings = ("peft.dim=4", "train.precision=float32", "train.recompute_granularity=full", "train.micro_batch_size=2")
    done = dry_run(root, *settings)
    assert done.returncode == 0, done.stderr
    asked = ("params", "base", *settings, f"recipe.seq_length={PACK_SIZE}")
    told = steps(*asked, cwd=root).stdout
    assert tables(done.stdout) == tables(told)
    assert f"{4 * PACK_SIZE} tokens in an optimizer step, where every row is full" in done.stdout
    data = json.loads(dry_run(root, *settings, "--json").stdout)
    same = json.loads(steps(*asked, "--json", cwd=root).stdout)
    account = data["steps"][0]["account"]
    assert account.pop("tokens_per_step") == 4 * PACK_SIZE
    assert account == {name: same[name] for name in account}
    assert {"memory_bytes", "recompute", "notes", "warnings"} <= account.keys()


@pytest.mark.parametrize(("asked", "told"), [("auto", "auto: none; the "), ("null", ""), ("full", "")])
def test_a_dry_run_says_whether_layers_are_computed_again(root, asked, told):
    done = dry_run(root, "peft.dim=4", f"train.recompute_granularity={asked}")
    assert done.returncode == 0, done.stderr
    assert f"train.recompute_granularity={told}" in done.stdout or not told
    account = json.loads(dry_run(root, "peft.dim=4", f"train.recompute_granularity={asked}", "--json").stdout)
    assert account["steps"][0]["account"]["recompute"] is (asked == "full")


def test_a_model_that_is_too_large_here_is_warned_of_and_not_refused(tmp_path):
    huge = replace(SHAPE, num_layers=100, ffn_hidden_size=2**24)  # 190 GB; the record tells it, and nothing is loaded
    write_base(tmp_path / "base")
    record = json.loads((tmp_path / "base/artifact.json").read_text())
    record["facts"]["model"] = huge.to_dict()
    (tmp_path / "base/artifact.json").write_text(json.dumps(record))
    write_packed(tmp_path / "packed", random_rows(8), random_rows(2, seed=9))
    done = dry_run(tmp_path, "peft.dim=4", "train.micro_batch_size=2")
    assert done.returncode == 0, done.stderr
    assert "train.recompute_granularity=auto: full; the " in done.stdout
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("warning: the expected peak of ")]
    assert "available. What helps: train.micro_batch_size=1, peft.quantization.type=nf4, rows packed" in warning
    (told,) = json.loads(dry_run(tmp_path, "peft.dim=4", "--json").stdout)["steps"][0]["account"]["warnings"]
    assert told.startswith("the expected peak of ")


def test_what_another_engine_holds_is_not_told(root):
    data = json.loads(dry_run(root, "peft.dim=4", "engine=megatron_bridge", "recipe._target_=a.b", "--json").stdout)
    account = data["steps"][0]["account"]
    assert account["parameters"][-1]["trainable"] == 4 * (32 + 64 + 32 + 32 + 32 + 96 + 48 + 32) * 2
    assert account["memory"] == []


@pytest.mark.parametrize(
    ("fault", "code"),
    [("peft.dim=40", 3), ("peft.target_modules=[linear_qk]", 3), ("checkpoint.pretrained_checkpoint=x", 4)],
)
def test_nothing_is_told_of_what_does_not_fit(root, fault, code):
    done = dry_run(root, "peft.dim=4", fault)
    assert done.returncode == code
    assert "\nParameters\n" not in done.stdout
    assert json.loads(dry_run(root, fault, "--json").stdout)["steps"][0]["account"] is None


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("steps params q", "qwen3-8b"),
        ("steps params 7B peft.lora_d", "peft.lora_dtype="),
        ("steps params 7B peft.type=d", "peft.type=dora"),
        ("steps params 7B train.precision=f", "train.precision=float32"),
    ],
)
def test_completion(words, offered, tmp_path):
    env = {"_STEPS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    assert offered in steps(cwd=tmp_path, env=env).stdout.split()
