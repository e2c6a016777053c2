"""Classification by a language model: which label word is the likeliest answer, and how often that is right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from steps.engine.data.tokenizer import Tokenizer
from steps.engine.evaluation.answers import Prompt, as_text
from steps.engine.model.decoder import Decoder
from steps.engine.progress import SILENT, Progress
from steps.errors import StepFailed


@dataclass(frozen=True)
class Example:
    """A prompt whose answer is one of the labels: number `gold`."""

    prompt: Prompt
    gold: int


@dataclass(frozen=True)
class Scored:
    """log p of each label as the answer to one example, natural logarithm; `predicted` is the largest."""

    example: Example
    scores: Sequence[float]

    @property
    def predicted(self) -> int:
        return max(range(len(self.scores)), key=lambda label: self.scores[label])

    def row(self, labels: Sequence[str]) -> dict[str, Any]:
        """As a row of JSON lines."""
        scores = dict(zip(labels, self.scores, strict=True))
        return {"label": labels[self.example.gold], "predicted": labels[self.predicted], "scores": scores}

    @property
    def loss(self) -> float:
        """-log of what the right label has among the labels alone."""
        largest = max(self.scores)
        total = math.log(sum(math.exp(score - largest) for score in self.scores)) + largest
        return total - self.scores[self.example.gold]


def examples(prompts: Sequence[Prompt], labels: Sequence[str] | None) -> tuple[list[Example], list[str]]:
    """Prompts with their references as labels, and the labels.

    labels: None for all that the data have, sorted. Raises StepFailed (bad_labels) for an answer that is none of them.
    """
    found = [None if prompt.reference is None else prompt.reference.strip() for prompt in prompts]
    names = sorted({name for name in found if name}) if labels is None else list(labels)
    number = {name: place for place, name in enumerate(names)}
    if odd := [name for name in found if name is None or name not in number]:
        what = f"{len(odd):,} of {len(found):,} examples have no answer that is a label, the first one {odd[0]!r}"
        hint = f"Labels: {', '.join(names[:10])}. Give all of them in labels, and data whose last answers they are."
        raise StepFailed(what, hint=hint, name="bad_labels")
    if len(names) < 2:
        raise StepFailed(f"there is only the label {names[0]!r}: nothing to tell apart", name="bad_labels")
    return [Example(prompt, number[str(name)]) for prompt, name in zip(prompts, found, strict=True)], names


@torch.no_grad()
def score(
    decoder: Decoder,
    tokenizer: Tokenizer,
    some: Sequence[Example],
    labels: Sequence[str],
    batch_size: int,
    progress: Progress = SILENT,
) -> Iterator[Scored]:
    """Score every label as the answer to every example, in order. Nothing is sampled.

    Raises StepFailed (bad_labels) where one label begins with all tokens of another: it could never be told from it.
    """
    with progress.task("classify", len(some), "examples") as task:
        for first in range(0, len(some), batch_size):
            batch = some[first : first + batch_size]
            asked = [_tokens(tokenizer, example.prompt, labels) for example in batch]
            for example, scores in zip(batch, _scores(decoder, asked), strict=True):
                yield Scored(example, scores)
            task.advance(len(batch))


def _tokens(tokenizer: Tokenizer, prompt: Prompt, labels: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The ids of a prompt, and those of each label behind it, as they are in a conversation that ends so."""
    wholes = [tokenizer.encode(_answered(tokenizer, prompt, label)) for label in labels]
    asked = tokenizer.encode(as_text(tokenizer, prompt))
    # The end of the prompt may be in one token with the label, or look otherwise once there is an answer.
    while any(whole[: len(asked)] != asked for whole in wholes):
        asked.pop()
    answers = [whole[len(asked) :] for whole in wholes]
    for (name, one), (other, two) in permutations(zip(labels, answers, strict=True), 2):
        if two[: len(one)] == one:
            what = f"the label {other!r} begins with all tokens of {name!r}: their probabilities cannot be compared"
            raise StepFailed(what, hint="Choose other words for the labels.", name="bad_labels")
    return asked, answers


def _answered(tokenizer: Tokenizer, prompt: Prompt, label: str) -> str:
    """The conversation up to the label, which is its last answer."""
    if tokenizer.chat_template is None:
        return as_text(tokenizer, prompt) + label
    said = {"role": "assistant", "content": label}
    text = as_text(tokenizer, Prompt([*prompt.messages, said], prompt.tools, None), asking=False)
    return text[: text.rindex(label) + len(label)] if label in text else as_text(tokenizer, prompt) + label


def _scores(decoder: Decoder, asked: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """log p of each answer to each prompt. One pass over the prompts where every answer is one token."""
    if all(len(answer) == 1 for _, answers in asked for answer in answers):
        last = _log_probabilities(decoder, [prompt for prompt, _ in asked], [[len(prompt) - 1] for prompt, _ in asked])
        return [
            row[0, [answer[0] for answer in answers]].tolist() for row, (_, answers) in zip(last, asked, strict=True)
        ]
    texts, places, targets = [], [], []
    for prompt, answers in asked:
        for answer in answers:
            texts.append(prompt + answer[:-1])
            places.append([len(prompt) - 1 + token for token in range(len(answer))])
            targets.append(torch.tensor(answer))
    found = iter(zip(_log_probabilities(decoder, texts, places), targets, strict=True))
    return [
        [float(row.gather(1, target[:, None]).sum()) for row, target in (next(found) for _ in answers)]
        for _, answers in asked
    ]


def _log_probabilities(
    decoder: Decoder, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> list[Tensor]:
    """log p of every next token at some places of each text, [places, vocab] float32 on the CPU; texts are packed."""
    device = decoder.output_weight.device
    bounds = torch.tensor([0, *map(len, texts)]).cumsum(0).tolist()
    ids = torch.tensor([token for text in texts for token in text], device=device)
    where = [start + place for start, some in zip(bounds, places, strict=False) for place in some]
    hidden = decoder.hidden_states(ids, bounds)[torch.tensor(where, device=device)]
    found = torch.log_softmax((hidden @ decoder.output_weight.T).float(), dim=-1).cpu()
    return list(torch.split(found, [len(some) for some in places]))


def figures(scored: Sequence[Scored], labels: Sequence[str], confidence: float) -> dict[str, Any]:
    """What is reported: accuracy with its interval, macro F1, the loss, the confusion matrix, each label's own figures.

    The interval is Wilson's (1927), which holds near 0 and 1 too. majority: the accuracy of always saying the most
    frequent label.
    """
    count, total = len(labels), len(scored)
    confusion = [[0] * count for _ in labels]
    for one in scored:
        confusion[one.example.gold][one.predicted] += 1
    right = sum(confusion[label][label] for label in range(count))
    by_label = {name: _of_label(confusion, number) for number, name in enumerate(labels)}
    low, high = wilson(right, total, confidence)
    return {
        "examples": total,
        "accuracy": right / total, "accuracy_low": low, "accuracy_high": high, "confidence": confidence,
        "macro_f1": sum(row["f1"] for row in by_label.values()) / count,
        "loss": sum(one.loss for one in scored) / total,
        "majority": max(map(sum, confusion)) / total,
        "labels": by_label,
        "confusion": confusion,
    }  # fmt: skip


def _of_label(confusion: Sequence[Sequence[int]], label: int) -> Mapping[str, float]:
    """precision, recall, f1 (0 where nothing was said or nothing was to be said) and support of one label."""
    right, said, support = confusion[label][label], sum(row[label] for row in confusion), sum(confusion[label])
    return {
        "precision": right / said if said else 0.0,
        "recall": right / support if support else 0.0,
        "f1": 2 * right / (said + support) if said + support else 0.0,
        "support": support,
    }


def wilson(right: int, total: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a share."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, wide = right / total, z * z / total
    middle = (share + wide / 2) / (1 + wide)
    half = z / (1 + wide) * math.sqrt(share * (1 - share) / total + wide / total / 4)
    return middle - half, middle + half
