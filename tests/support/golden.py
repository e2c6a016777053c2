"""Texts that are kept whole. STEPS_UPDATE_GOLDENS=1 writes them anew, to be read in the diff; a missing one fails."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def assert_golden(name: str, text: str) -> None:
    """`text` is, byte for byte, what tests/golden/<name> holds."""
    path = GOLDEN / name
    if os.environ.get("STEPS_UPDATE_GOLDENS") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    assert path.exists(), f"{path} is missing; STEPS_UPDATE_GOLDENS=1 writes it"
    assert text == path.read_bytes().decode(), f"{path} differs; STEPS_UPDATE_GOLDENS=1 writes it anew"
