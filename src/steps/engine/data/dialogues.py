"""Dialogues of the chitchat dataset (two people chatting) as conversations between a user and an assistant."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from steps.errors import StepFailed

#: Why a dialogue is left out.
REASONS: Mapping[str, str] = {
    "malformed": "not a list of groups of messages with text and sender",
    "not_two_people": "not exactly two people talk",
    "no_answer": "nobody answers",
}


def load(path: Path) -> Mapping[str, Any]:
    """The dataset: dialogue id -> {"messages": [[{"text", "timestamp", "sender"}, …], …], …}. Raises StepFailed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepFailed(f"{path} cannot be read: {error}", name="unreadable_dataset") from error
    if not isinstance(data, dict) or not data:
        raise StepFailed(f"{path} is not the chitchat dataset: no object of dialogues", name="unreadable_dataset")
    return data


def conversations(data: Mapping[str, Any], dropped: Counter[str]) -> Iterator[list[dict[str, str]]]:
    """The dialogues, in the order of the file, as `messages`; those left out are counted by reason in `dropped`.

    Whoever speaks first is the user. What one person says in a row becomes one message, a line each.
    """
    for dialogue in data.values():
        try:
            said = [
                (str(message["sender"]), message["text"].strip()) for group in dialogue["messages"] for message in group
            ]
        except (TypeError, KeyError, AttributeError):
            dropped["malformed"] += 1
            continue
        said = [(sender, text) for sender, text in said if text]
        people = list(dict.fromkeys(sender for sender, _ in said))
        if len(people) < 2:
            dropped["no_answer"] += 1
        elif len(people) > 2:
            dropped["not_two_people"] += 1
        else:
            yield [
                {"role": "user" if sender == people[0] else "assistant", "content": "\n".join(text for _, text in turn)}
                for sender, turn in groupby(said, key=lambda entry: entry[0])
            ]


def write(path: Path, data: Mapping[str, Any], limit: int | None = None) -> tuple[int, Counter[str]]:
    """Write conversations as JSON lines, at most `limit`; return how many, and what was dropped on the way."""
    dropped: Counter[str] = Counter()
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for messages in conversations(data, dropped):
            if written == limit:
                break
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            written += 1
    if not written:
        raise StepFailed("the dataset holds no conversation between two people", name="unreadable_dataset")
    return written, dropped
