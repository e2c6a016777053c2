"""The comparison in pictures: PNG for documents, SVG for pages. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from steps.engine.comparison.results import Outcome, Row, chosen, ranked

#: Okabe and Ito's colours, which people who see fewer colours tell apart too, without the yellow (too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
#: With each colour a marker and a line of its own, for prints in grey.
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X", "*"), ("-", "--", "-.", ":")
_SETTINGS: Any = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "figure.constrained_layout.use": True, "svg.fonttype": "none",
    # The same picture from the same numbers, to the byte.
    "svg.hashsalt": "steps",
}  # fmt: skip


def draw(rows: Sequence[Row], outcomes: Sequence[Outcome], directory: Path) -> dict[str, str]:
    """Write NAME.png and NAME.svg of every picture that the numbers allow; returns its title by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {}
    with pyplot.rc_context(_SETTINGS):
        for name, title, make in _pictures(rows, outcomes):
            figure, axes = pyplot.subplots(figsize=(7.2, 4.6))
            make(axes)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                figure.savefig(directory / f"{name}.{suffix}", dpi=150, metadata=metadata)
            pyplot.close(figure)
            drawn[name] = title
    return drawn


Make = Callable[[Any], None]


def _pictures(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str, Make]]:
    """Name, title and maker of each picture."""
    places = {row.name: number for number, row in enumerate(rows)}
    with_loss = [row for row in rows if row.valid_loss is not None]
    if any(row.trainable for row in with_loss):
        make = partial(_against, rows=with_loss, places=places, label="trained parameters", of=_trained, log=True)
        yield "parameters", "Valid loss against trained parameters", make
    if any(row.seconds for row in with_loss):
        make = partial(_against, rows=with_loss, places=places, label="training time (s)", of=_seconds)
        yield "time", "Valid loss against training time", make
    if any(row.peak_bytes for row in rows):
        yield "memory", "Peak memory", partial(_memory, rows=rows, places=places)
    if any(outcome.curve for outcome in outcomes):
        yield "curves", "Training and valid loss", partial(_curves, rows=rows, outcomes=outcomes, places=places)
    for method, some in _swept(with_loss):
        yield f"ranks_{method}", f"Valid loss and trained parameters by rank: {method}", partial(_ranks, rows=some)


def _trained(row: Row) -> float | None:
    return row.trainable


def _seconds(row: Row) -> float | None:
    return row.seconds.mean if row.seconds else None


def _style(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def _against(
    axes: Any, rows: Sequence[Row], places: dict[str, int], label: str, of: Callable[[Row], float | None], *,
    log: bool = False,
) -> None:  # fmt: skip
    """Valid loss (low is good) against something; bars from the least to the most of the seeds.

    log: on a logarithmic axis, where what would lie on each other is moved apart.
    """
    known = [(row, x, row.valid_loss) for row in rows if (x := of(row)) is not None and row.valid_loss is not None]
    values = [x for _, x, _ in known]
    shown = _apart(values) if log else values
    for (row, _, loss), x in zip(known, shown, strict=True):
        spread = [[loss.mean - loss.low], [loss.high - loss.mean]] if row.runs > 1 else None
        axes.errorbar(x, loss.mean, yerr=spread, label=row.name, capsize=4, linestyle="", **_style(places[row.name]))
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(label if shown == values else f"{label} (where they are close, side by side)")
    axes.set_ylabel("valid loss (nats per token)")
    _legend(axes, len(rows))


#: Two points that are nearer than this factor on an axis of decades cover each other.
_CLOSE = 1.15


def _apart(values: Sequence[float]) -> list[float]:
    """The values, each at least a factor _CLOSE above the one below it; groups stay around their middle."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    groups: list[list[int]] = []
    for at in order:
        if groups and values[at] < values[groups[-1][-1]] * _CLOSE:
            groups[-1].append(at)
        else:
            groups.append([at])
    found = list(values)
    for group in (group for group in groups if len(group) > 1):
        middle = math.exp(sum(math.log(values[at]) for at in group) / len(group))
        for number, at in enumerate(group):
            found[at] = middle * _CLOSE ** (number - (len(group) - 1) / 2)
    return found


def _memory(axes: Any, rows: Sequence[Row], places: dict[str, int]) -> None:
    known = [row for row in reversed(ranked(rows)) if row.peak_bytes]
    sizes = [(row.peak_bytes or 0) / 1e9 for row in known]
    bars = axes.barh([row.name for row in known], sizes, color=[_style(places[row.name])["color"] for row in known])
    axes.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=3)
    axes.set_xlim(0, 1.12 * max(sizes))
    axes.set_xlabel("peak memory of the training process (GB)")
    axes.grid(visible=False, axis="y")


def _curves(axes: Any, rows: Sequence[Row], outcomes: Sequence[Outcome], places: dict[str, int]) -> None:
    """The first run of each variant at its learning rate: training loss thin, valid loss marked."""
    for row in rows:
        run = next((one for one in chosen([one for one in outcomes if one.variant == row.name]) if one.curve), None)
        if run is None:
            continue
        place = places[row.name]
        style = _style(place)
        line = LINES[place // len(COLOURS) % len(LINES)]
        axes.plot(*zip(*run.curve, strict=True), color=style["color"], linestyle=line, linewidth=1, alpha=0.45)
        if run.valid:
            # A line through two points would speak of what lies between them.
            through = line if len(run.valid) > 2 else ""
            axes.plot(*zip(*run.valid, strict=True), linestyle=through, linewidth=1.8, label=row.name, **style)
        else:
            axes.plot([], [], linestyle=line, label=row.name, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token); thin: training, marked: valid")
    _legend(axes, len(rows))


def _swept(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Methods of which three ranks or more were tried, and their rows by rank."""
    for method in dict.fromkeys(row.method for row in rows):
        some = [row for row in rows if row.method == method and row.dim]
        if len({row.dim for row in some}) >= 3:
            yield method, sorted(some, key=lambda row: row.dim or 0)


def _ranks(axes: Any, rows: Sequence[Row]) -> None:
    """Valid loss on the left, trained parameters on the right."""
    ranks = [row.dim for row in rows]
    losses = [row.valid_loss for row in rows if row.valid_loss is not None]
    means = [loss.mean for loss in losses]
    spread = [[loss.mean - loss.low for loss in losses], [loss.high - loss.mean for loss in losses]]
    axes.errorbar(ranks, means, yerr=spread, capsize=4, label="valid loss", **_style(0))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel("rank")
    axes.set_ylabel("valid loss (nats per token)")
    right = axes.twinx()
    trained = [(row.trainable or 0) / 1e6 for row in rows]
    right.plot(ranks, trained, linestyle="--", label="trained parameters", **_style(1))
    right.set_ylabel("trained parameters (millions)")
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    handles = [handle for side in (axes, right) for handle in side.get_legend_handles_labels()[0]]
    names = [name for side in (axes, right) for name in side.get_legend_handles_labels()[1]]
    axes.legend(handles, names, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.14), frameon=False)


def _legend(axes: Any, count: int) -> None:
    """Beside the picture, where it covers no point."""
    axes.figure.legend(loc="outside right center", frameon=False, ncols=1 if count <= 16 else 2)
