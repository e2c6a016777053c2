"""What became of every row: the report of a packing run, as data and as lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steps.engine.data.chat import NOTES, REASONS
from steps.engine.data.reading import DataFile
from steps.engine.data.spool import ChunkResult
from steps.engine.data.tokenizing import FIRST_LINES


class Account:
    """Adds up the chunks' results, which must come in order (the first line numbers are those of the first chunks)."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        self._files = files
        self.rows: Counter[int] = Counter()
        self.kept = self.copies = self.not_sampled = self.padding = 0
        self.dropped: dict[str, dict[str, Any]] = {}
        self.notes: Counter[str] = Counter()

    def add(self, result: ChunkResult) -> None:
        """Add one chunk."""
        self.rows[result.file] += result.rows
        self.kept += len(result.lengths)
        self.copies += int(result.copies.sum())
        self.not_sampled += result.not_sampled
        self.padding += result.padding
        self.notes.update(result.notes)
        for reason, (count, lines) in result.dropped.items():
            entry = self.dropped.setdefault(reason, {"count": 0, "why": REASONS[reason], "first": []})
            entry["count"] += count
            path = str(self._files[result.file].path)
            entry["first"] += [f"{path}:{line}" for line in lines[: FIRST_LINES - len(entry["first"])]]

    @property
    def read(self) -> int:
        """Rows read."""
        return sum(self.rows.values())

    @property
    def lost(self) -> int:
        """Rows dropped."""
        return int(sum(entry["count"] for entry in self.dropped.values()))

    def to_dict(self) -> dict[str, Any]:
        """For report.json. read == kept + dropped + not_sampled."""
        ordered = sorted(self.dropped.items(), key=lambda entry: (-entry[1]["count"], entry[0]))
        return {
            "rows": {"read": self.read, "kept": self.kept, "dropped": self.lost, "not_sampled": self.not_sampled},
            "conversations": self.copies,
            "dropped": dict(ordered),
            "notes": {name: {"count": count, "what": NOTES[name]} for name, count in sorted(self.notes.items())},
            "padding_tokens": self.padding,
            "inputs": [
                {"path": str(file.path), "sha256": file.digest, "weight": file.weight, "rows": self.rows[number]}
                for number, file in enumerate(self._files)
            ],
        }


def split_facts(lengths: Any, trained: Any, packs: int, pack_size: int) -> dict[str, Any]:
    """The figures of one split. efficiency: the share of the rows' capacity that holds tokens."""
    tokens = int(lengths.sum())
    return {
        "packs": packs,
        "tokens": tokens,
        "trained_tokens": int(trained.sum()),
        "conversations": len(lengths),
        "efficiency": round(tokens / (packs * pack_size), 6) if packs else 0.0,
    }


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines for the person who watches."""
    rows = report["rows"]
    sampled = f", {rows['not_sampled']:,} left out by their weight" if rows["not_sampled"] else ""
    yield f"{rows['read']:,} rows read: {rows['kept']:,} kept, {rows['dropped']:,} dropped{sampled}"
    for reason, entry in report["dropped"].items():
        yield f"  dropped {entry['count']:,} {reason}: {entry['why']} (first at {', '.join(entry['first'][:3])})"
    for name, entry in report["notes"].items():
        yield f"  note: {entry['count']:,} {name}: {entry['what']}"
    for split, facts in report["splits"].items():
        if facts["packs"]:
            held = f"{facts['conversations']:,} conversations, {facts['tokens']:,} tokens"
            trained = f"{facts['trained_tokens']:,} trained"
            full = f"{100 * facts['efficiency']:.2f} % full"
            yield f"{split}: {facts['packs']:,} packs of {report['pack_size']:,} with {held} ({trained}), {full}"
        elif facts["asked"]:
            yield f"warning: {split} was asked for, but no conversation fell into it"
