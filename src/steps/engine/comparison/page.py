"""The comparison as one HTML file that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from steps.engine.comparison.results import Row
from steps.engine.comparison.table import cells

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
div.wide { overflow-x: auto }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
tbody tr:first-child { background: #eef6ff }
figure { margin: 2rem 0 } figcaption { font-weight: 600 } svg { max-width: 100%; height: auto }
dt { font-weight: 600 } code { background: #f4f4f4; padding: 0 0.2em }
"""


def html(
    title: str, rows: Sequence[Row], told: Mapping[str, str], remarks: Iterable[str], pictures: Mapping[str, str],
    directory: Path,
) -> str:  # fmt: skip
    """told: what was compared, in words.   pictures: title by name, of the .svg files in `directory`."""
    header, lines = cells(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in told.items())
    notes = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{_svg(directory / f'{name}.svg')}</figure>"
        for name, caption in pictures.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n<dl>{facts}</dl>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
        f"<ul>{notes}</ul>\n{figures}\n</body></html>\n"
    )


def _svg(path: Path) -> str:
    """The picture itself, without the lines that only a file of its own needs. Ids are made its own."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for mark in ('id="', 'xlink:href="#', "url(#"):
        text = text.replace(mark, f"{mark}{path.stem}-")
    return text
