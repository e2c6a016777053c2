"""The page of a comparison in a real browser that reaches no network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from unit.test_comparison import failed, run, sweep

from steps.engine.comparison import plots, report
from steps.engine.comparison.results import summarized

matplotlib = pytest.importorskip("matplotlib", reason="extra report")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (`make servers` installs it)")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    outcomes = [*sweep(), run("full <fine> & tuned", method="full", dim=None, trainable=99_000), failed("x")]
    rows = summarized(outcomes)
    report.write(directory, rows, outcomes, {"base": "a base"}, plots.draw(rows, outcomes, directory))
    return directory / "report.html"


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,3600",
        "--enable-logging=stderr", f"--user-data-dir={page.parent / 'browser'}",
        # Whatever it would fetch goes to a port where nobody answers.
        "--proxy-server=http://127.0.0.1:9", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@needs_browser
def test_the_page_shows_its_table_and_every_picture(page):
    done = browse(page, "--dump-dom")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<svg") == 5
    assert len(re.findall("<tr>", done.stdout)) == 1 + 5
    assert "full &lt;fine&gt; &amp; tuned" in done.stdout
    assert ":CONSOLE" not in done.stderr


@needs_browser
def test_the_pictures_are_drawn_where_they_stand(page):
    """In the screenshot every variant's colour is to be seen, in the table's rows and far below them."""
    picture = page.parent / "page.png"
    done = browse(page, f"--screenshot={picture}")
    assert done.returncode == 0, done.stderr
    pixels = (matplotlib.image.imread(picture)[:, :, :3] * 255).round().astype(int)
    for colour in plots.COLOURS[:4]:
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        rows = (abs(pixels - wanted).max(axis=2) <= 2).any(axis=1).nonzero()[0]
        assert len(rows) > 100, colour
        assert rows.max() > 1500, colour
