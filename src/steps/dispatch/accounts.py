"""How an account of parameters and memory is shown: by `steps params` and on the sheet of a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from steps.dispatch.render import figures, section
from steps.shapes.account import Account, Kind
from steps.shapes.estimate import size


def texts(accounts: Mapping[str, Account]) -> Iterator[str]:
    """Of one model everything, of several a line each."""
    if set(accounts) == {""}:
        yield from text(accounts[""])
    elif accounts:
        yield from section("Models")
        yield from figures(_LINE, [_line(*item) for item in accounts.items()], summed=False)


_LINE = ("NAME", "TRAINED", "SHARE %", "EXPECTED PEAK", "")


def _line(name: str, account: Account) -> tuple[str, ...]:
    total, peak = account.total, account.memory
    recomputed = "recomputes activations" if account.recompute else ""
    share = f"{100 * total.share:.4f}"
    return name, f"{total.trainable:,}", share, size(account.nbytes) if peak else "", recomputed


def text(account: Account) -> Iterator[str]:
    """Two tables, each under its title, in 80 columns."""
    yield from section("Parameters")
    header = ("MODULE", "SHAPE", "LAYERS", "PARAMETERS", "TRAINED", "SHARE %")
    yield from figures(header, [*map(_row, account.kinds), _row(account.total)])
    if not account.memory:
        return
    yield from section("Memory of each process")
    held = [(row.what, row.dtype, f"{row.nbytes:,}", size(row.nbytes)) for row in account.memory]
    total = ("total" if account.recompute is None else "expected peak", "", f"{account.nbytes:,}", size(account.nbytes))
    yield from figures(("WHAT", "AS", "BYTES", ""), [*held, total])
    if account.tokens_per_step is not None:
        yield f"{account.tokens_per_step:,} tokens in an optimizer step, where every row is full"
    yield from account.notes


def _row(kind: Kind) -> tuple[str, ...]:
    name, shape, parameters = kind.name, " x ".join(map(str, kind.shape)), f"{kind.parameters:,}"
    if not kind.trainable:
        return name, shape, "", parameters, "", ""
    layers = f"{kind.adapted}/{kind.count}" if kind.is_linear else ""
    return name, shape, layers, parameters, f"{kind.trainable:,}", f"{100 * kind.share:.4f}" if kind.parameters else ""
