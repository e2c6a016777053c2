"""How an account of parameters and memory is shown: by `steps params` and on the sheet of a dry run."""

from __future__ import annotations

from collections.abc import Iterator

from steps.dispatch.render import figures, section
from steps.shapes.account import Account, Kind

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def text(account: Account) -> Iterator[str]:
    """Two tables, each under its title, in 80 columns."""
    yield from section("Parameters")
    header = ("MODULE", "SHAPE", "LAYERS", "PARAMETERS", "TRAINED", "SHARE %")
    yield from figures(header, [*map(_row, account.kinds), _row(account.total)])
    if not account.memory:
        return
    yield from section("Memory of each process")
    held = [(row.what, row.dtype, f"{row.nbytes:,}", size(row.nbytes)) for row in account.memory]
    total = ("total", "", f"{account.nbytes:,}", size(account.nbytes))
    yield from figures(("WHAT", "AS", "BYTES", ""), [*held, total])
    yield from account.notes


def _row(kind: Kind) -> tuple[str, ...]:
    name, shape, parameters = kind.name, " x ".join(map(str, kind.shape)), f"{kind.parameters:,}"
    if not kind.trainable:
        return name, shape, "", parameters, "", ""
    layers = f"{kind.adapted}/{kind.count}" if kind.is_linear else ""
    return name, shape, layers, parameters, f"{kind.trainable:,}", f"{100 * kind.share:.4f}" if kind.parameters else ""


def size(nbytes: int) -> str:
    """Decimal, as disks and documents count: 3.34 GB."""
    unit, name = next(((unit, name) for unit, name in _UNITS if nbytes >= unit), (1, "B"))
    return f"{nbytes / unit:.2f} {name}" if unit > 1 else f"{nbytes} B"
