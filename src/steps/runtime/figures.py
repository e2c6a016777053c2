"""Figures as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def interval(figures: Mapping[str, Any], name: str) -> str:
    """ "3.214 (3.102 to 3.326)": a figure, and its `_low` and `_high` where there are any."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    shown = f"{figures[name]:,.4g}"
    return shown if low is None else f"{shown} ({low:,.4g} to {high:,.4g})"
