"""What a search came to, for people (a table, a plot) and for programs (JSON). Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from steps.engine.search.plot import Mark, scatter
from steps.engine.search.space import Configuration
from steps.engine.search.stages import Outcome, Trial

#: Bytes in the megabyte of the table and the plot.
_MB = 1e6


@dataclass(frozen=True)
class Report:
    """budget: in bytes.   sensitivity: of each layer as it was measured, in nats."""

    outcome: Outcome
    budget: int
    sensitivity: Sequence[float]

    @property
    def uniform(self) -> Trial:
        """The configuration with the same bits and rank everywhere, or what was left of it within the budget."""
        return self.outcome.trials[0]

    def summary(self) -> list[str]:
        """Two lines: what was tried, and what is chosen."""
        outcome, choice = self.outcome, self.outcome.choice
        tried = f"{len(outcome.trials)} configurations tried, {len(outcome.front)} on the Pareto front"
        return [
            f"{tried}; all alike ({_told(self.uniform.configuration)}) has loss {self.uniform.loss:.4f} with "
            f"{self.uniform.bytes / _MB:,.2f} MB",
            f"chosen: {_told(choice.configuration)}, loss {choice.loss:.4f} with {choice.bytes / _MB:,.2f} MB of "
            f"{self.budget / _MB:,.2f}",
        ]

    def json(self) -> str:
        """Every configuration that was tried, in order, which of them are the front, and the choice."""
        trials = [
            {
                "layer_bits": [gene[0] for gene in trial.configuration],
                "layer_ranks": [gene[1] for gene in trial.configuration],
                "loss": trial.loss,
                "bytes": trial.bytes,
                "stage": trial.stage,
            }
            for trial in self.outcome.trials
        ]
        whole = {
            "budget_bytes": self.budget,
            "layer_sensitivity_nats": list(self.sensitivity),
            "front": list(self.outcome.front),
            "chosen": self.outcome.chosen,
            "trials": trials,
        }
        return json.dumps(whole, indent=1) + "\n"

    def markdown(self) -> str:
        """The front, and the choice layer by layer, as tables."""
        outcome = self.outcome
        lines = [
            "# Bits and ranks, as searched", "", *(f"- {line}" for line in self.summary()), "",
            "Loss is the mean over trained tokens of calibration rows after a few steps of tuning, in nats; memory is "
            "the quantized linears, their scales and the adapters.", "", "## Pareto front", "",
            "| | memory (MB) | loss (nats/token) | bits, mean | rank, mean | found by |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
        ]  # fmt: skip
        for index in outcome.front:
            trial = outcome.trials[index]
            bits, rank = _means(trial.configuration)
            mark = "chosen" if index == outcome.chosen else ""
            row = f"{trial.bytes / _MB:,.3f} | {trial.loss:.4f} | {bits:.2f} | {rank:.2f} | {trial.stage}"
            lines.append(f"| {mark} | {row} |")
        lines += [
            "", "## The choice", "", "| layer | sensitivity (nats) | bits | rank |", "| ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        for layer, (bits, rank) in enumerate(outcome.choice.configuration):
            lines.append(f"| {layer} | {self.sensitivity[layer]:.3g} | {bits} | {rank} |")
        return "\n".join(lines) + "\n"

    def svg(self) -> str:
        """Memory against loss: everything tried, the front, the budget and the choice."""
        outcome = self.outcome
        marks = [
            Mark(trial.bytes / _MB, trial.loss, trial.stage, index in set(outcome.front))
            for index, trial in enumerate(outcome.trials)
        ]
        return scatter(
            marks, outcome.chosen, self.budget / _MB,
            title="Bits and ranks of each layer: loss against memory",
            x_label="memory of quantized linears and adapters (MB)",
            y_label="loss on calibration rows (nats/token)",
        )  # fmt: skip


def _means(configuration: Configuration) -> tuple[float, float]:
    bits, ranks = zip(*configuration, strict=True)
    return sum(bits) / len(bits), sum(ranks) / len(ranks)


def _told(configuration: Configuration) -> str:
    bits, rank = _means(configuration)
    return f"{bits:.2f} bits and rank {rank:.2f} on average"
