"""What runs left behind: numbers of one run, and of a variant over its seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steps.artifacts import record
from steps.engine.comparison.variants import Trial


@dataclass(frozen=True)
class Outcome:
    """One run.

    error:        why it failed, '' where it did not; what it has measured up to then is there.
    method, dim:  "full" where the model itself was trained; dim None where the method has none.
    trainable, parameters: trained ones, and those of the base.
    base_loss, valid_loss: on the valid split, before and after; None where the data have none or the run failed.
    accuracy, macro_f1: of eval/classify, None where it was not asked for.
    seconds:      of all optimizer steps, evaluations and saves left out.   tokens: in them.
    peak_bytes:   of memory, of the process that trained.
    curve, valid: (iteration, loss) of training, and on the valid split.
    """

    variant: str
    step: str
    lr: float
    seed: int
    directory: str
    error: str = ""
    method: str = ""
    dim: int | None = None
    trainable: int | None = None
    parameters: int | None = None
    base_loss: float | None = None
    valid_loss: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    seconds: float | None = None
    tokens: int | None = None
    peak_bytes: int | None = None
    curve: Sequence[tuple[int, float]] = ()
    valid: Sequence[tuple[int, float]] = ()

    def line(self) -> str:
        """The run in a line of a log."""
        what = f"{self.variant}, lr {self.lr:g}, seed {self.seed}: "
        if self.error:
            return f"{what}failed: {self.error}"
        told = [f"valid loss {self.valid_loss:.4f}"] if self.valid_loss is not None else []
        told += [f"accuracy {self.accuracy:.3f}"] if self.accuracy is not None else []
        return what + ", ".join([*told, f"{self.trainable or 0:,} trained parameters"])


def collected(trial: Trial, exit_code: int, error: str) -> Outcome:
    """Read what a run left in its directory."""
    known = record.read(trial.checkpoint)
    facts: Mapping[str, Any] = {} if known is None else known.facts
    rows, peak = _metrics(trial.directory)
    steps = {row["iteration"]: row for row in rows if "loss" in row}
    report = _json(trial.directory / "classification" / "report.json").get("figures", {})
    failed = exit_code != 0
    return Outcome(
        variant=trial.variant, step=trial.step, lr=trial.lr, seed=trial.seed, directory=str(trial.directory),
        error=(error or f"it ended with exit code {exit_code}") if failed else "",
        method=str(facts.get("method", "")),
        dim=facts.get("dim"),
        trainable=facts.get("trainable_parameters"),
        parameters=facts.get("parameters"),
        base_loss=facts.get("valid_loss_first"),
        valid_loss=None if failed else facts.get("valid_loss_last"),
        accuracy=report.get("accuracy"),
        macro_f1=report.get("macro_f1"),
        seconds=sum(row["seconds"] for row in steps.values()) if steps else None,
        tokens=sum(row["tokens"] for row in steps.values()) if steps else None,
        peak_bytes=peak,
        curve=[(number, row["loss"]) for number, row in sorted(steps.items())],
        valid=sorted({row["iteration"]: row["valid_loss"] for row in rows if "valid_loss" in row}.items()),
    )  # fmt: skip


def _metrics(directory: Path) -> tuple[list[dict[str, Any]], int | None]:
    """The metrics of all jobs of a run, the first first (it may have been taken up again), and the highest peak."""
    rows, peaks = [], []
    for job in sorted((directory / ".steps" / "jobs").glob("*")):
        try:
            lines = (job / "metrics.jsonl").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut short where it was killed
                continue
        if peak := _json(job / "summary.json").get("peak_bytes"):
            peaks.append(int(peak))
    return rows, max(peaks, default=None)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Figure:
    """A number over the seeds: its mean, the least and the most; one run: three times the same."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | int | None]) -> Figure | None:
        """None where no run has it."""
        known = [float(value) for value in values if value is not None]
        return cls(statistics.fmean(known), min(known), max(known)) if known else None


@dataclass(frozen=True)
class Row:
    """A variant: what its runs from every seed, at the chosen learning rate, came to.

    runs: those that ended well.   error: of the variant, '' where at least one run ended well.
    """

    name: str
    method: str
    dim: int | None
    lr: float
    runs: int
    trainable: int | None
    parameters: int | None
    valid_loss: Figure | None
    accuracy: Figure | None
    macro_f1: Figure | None
    seconds: Figure | None
    tokens_per_second: Figure | None
    peak_bytes: int | None
    error: str = ""

    @property
    def share(self) -> float | None:
        """What is trained, of all parameters with the adapter's own."""
        if not self.trainable or not self.parameters:
            return None
        return self.trainable / (self.parameters + (self.trainable if self.method != "full" else 0))

    def facts(self) -> dict[str, Any]:
        """What an artifact's record says of it: the means."""
        figures = {"valid_loss": self.valid_loss, "accuracy": self.accuracy}
        known = {name: figure.mean for name, figure in figures.items() if figure is not None}
        told = {"lr": self.lr, "trainable_parameters": self.trainable, "peak_bytes": self.peak_bytes, **known}
        return told | ({"error": self.error} if self.error else {})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def summarized(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each variant, in their order."""
    return [_row(name, [one for one in outcomes if one.variant == name]) for name in _names(outcomes)]


def _names(outcomes: Sequence[Outcome]) -> Iterator[str]:
    return iter(dict.fromkeys(outcome.variant for outcome in outcomes))


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The run with the lowest valid loss; None where all have failed."""
    whole = [outcome for outcome in outcomes if outcome.valid_loss is not None]
    return min(whole, key=lambda outcome: outcome.valid_loss or 0.0, default=None)


def chosen(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs of one variant at the learning rate that was best from the first seed; all where none ended well."""
    first = best([one for one in outcomes if one.seed == outcomes[0].seed])
    return [one for one in outcomes if first is None or one.lr == first.lr]


def _row(name: str, outcomes: Sequence[Outcome]) -> Row:
    some = chosen(outcomes)
    well = [one for one in some if not one.error]
    shown = (well or some)[0]
    speeds = [one.tokens / one.seconds for one in well if one.tokens and one.seconds]
    return Row(
        name=name, method=shown.method, dim=shown.dim, lr=shown.lr, runs=len(well),
        trainable=shown.trainable, parameters=shown.parameters,
        valid_loss=Figure.of([one.valid_loss for one in well]),
        accuracy=Figure.of([one.accuracy for one in well]),
        macro_f1=Figure.of([one.macro_f1 for one in well]),
        seconds=Figure.of([one.seconds for one in well]),
        tokens_per_second=Figure.of(speeds),
        peak_bytes=max((one.peak_bytes for one in well if one.peak_bytes), default=None),
        error="" if well else shown.error,
    )  # fmt: skip


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The rows by their valid loss, the lowest first; those without one behind, in their order."""
    return sorted(rows, key=lambda row: (row.valid_loss is None, row.valid_loss.mean if row.valid_loss else 0.0))
