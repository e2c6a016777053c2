"""Loss, perplexity and accuracy over the trained tokens of packed data, with how sure one can be of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from steps.engine.data.batches import MicroBatch
from steps.engine.data.shards import PackedSplit
from steps.engine.model.decoder import Decoder
from steps.engine.progress import Progress
from steps.engine.train.loop import read_known
from steps.engine.train.loss import CHUNK_ROWS


@dataclass(frozen=True)
class Scores:
    """By document, in the order of the data; documents without a trained token are left out.

    row: packed row it lies in, int64.   tokens: trained ones, int64.   loss: their sum of -log p, float64.
    right: how many of them were the likeliest token, int64.
    """

    row: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    right: np.ndarray

    def write(self, path: Path) -> None:
        """As Parquet, a row a document: what two models on the same data are compared by, document by document."""
        columns = {"row": self.row, "tokens": self.tokens, "loss": self.loss, "right": self.right}
        pq.write_table(pa.table(columns), path, compression="zstd")


@dataclass(frozen=True)
class Estimate:
    """A mean over trained tokens, and the interval that holds it with some confidence; None: one document tells not."""

    value: float
    low: float | None
    high: float | None


@torch.no_grad()
def score(decoder: Decoder, split: PackedSplit, rows: int, micro_batch_size: int, progress: Progress) -> Scores:
    """Score the first `rows` packed rows of a split. Raises StepFailed (tokenizer_mismatch)."""
    found = []
    with progress.task("score", rows, "rows") as task:
        for start in range(0, rows, micro_batch_size):
            numbers = range(start, min(start + micro_batch_size, rows))
            documents = [len(split[row].starts) for row in numbers]
            batch = read_known(split, list(numbers), decoder.config.vocab_size).to(decoder.output_weight.device)
            loss, right = _of_tokens(decoder, batch)
            document = np.searchsorted(batch.cu_seqlens, batch.trained.cpu().numpy(), side="right") - 1
            count = len(batch.cu_seqlens) - 1
            sums = (np.bincount(document, weights, minlength=count) for weights in (None, loss, right))
            found.append((np.repeat(list(numbers), documents), *sums))
            task.advance(len(numbers))
    row, tokens, loss, right = (np.concatenate(column) for column in zip(*found, strict=True))
    seen = tokens > 0
    return Scores(row[seen], tokens[seen].astype(np.int64), loss[seen], right[seen].astype(np.int64))


def _of_tokens(decoder: Decoder, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each trained token, float64, and whether it was the likeliest, both [trained]."""
    hidden = decoder.hidden_states(batch.input_ids, batch.cu_seqlens)[batch.trained]
    losses: list[Tensor] = []
    right: list[Tensor] = []
    for part, target in zip(torch.split(hidden, CHUNK_ROWS), torch.split(batch.targets, CHUNK_ROWS), strict=True):
        logits = (part @ decoder.output_weight.T).float()
        chosen = logits.gather(1, target[:, None])[:, 0]
        losses.append(logits.logsumexp(-1) - chosen)
        right.append(logits.argmax(-1) == target)
    if not losses:
        return np.empty(0), np.empty(0)
    return torch.cat(losses).double().cpu().numpy(), torch.cat(right).double().cpu().numpy()


def estimate(sums: np.ndarray, tokens: np.ndarray, confidence: float) -> Estimate:
    """sum(sums) / sum(tokens), by document, and its interval.

    Tokens of one document are no independent draws, so documents are what is drawn: the variance of a ratio estimator
    over clusters (Cochran, Sampling Techniques, eq. 6.13; large samples).
    """
    total, documents = tokens.sum(), len(tokens)
    value = float(sums.sum() / total)
    if documents < 2:
        return Estimate(value, None, None)
    off = sums - value * tokens
    error = math.sqrt(documents / (documents - 1) * float((off**2).sum())) / float(total)
    wide = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return Estimate(value, value - wide, value + wide)


def figures(scores: Scores, confidence: float) -> dict[str, float | int | None]:
    """What is reported: loss, perplexity and accuracy with their intervals, and over how much."""
    loss = estimate(scores.loss, scores.tokens, confidence)
    accuracy = estimate(scores.right.astype(float), scores.tokens, confidence)

    def exp(value: float | None) -> float | None:
        return None if value is None else math.exp(min(value, 700.0))

    return {
        "documents": len(scores.tokens),
        "trained_tokens": int(scores.tokens.sum()),
        "loss": loss.value, "loss_low": loss.low, "loss_high": loss.high,
        "perplexity": exp(loss.value), "perplexity_low": exp(loss.low), "perplexity_high": exp(loss.high),
        "accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
        "confidence": confidence,
    }  # fmt: skip
