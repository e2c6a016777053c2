"""Figures, tables and pictures of a comparison, from made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from steps.engine.comparison import plots, table
from steps.engine.comparison.results import Outcome, ranked, summarized


def run(variant, lr=1e-3, seed=1, loss=2.0, **changes):
    known = {
        "step": "peft/megatron_bridge", "directory": "", "method": "lora", "dim": 8, "trainable": 1000,
        "parameters": 99_000, "base_loss": 3.0, "valid_loss": loss, "seconds": 10.0, "tokens": 5000,
        "peak_bytes": 10**9, "curve": [(1, 3.0), (2, loss)], "valid": [(0, 3.0), (2, loss)],
    }  # fmt: skip
    return Outcome(variant, lr=lr, seed=seed, **{**known, **changes})


def failed(variant, **changes):
    return run(variant, error="it broke", valid_loss=None, **changes)


def test_the_learning_rate_is_chosen_by_the_first_seed_and_the_others_count_at_that_rate():
    outcomes = [run("a", 0.1, 1, 2.5), run("a", 0.2, 1, 2.0), run("a", 0.2, 2, 2.2), failed("a", lr=0.3)]
    (row,) = summarized(outcomes)
    assert (row.lr, row.runs, row.error) == (0.2, 2, "")
    assert row.valid_loss.mean == pytest.approx(2.1)
    assert (row.valid_loss.low, row.valid_loss.high) == (2.0, 2.2)
    assert row.tokens_per_second.mean == 500
    assert row.share == pytest.approx(0.01)


def test_a_variant_none_of_whose_runs_ended_well_is_last_and_says_why():
    rows = summarized([failed("a"), run("b", loss=2.0), run("c", loss=1.0)])
    assert [row.name for row in ranked(rows)] == ["c", "b", "a"]
    text = table.markdown(rows)
    assert text.splitlines()[-1].startswith("| a | lora |")
    assert "failed: it broke" in text


def test_orders_that_may_be_luck_are_said():
    rows = summarized([run("a", seed=1, loss=2.0), run("a", seed=2, loss=2.4), run("b", seed=1, loss=2.3),
                       run("b", seed=2, loss=2.35), run("c", loss=9.0)])  # fmt: skip
    remarks = list(table.remarks(rows, 3.0))
    assert "a and b overlap over their seeds: their order may be luck." in remarks
    assert not [remark for remark in remarks if "c overlap" in remark]
    assert "The base, before any training, has a valid loss of 3.0000." in remarks


def test_columns_that_nobody_has_are_left_out():
    header, _ = table.cells(summarized([run("a", peak_bytes=None)]))
    assert "peak memory" not in header
    assert "accuracy" not in header
    header, lines = table.cells(summarized([run("a", accuracy=0.5), run("b")]))
    assert [line[header.index("accuracy")] for line in lines] == ["0.500", "-"]


def sweep():
    return [run(f"r{dim}", dim=dim, loss=2 + 1 / dim, trainable=1000 * dim) for dim in (4, 8, 16)]


def test_pictures_follow_what_is_known(tmp_path):
    pytest.importorskip("matplotlib", reason="extra report")
    outcomes = [*sweep(), run("full", method="full", dim=None, trainable=99_000), failed("x", curve=(), valid=())]
    drawn = plots.draw(summarized(outcomes), outcomes, tmp_path)
    assert list(drawn) == ["parameters", "time", "memory", "curves", "ranks_lora"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    ranks = (tmp_path / "ranks_lora.svg").read_text()
    for text in (">rank<", ">4<", ">8<", ">16<", "valid loss (nats per token)", "trained parameters (millions)"):
        assert text in ranks
    bars = (tmp_path / "memory.svg").read_text()
    assert "peak memory of the training process (GB)" in bars
    # The same numbers give the same files.
    again = tmp_path / "again"
    again.mkdir()
    plots.draw(summarized(outcomes), outcomes, again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in tmp_path.iterdir() if path.is_file())


def test_without_losses_there_are_fewer_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="extra report")
    outcomes = [run("a", valid_loss=None), run("b", valid_loss=None)]
    assert list(plots.draw(summarized(outcomes), outcomes, tmp_path)) == ["memory", "curves"]


def test_colours_and_markers_are_as_many_as_needed():
    assert len(plots.COLOURS) == len(set(plots.COLOURS)) == len(plots.MARKERS) == len(set(plots.MARKERS))
    assert Path(plots.__file__).read_text().count("import matplotlib") == 1  # inside the function that draws


def test_points_that_would_cover_each_other_are_moved_apart_around_their_middle():
    found = plots._apart([4.055e6, 4.2e6, 1e8, 4.055e6])
    assert found[2] == 1e8
    near = sorted(found[at] for at in (0, 1, 3))
    assert near[1] / near[0] == pytest.approx(plots._CLOSE)
    assert near[2] / near[1] == pytest.approx(plots._CLOSE)
    assert near[1] == pytest.approx((4.055e6 * 4.2e6 * 4.055e6) ** (1 / 3))
    assert found[1] == near[2]
    assert plots._apart([1.0, 10.0]) == [1.0, 10.0]
