"""Rows come out of files as they were written: line ends, compression, Parquet, damage, blends."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.chat import say, write_jsonl

from steps.engine.data import blend, reading
from steps.engine.data.chat import parse
from steps.errors import ConfigError, StepFailed


def chunks(path, max_rows=None):
    return list(reading.chunks(reading.examine(blend.resolve(str(path))), max_rows, "messages", "tools"))


def rows(path, max_rows=None):
    return [row for chunk in chunks(path, max_rows) for row in chunk.rows]


ROW = json.dumps({"messages": say("Hi", "Yo")}).encode()


def test_only_a_line_feed_ends_a_row(tmp_path):
    separated = json.dumps({"messages": say("a\u2028b\u0085c", "d")}, ensure_ascii=False).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ROW + b"\r\n\n  \n" + separated + b"\n" + ROW)  # BOM, CRLF, blanks, no end
    found = rows(path)
    assert [line for line, _ in found] == [1, 4, 5]
    assert parse(found[0][1]).messages == say("Hi", "Yo")
    assert parse(found[1][1]).messages[0]["content"] == "a\u2028b\u0085c"
    assert sum(chunk.blank_lines for chunk in chunks(path)) == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_compression_changes_nothing(tmp_path, suffix):
    lines = b"".join(json.dumps({"messages": say(str(index), "Yo")}).encode() + b"\n" for index in range(1200))
    half = len(lines) // 2
    packed = {
        ".jsonl": lines,
        ".jsonl.gz": gzip.compress(lines[:half]) + gzip.compress(lines[half:]),
        ".jsonl.zst": zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]),
    }[suffix]
    (tmp_path / f"a{suffix}").write_bytes(packed)
    found = chunks(tmp_path / f"a{suffix}")
    assert [len(chunk.rows) for chunk in found] == [512, 512, 176]
    assert [parse(data).messages[0]["content"] for _, data in rows(tmp_path)] == [str(index) for index in range(1200)]
    assert sum(chunk.consumed for chunk in found) == len(packed)


def test_long_rows_make_smaller_chunks(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": say("x" * 1_500_000, "Yo")}] * 5)
    assert [len(chunk.rows) for chunk in chunks(tmp_path)] == [3, 2]


def test_parquet_with_structs_and_missing_fields(tmp_path):
    data = [
        {"messages": say("Hi", "Yo"), "tools": None, "more": 1},
        {"messages": [*say("Hi"), {"role": "assistant", "content": "Yo", "weight": 0, "name": "x"}], "more": 2},
    ]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "a.parquet")
    found = rows(tmp_path / "a.parquet")
    assert [line for line, _ in found] == [1, 2]
    assert parse(found[0][1]).messages == say("Hi", "Yo")
    assert parse(found[1][1]).left_out == [False, True]
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "b.parquet")
    assert [data for _, data in rows(tmp_path / "b.parquet")] == [b"{}", b"{}"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named_with_the_last_good_row(tmp_path, name):
    lines = b"".join(json.dumps({"messages": say(str(index) * 50, "Yo")}).encode() + b"\n" for index in range(3000))
    if name == "a.parquet":
        pq.write_table(pa.table({"messages": [say("Hi", "Yo")] * 10}), tmp_path / name)
        data = (tmp_path / name).read_bytes()
    else:
        data = gzip.compress(lines) if name.endswith("gz") else zstandard.compress(lines)
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    if name.endswith("zst"):  # a frame that stops early is only seen as damage when its bytes are wrong
        (tmp_path / name).write_bytes(data[:-200] + b"\0" * 200)
    with pytest.raises(StepFailed, match="cannot be read after row") as caught:
        rows(tmp_path / name)
    assert caught.value.name == "unreadable_input"
    assert name in str(caught.value)


def test_max_rows_counts_over_all_files(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": say(name, "Yo")}] * 3)
    assert [line for line, _ in rows(tmp_path, 4)] == [1, 2, 3, 1]
    assert [line for line, _ in rows(tmp_path, 3)] == [1, 2, 3]
    assert len(rows(tmp_path)) == 6


def test_directories_globs_and_blends(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "more/c.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in blend.resolve(str(tmp_path))[0].files] == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert [path.name for path in blend.resolve(str(tmp_path / "*.jsonl"))[0].files] == ["b.jsonl"]
    recipe = tmp_path / "blend.json"
    recipe.write_text('{"datasets": [{"path": "b.jsonl", "weight": 2}, {"path": "more"}]}')
    assert [(source.weight, source.files[0].name) for source in blend.resolve(str(recipe))] == [
        (2.0, "b.jsonl"),
        (1.0, "c.parquet"),
    ]
    recipe.write_text('{"b.jsonl": 0.5}')
    assert blend.resolve(str(recipe))[0].weight == 0.5


def test_every_fault_of_a_blend_is_told_at_once(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    recipe = tmp_path / "blend.json"
    recipe.write_text('{"nowhere.jsonl": 1, "also*": 1, "notes.txt": 1, "x": "much"}')
    with pytest.raises(ConfigError) as caught:
        blend.resolve(str(recipe))
    text = str(caught.value)
    assert [word in text for word in ("nowhere.jsonl", "also*", "notes.txt", "'much'")] == [True] * 4
    assert caught.value.name == "missing_training_jsonl"


@pytest.mark.parametrize("text", ["{", "[]", '[{"messages": []}]', '{"datasets": [{"weight": 1}]}', '"x"', "{}"])
def test_what_is_no_blend_is_refused(tmp_path, text):
    (tmp_path / "blend.json").write_text(text)
    with pytest.raises(ConfigError):
        blend.resolve(str(tmp_path / "blend.json"))
