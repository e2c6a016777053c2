"""data_prep/sft_packing as a process: nasty rows, what lands on disk, and how it fails."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chat import CHATML, CHATML_GENERATION, QWEN3, say, small_tokenizer, smollm_gguf, write_jsonl
from support.packing_runs import as_megatron_bridge_reads, configure, digests, documents, pack, packs, report
from support.run_step import run_step

from steps.artifacts import record
from steps.data_prep.sft_packing.schema import Config
from steps.engine.data.tokenizer import Tokenizer
from steps.errors import ArtifactError

WORDS = ("hello", "fox", "lazy dog", "Paris", "what is two?", "four", "good answer", "home")


def many(number, seed=0):
    """Conversations of different lengths."""
    random = np.random.RandomState(seed)
    return [
        {"messages": say(*(" ".join(random.choice(WORDS, size)) for size in random.randint(1, 3, 2 * turns)))}
        for turns in random.randint(1, 3, number)
    ]


def text(message):
    return json.dumps({"messages": message}).encode()


def of_length(tokens):
    """A conversation that renders to exactly so many tokens."""
    tokenizer = small_tokenizer()
    size = tokens - len(tokenizer.encode(tokenizer.render(say("", "x")))) + 1
    messages = say("", "x" * size)
    assert len(tokenizer.encode(tokenizer.render(messages))) == tokens
    return {"messages": messages}


NASTY = {
    # row -> the reason it is dropped for, or None when it stays
    b"{broken": "malformed_line",
    b"\xff\xfe": "malformed_line",
    b"[1, 2]": "not_an_object",
    b"7": "not_an_object",
    b'{"messages": "hello"}': "messages_not_a_list",
    b'{"messages": []}': "messages_empty",
    b'{"messages": null}': "messages_missing",
    b'{"prompt": "x"}': "messages_missing",
    text([{"role": "wizard", "content": "x"}]): "unknown_role",
    b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}': "invalid_unicode",
    text([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]): "content_missing",
    text([{"role": "system", "content": "only"}]): "no_answer",
    text(say("only a question")): "no_answer",
    text(say("empty answer", "")): "no_answer",
    text([*say("q"), {"role": "assistant", "content": "a", "weight": 0}]): "no_answer",
    text([*say("q"), {"role": "assistant", "content": "a", "weight": 2}]): "invalid_weight",
    text([*say("q"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]): (
        "invalid_tool_calls"
    ),
    text([*say("q"), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]): (
        "tool_calls_not_in_template"
    ),
    text(say("too long", "x" * 200)): "overlong",
    text(say("nul \0 and \u2028", "yes")): None,
    text(say("parts", "x")).replace(b'"parts"', b'[{"type": "text", "text": "parts"}]'): None,
    text([{"role": "assistant", "content": "speaks first"}]): None,
    text(say("ends", "on", "a question")): None,
    text([*say("one", "two"), {"role": "assistant", "content": "three"}]): None,
    text(say("starts", "\nwith a newline")): None,
    text(say("starts", " with a blank")): None,
    text(say("mentions <|im_end|><s>", "and <|im_start|>assistant")): None,
    text(say("mentions <tool_call>", "here: <tool_call>")): None,
}


def test_nothing_crashes_and_every_row_is_accounted_for(tmp_path):
    config = configure(tmp_path, NASTY)
    done = pack(tmp_path, config)
    told = report(tmp_path)
    expected = {}
    for line, reason in enumerate(NASTY.values(), 1):
        if reason:
            expected.setdefault(reason, []).append(f"chat.jsonl:{line}")
    assert {reason: entry["first"] for reason, entry in told["dropped"].items()} == expected
    assert {reason: entry["count"] for reason, entry in told["dropped"].items()} == {
        reason: len(lines) for reason, lines in expected.items()
    }
    kept = sum(reason is None for reason in NASTY.values())
    assert told["rows"] == {"read": len(NASTY), "kept": kept, "dropped": len(NASTY) - kept, "not_sampled": 0}
    assert f"{len(NASTY)} rows read: {kept} kept" in done.stdout
    assert "dropped 2 malformed_line" in done.stdout
    tokenizer = small_tokenizer()
    texts = [tokenizer.decode(ids) for ids, _ in documents(tmp_path)]
    assert len(texts) == kept
    for line, reason in NASTY.items():
        if reason is None:
            messages = json.loads(line)["messages"]
            content = messages[0]["content"]
            messages[0]["content"] = content if isinstance(content, str) else content[0]["text"]
            assert tokenizer.render(messages) in texts
    assert all(any(mask) for _, mask in documents(tmp_path))


def test_rows_are_what_megatron_bridge_reads(tmp_path):
    rows = many(300)
    pack(tmp_path, configure(tmp_path, rows, num_shards=3))
    tokenizer = small_tokenizer()
    expected = {tokenizer.render(row["messages"]): row["messages"] for row in rows}
    seen = []
    for row in packs(tmp_path):
        assert row["seq_start_id"][0] == 0
        assert all(a < b for a, b in zip(row["seq_start_id"], row["seq_start_id"][1:], strict=False))
        assert row["seq_start_id"][-1] < len(row["input_ids"]) == len(row["loss_mask"]) <= 64
        for tokens, labels, mask in as_megatron_bridge_reads(row):
            whole = tokenizer.decode([*tokens.tolist(), int(labels[-1])])
            answers = [message["content"] for message in expected[whole] if message["role"] == "assistant"]
            assert tokenizer.decode(labels[mask == 1].tolist()) == "".join(answer + "<|im_end|>" for answer in answers)
            seen.append(whole)
    assert sorted(seen) == sorted(tokenizer.render(row["messages"]) for row in rows)
    files = sorted((tmp_path / "packed/splits/train").iterdir())
    assert [file.name for file in files] == [f"part-{number:05d}-of-00003.parquet" for number in range(3)]
    for file in files:
        parquet = pq.ParquetFile(file)
        groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
        assert [group.num_rows for group in groups[:-1]] == [64] * (len(groups) - 1)
        assert {group.column(0).compression for group in groups} == {"ZSTD"}
        assert parquet.schema_arrow == pa.schema(
            {
                "input_ids": pa.list_(pa.int32()),
                "loss_mask": pa.list_(pa.uint8()),
                "seq_start_id": pa.list_(pa.int32()),
            }
        )


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    rows = [*many(1500), *NASTY]
    results = []
    for workers in (0, 1, 2, 3):
        config = configure(tmp_path, rows, num_workers=workers, train_ratio=0.8, valid_ratio=0.1, test_ratio=0.1)
        pack(tmp_path, {**config, "force": True})
        results.append(digests(tmp_path))
    assert results[0] == results[1] == results[2] == results[3]
    assert len([name for name in results[0] if name.endswith(".parquet")]) == 3


def test_the_record_holds_what_later_steps_must_agree_with(tmp_path):
    pack(tmp_path, configure(tmp_path, many(50)))
    facts = record.read(tmp_path / "packed").facts
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer"))
    assert facts["tokenizer_digest"] == tokenizer.digest
    assert facts["chat_template_digest"] == tokenizer.chat_template_digest
    assert facts["pack_size"] == 64
    found = documents(tmp_path)
    assert facts["splits"]["train"] == {
        "packs": len(packs(tmp_path)),
        "tokens": sum(len(ids) for ids, _ in found),
        "trained_tokens": sum(sum(mask) for _, mask in found),
        "conversations": 50,
    }
    assert facts["splits"]["test"]["packs"] == 0


@pytest.mark.parametrize("pack_size", [64, 50])
def test_lengths_at_the_edge(tmp_path, pack_size):
    rows = [of_length(pack_size), of_length(pack_size + 1)]
    pack(tmp_path, configure(tmp_path, rows, pack_size=pack_size))
    assert [len(ids) for ids, _ in documents(tmp_path)] == [pack_size]
    assert report(tmp_path)["dropped"]["overlong"]["first"] == ["chat.jsonl:2"]
    pack(tmp_path, configure(tmp_path, rows, pack_size=pack_size, overlong="truncate"))
    assert [len(ids) for ids, _ in documents(tmp_path)] == [pack_size, pack_size]
    assert report(tmp_path)["notes"]["truncated"]["count"] == 1


def test_documents_of_one_and_two_tokens(tmp_path):
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    rows = [{"messages": [{"role": "assistant", "content": content}]} for content in ("x", "xy")]
    pack(tmp_path, configure(tmp_path, rows, template))
    # One token has nothing to predict; of two, the second is predicted from the first.
    assert [mask for _, mask in documents(tmp_path)] == [[1, 0]]
    assert report(tmp_path)["dropped"]["nothing_trained"]["first"] == ["chat.jsonl:1"]


def test_an_answer_wholly_behind_the_cut(tmp_path):
    rows = [{"messages": say("x" * 100, "answer")}, {"messages": say("q", "x" * 100)}]
    pack(tmp_path, configure(tmp_path, rows, overlong="truncate"))
    assert report(tmp_path)["dropped"]["truncated_away"]["first"] == ["chat.jsonl:1"]
    ((ids, mask),) = documents(tmp_path)
    assert len(ids) == 64
    assert mask[-2:] == [1, 0]


def test_overlong_error_names_the_row(tmp_path):
    config = configure(tmp_path, [of_length(60), of_length(65)], overlong="error", num_workers=2)
    done = pack(tmp_path, config, expect=1)
    assert "chat.jsonl:2: the conversation has 65 tokens, pack_size takes 64" in done.stderr
    assert "overlong_conversation" in done.stderr


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_identical_rows_of_one_length(tmp_path, template):
    pack(tmp_path, configure(tmp_path, [{"messages": say("Hi", "Yo")}] * 100, template))
    found = documents(tmp_path)
    assert len(found) == 100
    assert len({(tuple(ids), tuple(mask)) for ids, mask in found}) == 1
    per_pack = 64 // len(found[0][0])
    assert len(packs(tmp_path)) == -(-100 // per_pack)


def test_splits_go_by_conversation_and_never_leak(tmp_path):
    rows = many(600)
    config = configure(tmp_path, [*rows, *rows[:200]], train_ratio=0.7, valid_ratio=0.2, test_ratio=0.1)
    pack(tmp_path, config)
    where = {}
    sizes = {}
    for split in ("train", "valid", "test"):
        found = [tuple(ids) for ids, _ in documents(tmp_path, split)]
        sizes[split] = len(found)
        for ids in found:
            assert where.setdefault(ids, split) == split
    assert sum(sizes.values()) == 800
    assert abs(sizes["train"] / 800 - 0.7) < 0.06
    assert abs(sizes["valid"] / 800 - 0.2) < 0.06
    before = {split: sorted(documents(tmp_path, split)) for split in sizes}
    pack(tmp_path, configure(tmp_path, [*rows[200:], *rows[:200], *rows[:200]], **split_config(config)))
    assert {split: sorted(documents(tmp_path, split)) for split in sizes} == before  # the order of rows is nothing
    pack(tmp_path, {**config, "num_shards": 4})
    assert {split: sorted(documents(tmp_path, split)) for split in sizes} == before


def split_config(config):
    return {name: config[name] for name in ("train_ratio", "valid_ratio", "test_ratio")}


def test_one_row_and_three_splits(tmp_path):
    row = [{"messages": say("Hi", "Yo")}]
    outcomes = set()
    for seed in range(6):
        config = configure(tmp_path, row, train_ratio=0.4, valid_ratio=0.3, test_ratio=0.3, seed=seed)
        done = run_step("data_prep/sft_packing", config, tmp_path)
        if done.returncode:
            assert "empty_train_split" in done.stderr
        else:
            assert len(documents(tmp_path)) == 1
            assert "warning: valid was asked for, but no conversation fell into it" in done.stdout
            assert not (tmp_path / "packed/splits/valid").exists()
        outcomes.add(done.returncode)
    assert outcomes == {0, 1}


def test_too_many_dropped_rows_fail_the_step_and_a_higher_limit_goes_on(tmp_path):
    config = configure(tmp_path, [*many(90), *[b"{broken"] * 10], max_drop_ratio=0.05)
    done = pack(tmp_path, config, expect=1)
    assert "10 of 100 rows (10.0 %) were dropped: 10 malformed_line (first at chat.jsonl:91" in done.stderr
    assert "too_many_rows_dropped" in done.stderr
    assert not (tmp_path / "packed").exists()
    assert "going on with" in pack(tmp_path, {**config, "max_drop_ratio": 0.1}).stdout
    assert len(documents(tmp_path)) == 90


def test_all_rows_dropped_is_never_a_success(tmp_path):
    done = pack(tmp_path, configure(tmp_path, [{"conversation": []}] * 3), expect=1)
    assert "no conversation is left of 3 rows" in done.stderr
    assert "Set messages_field" in done.stderr
    done = pack(tmp_path, configure(tmp_path, []), expect=1)
    assert "no_rows_left" in done.stderr


def test_field_names_tools_and_max_rows(tmp_path):
    rows = [{"chat": say("Hi", str(index))} for index in range(10)]
    pack(tmp_path, configure(tmp_path, rows, messages_field="chat", max_rows=4))
    assert report(tmp_path)["rows"]["read"] == 4
    assert len(documents(tmp_path)) == 4


def test_every_kind_of_file_and_a_blend_with_weights(tmp_path):
    rows = many(400)
    write_jsonl(tmp_path / "a.jsonl", rows[:100])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows[100:200])))
    pq.write_table(pa.Table.from_pylist(rows[200:400]), tmp_path / "c.parquet")
    blend = {"a.jsonl": 2, "b.jsonl.gz": 0, "c.parquet": 0.5}
    (tmp_path / "blend.json").write_text(json.dumps(blend))
    config = configure(tmp_path, None, blend_path="blend.json", pack_size=100)
    pack(tmp_path, config)
    rows_told = report(tmp_path)["rows"]
    assert rows_told["read"] == 400
    assert rows_told["kept"] + rows_told["not_sampled"] == 400
    tokenizer = small_tokenizer()
    found = [tokenizer.decode(ids) for ids, _ in documents(tmp_path)]
    first = [tokenizer.render(row["messages"]) for row in rows[:100]]
    assert all(found.count(one) >= 2 for one in first)
    assert 70 < len(found) - 200 < 130  # half of the 200
    assert [entry["rows"] for entry in report(tmp_path)["inputs"]] == [100, 100, 200]
    (tmp_path / "blend.json").write_text(json.dumps({"a.jsonl": 1, "gone.jsonl": 1}))
    done = pack(tmp_path, config, expect=4)
    assert "gone.jsonl: no data here" in done.stderr
    assert "missing_training_jsonl" in done.stderr


def test_padding_for_context_parallelism_is_masked(tmp_path):
    pack(tmp_path, configure(tmp_path, many(60), pad_multiple=8))
    tokenizer = small_tokenizer()
    for row in packs(tmp_path):
        assert len(row["input_ids"]) <= 64
        for tokens, labels, mask in as_megatron_bridge_reads(row):
            assert len(tokens) % 8 == 0
            content = len(tokenizer.decode(tokens.tolist()).rstrip("\n").removesuffix("<|im_end|>"))
            assert content
            padding = np.flatnonzero(labels != tokenizer.pad_token_id).max() + 2
            assert not mask[padding:].any()
    assert report(tmp_path)["padding_tokens"] > 0


def test_a_template_that_rewrites_history_trains_last_answers_and_says_so(tmp_path):
    rows = [{"messages": say("Hi", "<think>\na\n</think>\n\nYo", "And?", "<think>\nb\n</think>\n\nNo")}] * 5
    pack(tmp_path, configure(tmp_path, rows, QWEN3))
    assert report(tmp_path)["notes"]["answers_rewritten"]["count"] == 5
    ids, mask = documents(tmp_path)[0]
    trained = [id for id, before in zip(ids[1:], mask, strict=False) if before]
    assert small_tokenizer().decode(trained) == "<think>\nb\n</think>\n\nNo<|im_end|>"


def test_a_finished_result_is_kept_unless_forced_or_changed(tmp_path):
    config = configure(tmp_path, many(80))
    pack(tmp_path, config)
    before = (tmp_path / "packed/artifact.json").stat().st_mtime_ns

    def touched():
        return (tmp_path / "packed/artifact.json").stat().st_mtime_ns != before

    assert "it is kept" in pack(tmp_path, {**config, "num_workers": 2, "max_drop_ratio": 0.5}).stdout
    assert not touched()
    first = digests(tmp_path)
    (tmp_path / "packed/splits/train/part-00000-of-00001.parquet").write_bytes(b"")  # damaged: not kept
    pack(tmp_path, config)
    assert touched()
    assert digests(tmp_path) == first
    pack(tmp_path, {**config, "num_shards": 3})
    pack(tmp_path, {**config, "num_shards": 2})
    assert len(list((tmp_path / "packed/splits/train").iterdir())) == 2  # no leftovers of the three
    (tmp_path / "tokenizer/chat_template.jinja").write_text(CHATML_GENERATION)
    pack(tmp_path, {**config, "num_shards": 2})
    assert record.read(tmp_path / "packed").facts["chat_template_digest"] == (
        small_tokenizer(CHATML_GENERATION).chat_template_digest
    )


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"train_ratio": 0.9}, 3, ["train_ratio", "add up to 0.9"]),
        ({"pack_size": 8, "pad_multiple": 8}, 3, ["pad_multiple", "leaves no room"]),
        ({"overlong": "cut"}, 3, ["overlong", "drop, truncate, error"]),
        ({"tokenizer": {"model": "nowhere"}}, 4, ["tokenizer.model", "unsupported_tokenizer"]),
        ({"chat_template": "nowhere.jinja"}, 4, ["chat_template", "missing_chat_template"]),
        ({"blend_path": "nowhere.jsonl"}, 4, ["blend_path", "missing_training_jsonl"]),
        ({"blend_path": "sft_packing.yaml"}, 4, ["unknown kind of file", ".jsonl.zst"]),
    ],
)
def test_wrong_configurations_are_refused_before_the_work(tmp_path, change, code, words):
    done = pack(tmp_path, {**configure(tmp_path, many(5)), **change}, expect=code)
    assert [word for word in words if word not in done.stderr] == []
    assert not (tmp_path / "packed").exists()


BAD_TOKENIZERS = {
    "nowhere": "there is no tokenizer here",
    "empty": "holds no tokenizer",
    "weights": "holds no tokenizer",
    "two": "holds several GGUF files (a.gguf, b.gguf)",
    "notes.txt": "is no tokenizer's file",
}


@pytest.mark.parametrize("model", BAD_TOKENIZERS)
def test_a_tokenizer_that_is_none_is_found_by_a_dry_run_in_the_words_of_the_run(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    config = configure(tmp_path, many(1))
    for path in ("empty/", "weights/model.safetensors", "two/a.gguf", "two/b.gguf", "notes.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).mkdir() if path.endswith("/") else (tmp_path / path).write_text("x")
    (problem,) = Config(**{**config, "tokenizer": {"model": f"./{model}"}}).check_inputs({})
    assert BAD_TOKENIZERS[model] in problem.what
    assert (problem.where, problem.name) == ("tokenizer.model", "unsupported_tokenizer")
    with pytest.raises(ArtifactError, match=re.escape(BAD_TOKENIZERS[model])):
        Tokenizer.load(f"./{model}")


def test_tokenizers_that_load_pass_the_dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(tmp_path, many(1))
    for model in ("tokenizer", "tokenizer/tokenizer.json", smollm_gguf(), "org/name"):
        assert list(Config(**{**config, "tokenizer": {"model": model}}).check_inputs({})) == []


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    config = configure(tmp_path, many(5))
    (tmp_path / "tokenizer/chat_template.jinja").unlink()
    done = pack(tmp_path, config, expect=3)
    assert "missing_chat_template" in done.stderr
    (tmp_path / "mine.jinja").write_text(CHATML)
    pack(tmp_path, {**config, "chat_template": "mine.jinja"})


def test_a_damaged_input_keeps_the_work_done_before_it(tmp_path):
    rows = many(1300)
    data = gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows), mtime=0)
    (tmp_path / "chat.jsonl.gz").write_bytes(data[:-2000])
    config = configure(tmp_path, None, blend_path="chat.jsonl.gz")
    done = pack(tmp_path, config, expect=1)
    assert "unreadable_input" in done.stderr
    assert "cannot be read after row" in done.stderr
    (tmp_path / "chat.jsonl.gz").write_bytes(data)
    pack(tmp_path, config)
    assert report(tmp_path)["rows"]["kept"] + report(tmp_path)["rows"]["dropped"] == 1300
