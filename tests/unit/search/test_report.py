"""What a search leaves behind: every number is in the JSON, the table and the plot show the front and the choice."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest

from steps.engine.search.plot import STYLES, ticks
from steps.engine.search.report import Report
from steps.engine.search.space import Space
from steps.engine.search.stages import Settings, search

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report():
    space = Space([(2, 4, 8)] * 3, [(4, 8)] * 3, lambda layer, bits, rank: 100_000 * bits + 5_000 * rank, 1_350_000)

    def loss(configuration):
        return 2 + sum((1 + layer) * 2.0**-bits + 0.1 / rank for layer, (bits, rank) in enumerate(configuration))

    return Report(search(space, [1, 2, 3], loss, 4, Settings(5, 3, 4, 1.0, 0)), space.budget, [0.1, 0.2, 0.3])


def test_the_json_holds_all_that_was_tried(report):
    told = json.loads(report.json())
    outcome = report.outcome
    assert told["budget_bytes"] == 1_350_000
    assert [trial["bytes"] for trial in told["trials"]] == [trial.bytes for trial in outcome.trials]
    assert [trial["loss"] for trial in told["trials"]] == [trial.loss for trial in outcome.trials]
    assert told["trials"][told["chosen"]]["layer_bits"] == [gene[0] for gene in outcome.choice.configuration]
    assert told["chosen"] in told["front"]
    assert {trial["stage"] for trial in told["trials"]} == set(STYLES)


def test_the_table_lists_the_front_by_memory_and_marks_the_choice(report):
    text = report.markdown()
    front = text.partition("## Pareto front")[2].partition("##")[0]
    rows = [line for line in front.splitlines() if line.startswith("|")][2:]
    sizes = [float(row.split("|")[2]) for row in rows]
    assert sizes == sorted(sizes)
    assert len(rows) == len(report.outcome.front)
    (chosen,) = (row for row in rows if row.startswith("| chosen |"))
    assert f"{report.outcome.choice.loss:.4f}" in chosen
    layers = text.partition("## The choice")[2].splitlines()[4:]
    expected = [
        f"| {n} | {0.1 * (n + 1):.3g} | {b} | {r} |" for n, (b, r) in enumerate(report.outcome.choice.configuration)
    ]
    assert layers == expected


def test_the_plot_is_whole_svg_with_labelled_axes_and_everything_inside(report):
    root = ElementTree.fromstring(report.svg())
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for label in ("memory of quantized linears and adapters (MB)", "loss on calibration rows (nats/token)", "budget",
                  "Pareto front", "chosen", *STYLES):  # fmt: skip
        assert label in texts, label
    width, height = float(root.get("width")), float(root.get("height"))
    dots = [element for kind in ("circle", "polygon") for element in root.iter(f"{SVG}{kind}")]
    # A mark for each trial and each entry of the legend, and two rings.
    assert len(dots) == len(report.outcome.trials) + len(STYLES) + 2
    for element in root.iter(f"{SVG}circle"):
        assert 0 < float(element.get("cx")) < width
        assert 0 < float(element.get("cy")) < height
    (line,) = root.iter(f"{SVG}polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    # A staircase down to the right: two corners for each point but one.
    assert len(corners) == 2 * len(report.outcome.front) - 1
    assert all(a <= c and b <= d for (a, b), (c, d) in pairwise(corners))
    colours = {element.get("fill") for element in dots} & {colour for colour, _ in STYLES.values()}
    assert len(colours) == len(STYLES)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0031, 0.0047), (-5, 1234), (41.2, 41.9)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low <= min(found) <= max(found) <= high
    steps = np.diff(found)
    assert steps == pytest.approx(np.full(len(steps), steps[0]))
    assert f"{steps[0]:.6e}"[0] in "125"
