"""The eval steps as processes: their reports, their refusals."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
from support.models import save_hf, save_tokenizer
from support.packed import random_rows, write_base, write_packed
from support.run_step import run_step

from steps.artifacts.record import read

pytest.importorskip("transformers", reason="extra parity")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval")
    write_base(path / "base", true=True)
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    save_hf(path / "hf", "llama")
    save_tokenizer(path / "hf")
    return path


def perplexity(root, cwd, **changes):
    config = {
        "base_megatron_path": str(root / "base"),
        "dataset": {"nano3_packed_sft_dir": str(root / "packed")},
        "output_dir": "report",
    }
    return run_step("eval/perplexity", config | changes, cwd)


def test_perplexity_writes_a_report_and_its_documents(root, tmp_path):
    done = perplexity(root, tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    figures = report["figures"]
    assert (report["kind"], report["split"], report["rows"]) == ("perplexity", "valid", 6)
    documents = pq.read_table(tmp_path / "report" / "documents.parquet").to_pydict()
    assert figures["documents"] == len(documents["row"])
    assert figures["loss"] == pytest.approx(sum(documents["loss"]) / sum(documents["tokens"]))
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    record = read(tmp_path / "report")
    assert record.type == "eval_report"
    assert record.digest
    assert {item.key for item in record.inputs} == {"base_megatron_path", "dataset.nano3_packed_sft_dir"}
    assert record.facts["figures"] == figures


def test_fewer_rows_and_another_split(root, tmp_path):
    assert perplexity(root, tmp_path, split="train", max_rows=3).returncode == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["split"], report["rows"]) == ("train", 3)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(root, tmp_path):
    done = perplexity(root, tmp_path, split="test")
    assert done.returncode == 4
    assert "split: the data have no split test" in done.stderr
    assert "Allowed: train, valid" in done.stderr
    assert "[missing_split]" in done.stderr


def test_no_base_and_two_bases_are_refused(root, tmp_path):
    done = perplexity(root, tmp_path, base_megatron_path=None)
    assert done.returncode == 3
    assert "no base model is given" in done.stderr
    assert perplexity(root, tmp_path, base_hf_path=str(root / "hf")).returncode == 3


def test_another_models_data_are_refused(root, tmp_path):
    """The records agree (there is none beside the model), the tokens do not."""
    save_hf(tmp_path / "small", "llama", vocab_size=20)
    done = perplexity(root, tmp_path, base_megatron_path=None, base_hf_path=str(tmp_path / "small"))
    assert done.returncode == 1
    assert "[tokenizer_mismatch]" in done.stderr


ROWS = [
    {"messages": [{"role": "user", "content": "w5 w6"}]},
    {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}], "other": 1},
    {"messages": "w9 w10 w11"},
]


def generate(root, cwd, rows=ROWS, **changes):
    (cwd / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base_hf_path": str(root / "hf"),
        "prompts_path": "prompts.jsonl",
        "max_new_tokens": 8,
        "output_dir": "answers",
    }
    return run_step("eval/generate", config | changes, cwd)


def answers(cwd):
    return [json.loads(line) for line in (cwd / "answers" / "answers.jsonl").read_text().splitlines()]


def test_answers_are_those_of_transformers_through_the_chat_template(root, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = generate(root, tmp_path)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(root / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    found = answers(tmp_path)
    questions = ["w5 w6", "w7", "w9 w10 w11"]
    for question, row in zip(questions, found, strict=True):
        asked = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False, max_new_tokens=8, eos_token_id=1, pad_token_id=0)
        said = out[0, ids["input_ids"].shape[1] :].tolist()
        said = said[: said.index(1)] if 1 in said else said
        assert row["messages"] == [*asked, {"role": "assistant", "content": tokenizer.decode(said).strip()}]
        assert (row["prompt_tokens"], row["answer_tokens"]) == (ids["input_ids"].shape[1], len(said))
        assert row["ended"] == (len(said) < 8)
    assert [row.get("reference") for row in found] == [None, "w8", None]
    assert read(tmp_path / "answers").type == "synthetic_jsonl"


def test_batches_change_no_answer_and_seeds_do(root, tmp_path):
    sampled = {"temperature": 1.0, "top_p": 0.95, "seed": 3}
    texts = []
    for changes in (sampled, {**sampled, "batch_size": 1}, {**sampled, "seed": 4}):
        assert generate(root, tmp_path, **changes).returncode == 0
        texts.append([row["messages"][-1]["content"] for row in answers(tmp_path)])
    assert texts[0] == texts[1] != texts[2]


def test_rows_that_are_no_prompts_are_named_and_nothing_is_answered(root, tmp_path):
    bad = [{"messages": []}, {"text": "w5"}, {"messages": [{"role": "assistant", "content": "w5"}]}]
    done = generate(root, tmp_path, rows=[ROWS[0], *bad])
    assert done.returncode == 1
    for line, reason in ((2, "messages is an empty list"), (3, "has no messages"), (4, "nothing before the answer")):
        assert f"prompts.jsonl:{line}: " in done.stderr
        assert reason in done.stderr
    assert not (tmp_path / "answers").exists()


def test_texts_longer_than_the_model_was_made_for_are_warned_of(root, tmp_path):
    done = generate(root, tmp_path, rows=ROWS[:1], max_new_tokens=510)
    assert done.returncode == 0, done.stderr
    assert "warning: texts of 514 tokens; the model was made for 512" in done.stdout
    assert "warning" not in generate(root, tmp_path, rows=ROWS[:1]).stdout


def test_settings_without_effect_are_refused(root, tmp_path):
    done = generate(root, tmp_path, top_k=5)
    assert done.returncode == 3
    assert "top_k: 5 has no effect" in done.stderr


EXAMPLES = [("w5 w6", "w20"), ("w7", "w21"), ("w9 w10 w11", "w20"), ("w12", "w22")]


def classify(root, cwd, rows=EXAMPLES, **changes):
    with (cwd / "examples.jsonl").open("w") as file:
        for question, answer in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = {"base_hf_path": str(root / "hf"), "examples_path": "examples.jsonl", "output_dir": "report"}
    return run_step("eval/classify", config | changes, cwd)


def test_classification_writes_a_report_and_its_predictions(root, tmp_path):
    done = classify(root, tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]
    rows = [json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["w20", "w21", "w20", "w22"]
    assert all(row["predicted"] == max(row["scores"], key=row["scores"].get) for row in rows)
    assert figures["accuracy"] == sum(row["label"] == row["predicted"] for row in rows) / 4
    assert sum(map(sum, figures["confusion"])) == figures["examples"] == 4
    assert list(figures["labels"]) == ["w20", "w21", "w22"]
    assert "right \\ predicted  w20  w21  w22" in done.stdout
    assert read(tmp_path / "report").facts["figures"] == figures


def test_batches_change_no_prediction(root, tmp_path):
    reports = []
    for size in (1, 3):
        assert classify(root, tmp_path, batch_size=size).returncode == 0
        reports.append((tmp_path / "report" / "predictions.jsonl").read_text())
    scores = [[json.loads(line)["scores"] for line in report.splitlines()] for report in reports]
    for one, other in zip(*scores, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_labels_that_do_not_cover_the_data_are_refused(root, tmp_path):
    done = classify(root, tmp_path, labels=["w20", "w21"])
    assert done.returncode == 1
    assert "1 of 4 examples have no answer that is a label, the first one 'w22'" in done.stderr
    assert "[bad_labels]" in done.stderr
    done = classify(root, tmp_path, labels=["w20", "w20"])
    assert done.returncode == 3
    assert "labels: 'w20' stands there 2 times" in done.stderr
