"""Chat data to packed rows: read, tokenize, split, pack, write. The whole of data_prep/sft_packing, without a CLI.

    out/.work/plan.json        what this run makes, by digest; work of another plan is thrown away
    out/.work/chunk-*          tokenized chunks (see spool)
    out/splits/…               the packs
    out/report.json            every row accounted for; written last, so a plan that it names is complete

Killed at any moment, the same call goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from steps.artifacts import record
from steps.artifacts.packed_parquet import SPLITS
from steps.artifacts.record import write_text
from steps.engine.data import report as reporting
from steps.engine.data.chat import Conversation, DroppedError, parse
from steps.engine.data.packed_writer import Documents, write_split
from steps.engine.data.proofs import probe
from steps.engine.data.reading import Chunk, DataFile, chunks
from steps.engine.data.spool import ChunkResult, Spool
from steps.engine.data.tiktoken_ranks import Ranks
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.data.tokenizing import ChunkWorker, Done, Settings
from steps.engine.data.workers import Pool
from steps.engine.progress import Progress
from steps.errors import StepFailed

WORK, PLAN, REPORT = ".work", "plan.json", "report.json"
#: Raised when the code comes to write other bytes for the same input.
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Everything that the packs depend on, and nothing else."""

    tokenizer: Tokenizer
    files: Sequence[DataFile]
    settings: Settings
    num_shards: int = 1
    max_rows: int | None = None

    @property
    def digest(self) -> str:
        """sha256: equal plans make equal packs."""
        parts = {
            "version": [VERSION, tokenizers.__version__],
            "tokenizer": self.tokenizer.digest,
            "special_tokens": dict(self.tokenizer.special_tokens),
            "templates": self.tokenizer.templates,
            "files": [[str(file.path), file.digest, file.weight] for file in self.files],
            "settings": asdict(self.settings),
            "num_shards": self.num_shards,
            "max_rows": self.max_rows,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def finished(out: Path, plan: Plan) -> dict[str, Any] | None:
    """The report in `out`, if it is that of this very plan; None otherwise."""
    try:
        report = json.loads((out / REPORT).read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("plan") == plan.digest else None


def pack_conversations(
    out: Path, plan: Plan, progress: Progress, num_workers: int = 1, max_drop_ratio: float = 1.0
) -> dict[str, Any]:
    """Write the packs of `plan` into `out` and return the report. What an interrupted call left there is used.

    num_workers: processes that tokenize; with 0 or 1 this one does. Has no influence on the bytes.
    max_drop_ratio: share of the rows that may be dropped.
    Raises StepFailed: too_many_rows_dropped, no_rows_left, empty_train_split, overlong_conversation, unreadable_input.
    """
    if (report := finished(out, plan)) is not None:
        shutil.rmtree(out / WORK, ignore_errors=True)
        return report
    spool, now = _open_work(out, plan, progress)
    plan = replace(plan, tokenizer=plan.tokenizer.at(now))
    size = sum(file.size for file in plan.files)
    settings, ranks = probe(plan.tokenizer, plan.settings, _sample(plan), size, progress)
    indices = _tokenize(plan, settings, ranks, spool, progress, num_workers)
    account = reporting.Account(plan.files)
    results = [spool.read(index) for index in indices]
    for result in results:
        account.add(result)
    report = {
        "plan": plan.digest,
        "pack_size": settings.pack_size,
        "tokenizer_digest": plan.tokenizer.digest,
        "chat_template_digest": plan.tokenizer.chat_template_digest,
        "tokenized": "whole conversations" if settings.whole_text else "segments",
        "library": "tokenizers" if ranks is None else "tiktoken",
        **account.to_dict(),
    }
    _check(account, max_drop_ratio)
    shutil.rmtree(out / "splits", ignore_errors=True)
    report["splits"] = {split: _write(out, plan, indices, results, spool, progress, split) for split in SPLITS}
    if not report["splits"]["train"]["packs"] and settings.ratios[0] > 0:
        raise StepFailed(
            f"no conversation of {account.kept} fell into the train split",
            name="empty_train_split",
        )
    write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out / WORK)
    for line in reporting.lines(report):
        progress.log(line)
    return report


def _open_work(out: Path, plan: Plan, progress: Progress) -> tuple[Spool, datetime]:
    """The spool of this plan, emptied of any other's work; and when the plan was first begun."""
    work = out / WORK
    try:
        begun = json.loads((work / PLAN).read_text())
    except (OSError, ValueError):
        begun = {}
    if begun.get("plan") == plan.digest:
        progress.log("going on with the work of an interrupted run")
    else:
        if any(out.iterdir()):
            progress.log("an interrupted run with other data or settings left work behind: it is thrown away")
        # The plan goes first: killed in between, the rest is nobody's.
        (work / PLAN).unlink(missing_ok=True)
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        work.mkdir()
        begun = {"plan": plan.digest, "begun": datetime.now().isoformat(timespec="seconds")}
        write_text(work / PLAN, json.dumps(begun))
    record.remove_unfinished(out)
    return Spool(work), datetime.fromisoformat(begun["begun"])


def _sample(plan: Plan) -> Iterator[Conversation]:
    for chunk in islice(_chunks(plan), 4):
        for _, data in chunk.rows:
            try:
                yield parse(data, plan.settings.messages_field, plan.settings.tools_field)
            except DroppedError:
                continue


def _chunks(plan: Plan) -> Iterator[Chunk]:
    return chunks(plan.files, plan.max_rows, plan.settings.messages_field, plan.settings.tools_field)


def _tokenize(
    plan: Plan, settings: Settings, ranks: Ranks | None, spool: Spool, progress: Progress, num_workers: int
) -> list[int]:
    """Tokenize every chunk that is not in the spool yet; return the numbers of all."""
    indices: list[int] = []
    totals: Counter[str] = Counter()
    task = progress.task("tokenizing", sum(file.size for file in plan.files) / 1e6, "MB")

    def missing() -> Iterator[Chunk]:
        for chunk in _chunks(plan):
            indices.append(chunk.index)
            if chunk.index in spool:
                task.advance(chunk.consumed / 1e6)
            else:
                yield chunk

    names, weights = [str(file.path) for file in plan.files], [file.weight for file in plan.files]
    arguments = (plan.tokenizer, settings, weights, names, ranks, spool.directory)
    with task, ExitStack() as stack:
        done: Iterator[Done]
        if num_workers > 1:
            pool = stack.enter_context(Pool[Chunk, Done](num_workers, ChunkWorker, *arguments))
            done = pool.run(missing())
        else:
            done = map(ChunkWorker(*arguments), missing())
        for chunk in done:
            totals.update(conversations=chunk.rows, tokens=chunk.tokens)
            task.advance(chunk.consumed / 1e6, **totals)
    return indices


def _check(account: reporting.Account, max_drop_ratio: float) -> None:
    """Fail where too little is left, with the account of what was dropped in the message."""
    if account.kept and account.lost <= max_drop_ratio * account.read:
        return
    reasons = "; ".join(
        f"{entry['count']:,} {reason} (first at {', '.join(entry['first'][:3])})"
        for reason, entry in sorted(account.dropped.items(), key=lambda entry: -entry[1]["count"])
    )
    if not account.kept:
        what = f"no conversation is left of {account.read:,} rows{': ' if reasons else ''}{reasons}"
        raise StepFailed(what, hint=_advice(account), name="no_rows_left")
    share = 100 * account.lost / account.read
    what = f"{account.lost:,} of {account.read:,} rows ({share:.1f} %) were dropped: {reasons}"
    raise StepFailed(what, hint=_advice(account), name="too_many_rows_dropped")


def _advice(account: reporting.Account) -> str:
    most = max(account.dropped, key=lambda reason: account.dropped[reason]["count"], default="")
    return {
        "overlong": "Raise pack_size, or set overlong=truncate.",
        "answers_rewritten": "Give a chat_template that marks the answers with {% generation %} … {% endgeneration %}.",
        "messages_missing": "Set messages_field to the field that holds the conversation.",
        "": "The input holds no rows.",
    }.get(most, "")


def _write(
    out: Path,
    plan: Plan,
    indices: Sequence[int],
    results: Sequence[ChunkResult],
    spool: Spool,
    progress: Progress,
    split: str,
) -> dict[str, Any]:
    """Write one split and return its figures."""
    parts = [_of_split(index, result, SPLITS.index(split)) for index, result in zip(indices, results, strict=True)]
    chunk, offset, length, trained = (np.concatenate(column) for column in zip(*parts, strict=True))
    documents = Documents(chunk, offset, length)
    directory, settings = out / "splits" / split, plan.settings
    packs = write_split(directory, documents, spool, settings.pack_size, plan.num_shards, settings.seed, progress)
    asked = settings.ratios[SPLITS.index(split)] > 0
    return {**reporting.split_facts(length, trained, packs, settings.pack_size), "asked": asked}


def _of_split(index: int, result: ChunkResult, split: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Chunk number, offset, length and trained tokens of the chunk's documents in a split, one entry a copy."""
    rows = np.repeat(np.arange(len(result.lengths)), np.where(result.splits == split, result.copies, 0))
    offsets = np.concatenate([[0], np.cumsum(result.lengths, dtype=np.int64)])[:-1]
    return np.full(len(rows), index, np.int32), offsets[rows], result.lengths[rows], result.trained[rows]


def published(path: Path, plan: Plan) -> dict[str, Any] | None:
    """The report of the artifact at `path`, if it is whole and that of this very plan; None otherwise."""
    known = record.read(path) if path.is_dir() else None
    if known is None or record.missing_files(path, known):
        return None
    return finished(path, plan)


def facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the artifact's record says of the packs."""
    names = ("packs", "tokens", "trained_tokens", "conversations")
    return {
        "tokenizer_digest": report["tokenizer_digest"],
        "chat_template_digest": report["chat_template_digest"],
        "pack_size": report["pack_size"],
        "splits": {split: {name: figures[name] for name in names} for split, figures in report["splits"].items()},
    }
