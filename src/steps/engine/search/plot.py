"""A scatter plot as SVG text, written by hand: one more dependency would draw nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 760, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 52, 96
#: Colour (Okabe and Ito's, told apart by every kind of colour blindness) and shape of each kind of mark, in the
#: legend's order.
STYLES = {
    "uniform": ("#000000", "square"),
    "initialization": ("#E69F00", "triangle"),
    "genetic": ("#56B4E9", "circle"),
    "refinement": ("#009E73", "diamond"),
}
_FRONT, _CHOSEN = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Mark:
    """One point. kind: a key of STYLES."""

    x: float
    y: float
    kind: str
    on_front: bool


@dataclass(frozen=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside of [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def scatter(marks: Sequence[Mark], chosen: int, limit: float, *, title: str, x_label: str, y_label: str) -> str:
    """The marks, a step line through those on the front, a line at x = limit, and a ring around the chosen one.

    The y axis reaches over the front and the uniform mark, and as far again, if there is something to see; few bits may
    ruin a model, and what lies far above stands at the axis' upper end, hollow.
    """
    x = _axis([mark.x for mark in marks] + [limit], _LEFT, _WIDTH - _RIGHT)
    telling = [mark.y for mark in marks if mark.on_front or mark.kind == "uniform"]
    reach = 2 * max(telling) - min(telling)
    y = _axis([mark.y for mark in marks if mark.y <= reach], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_WIDTH / 2, 26, title, size=16),
        *_grid(x, y),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - _BOTTOM + 42, x_label),
        _text(22, (_TOP + _HEIGHT - _BOTTOM) / 2, y_label, turned=True),
        *_limit(x.at(limit)),
        *_front(marks, x, y),
    ]
    for mark in sorted(marks, key=lambda mark: mark.on_front):
        above = mark.y > y.high
        colour, shape = STYLES[mark.kind]
        parts.append(_shape(shape, x.at(mark.x), y.end if above else y.at(mark.y), colour, hollow=above))
    if any(mark.y > y.high for mark in marks):
        parts.append(_text(_LEFT, _TOP - 8, "hollow: above this range", anchor="start", colour="#555555"))
    best = marks[chosen]
    parts.append(_ring(x.at(best.x), y.at(best.y)))
    return "\n".join([*parts, *_legend(marks), "</svg>"]) + "\n"


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return _Axis(low - margin, high + margin, start, end)


def _grid(x: _Axis, y: _Axis) -> list[str]:
    lines = []
    for value in ticks(x.low, x.high):
        lines.append(_line(x.at(value), y.start, x.at(value), y.end, "#e4e4e4"))
        lines.append(_text(x.at(value), y.start + 20, f"{value:,g}"))
    for value in ticks(y.low, y.high):
        lines.append(_line(x.start, y.at(value), x.end, y.at(value), "#e4e4e4"))
        lines.append(_text(x.start - 8, y.at(value) + 4, f"{value:,g}", anchor="end"))
    lines.append(_line(x.start, y.start, x.end, y.start, "#333333"))
    lines.append(_line(x.start, y.start, x.start, y.end, "#333333"))
    return lines


def _limit(at: float) -> list[str]:
    line = _line(at, _HEIGHT - _BOTTOM, at, _TOP, "#666666", 'stroke-dasharray="5 4"')
    return [line, _text(at, _TOP - 8, "budget", colour="#555555")]


def _front(marks: Sequence[Mark], x: _Axis, y: _Axis) -> list[str]:
    """The staircase that nothing tried is below."""
    front = sorted((mark for mark in marks if mark.on_front), key=lambda mark: (mark.x, mark.y))
    corners = []
    for before, mark in zip([None, *front], front, strict=False):
        if before is not None:
            corners.append((x.at(mark.x), y.at(before.y)))
        corners.append((x.at(mark.x), y.at(mark.y)))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return [f'<polyline points="{points}" fill="none" stroke="{_FRONT}" stroke-width="1.8"/>']


def _legend(marks: Sequence[Mark]) -> list[str]:
    entries = [kind for kind in STYLES if any(mark.kind == kind for mark in marks)]
    parts, at, height = [], float(_LEFT), _HEIGHT - 22
    for kind in entries:
        colour, shape = STYLES[kind]
        parts += [_shape(shape, at + 6, height - 4, colour), _text(at + 18, height, kind, anchor="start")]
        at += 34 + 7.2 * len(kind)
    parts += [_line(at, height - 4, at + 22, height - 4, _FRONT, 'stroke-width="1.8"')]
    parts += [_text(at + 28, height, "Pareto front", anchor="start"), _ring(at + 136, height - 4)]
    parts += [_text(at + 150, height, "chosen", anchor="start")]
    return parts


def _shape(shape: str, x: float, y: float, colour: str, *, hollow: bool = False) -> str:
    fill = f'fill="none" stroke="{colour}" stroke-width="1.4"' if hollow else f'fill="{colour}" fill-opacity="0.85"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {fill}/>'
    corners = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "triangle": ((0, -6), (5.5, 4.5), (-5.5, 4.5)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" {fill}/>'


def _ring(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{_CHOSEN}" stroke-width="2.4"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", size: int = 13, colour: str = "#222222",
    turned: bool = False,
) -> str:  # fmt: skip
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{turn}>'
        f"{escape(text)}</text>"
    )
