"""data_prep/demo_chat: dialogues become conversations, broken ones are counted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support.run_step import run_step

from steps.artifacts import record
from steps.engine.data.chat import parse


def said(*turns):
    return {
        "messages": [[{"text": text, "timestamp": "t", "sender": sender} for text in texts] for sender, *texts in turns]
    }


DIALOGUES = {
    "plain": said(("A", "Hello", " How are you? "), ("B", "Fine"), ("B", "and you?"), ("A", "Good")),
    "silent": said(("A", "Hello", "Anybody?")),
    "blank": said(("A", "Hello"), ("B", "  ", "")),
    "crowd": said(("A", "Hi"), ("B", "Hi"), ("C", "Hi")),
    "broken": {"messages": [[{"text": 5, "sender": "A"}]]},
    "none": None,
    "short": said(("X", "q"), ("Y", "a\nb")),
}


def run(cwd, expect=0, **config):
    done = run_step("data_prep/demo_chat", {"output_dir": "chat", **config}, cwd)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def conversations(cwd):
    return [json.loads(line)["messages"] for line in (cwd / "chat/conversations.jsonl").read_text().splitlines()]


def test_speakers_become_user_and_assistant(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(DIALOGUES))
    done = run(tmp_path, dataset_json="dataset.json")
    assert conversations(tmp_path) == [
        [
            {"role": "user", "content": "Hello\nHow are you?"},
            {"role": "assistant", "content": "Fine\nand you?"},
            {"role": "user", "content": "Good"},
        ],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\nb"}],
    ]
    facts = record.read(tmp_path / "chat").facts
    assert facts == {"conversations": 2, "dropped": {"no_answer": 2, "not_two_people": 1, "malformed": 2}}
    assert "dropped 2 no_answer" in done.stdout


def test_a_limit(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(DIALOGUES))
    run(tmp_path, dataset_json="dataset.json", max_conversations=1)
    assert len(conversations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (None, "missing_dataset"),
        ("{", "unreadable_dataset"),
        ("[]", "unreadable_dataset"),
        ('{"a": null}', "unreadable"),
    ],
)
def test_what_is_not_the_dataset(tmp_path, text, name):
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    done = run(tmp_path, expect=4 if text is None else 1, dataset_json="dataset.json")
    assert name in done.stderr


def test_the_real_dataset_twice_gives_the_same_bytes(tmp_path):
    origin = importlib.util.find_spec("chitchat_dataset").origin
    dataset = str(Path(origin).parent / "dataset.json")
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, dataset_json=dataset)
        digests.add(record.read(tmp_path / name / "chat").digest)
    assert len(digests) == 1
    found = conversations(tmp_path / "one")
    facts = record.read(tmp_path / "one/chat").facts
    assert len(found) + sum(facts["dropped"].values()) == 7168
    for messages in found:
        parse(json.dumps({"messages": messages}).encode())
        assert [message["role"] for message in messages] == (["user", "assistant"] * len(messages))[: len(messages)]
