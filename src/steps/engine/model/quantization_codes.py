"""The codes that weights and their scales are written in, as look-up tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Equal parts of [-1, 1], so many that no two bounds between neighbours of a code lie in the same one.
_CELLS = 4096


@dataclass(frozen=True)
class Code:
    """What `bits` bits stand for: values[index], ascending, in [-1, 1]. bits divides 8."""

    bits: int
    values: tuple[float, ...]


#: NormalFloat: the positive and the negative quantiles of N(0, 1) that hold equally many values, apart, and an exact
#: zero; k bits have 2^(k-1) positive and 2^(k-1) - 1 negative ones. nf4 is the table of the paper's appendix E.
CODES = {
    "nf2": Code(2, (-1.0, 0.0, 0.43581816458311545, 1.0)),
    "nf4": Code(
        4,
        (
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ),
    ),
    "int8": Code(8, tuple(step / 127 for step in range(-127, 128))),
}  # fmt: skip


def nearest(values: Tensor, code_name: str) -> Tensor:
    """Index (uint8) of the nearest entry of a code; in the middle between two the lower. values: [n], in [-1, 1].

    What torch.bucketize over the bounds between neighbours gives, in a tenth of its time: the cell of a value says how
    many bounds lie in cells before it, and which one may lie in its own.
    """
    before, bound = _cells(code_name, values.device)
    cell = values.add(1).mul_(_CELLS / 2).int()
    return torch.index_select(before, 0, cell).add_(values > torch.index_select(bound, 0, cell))


@cache
def _cells(code_name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    bounds = _midpoints(torch.tensor(CODES[code_name].values))
    cell = bounds.add(1).mul_(_CELLS / 2).int()  # the very rounding that values get
    assert len(set(cell.tolist())) == len(cell)
    before = torch.searchsorted(cell, torch.arange(_CELLS + 1, dtype=torch.int32)).to(torch.uint8)
    bound = torch.full((_CELLS + 1,), 2.0).index_copy_(0, cell.long(), bounds)
    return before.to(device), bound.to(device)


def decoded(packed: Tensor, code_name: str) -> Tensor:
    """What bytes stand for, float32: 8 / bits values each, the first from the highest bits. packed: [n], uint8."""
    if code_name == "int8":
        # Cheaper than to look it up, and the same bits: by a tensor, since a GPU multiplies with a number's reciprocal.
        return packed.float().sub_(127).div_(torch.full((), 127.0, device=packed.device))
    # All values of a byte are gathered as one element, 8 or 16 bytes wide.
    return torch.index_select(_table(code_name, packed.device), 0, packed.int()).view(torch.float32)


@cache
def _table(code_name: str, device: torch.device) -> Tensor:
    """What each byte stands for: [256], an element being the bytes of 8 / bits float32 values."""
    code = CODES[code_name]
    values = torch.tensor(code.values, device=device)
    byte = torch.arange(256, device=device)
    shifts = range(8 - code.bits, -1, -code.bits)
    wide = torch.stack([values[byte >> shift & 2**code.bits - 1] for shift in shifts], dim=1)
    element = {2: torch.int64, 4: torch.complex128}[len(shifts)]
    return wide.view(element).view(-1)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the signed 8-bit dynamic data type (arXiv 1511.04561, arXiv 2110.02861 section 2.1).

    For each of seven exponents the middles of 2^i equal parts of [0.1, 1], with both signs; zero and one.
    """
    positive: list[float] = []
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        positive += (10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), device=device)


@cache
def dynamic_points() -> Tensor:
    """The entry of the dynamic map nearest to each of 2^16 equidistant points in [-1, 1], uint8."""
    points = torch.arange(65536).double().div(65535).mul(2).sub(1).float()
    return torch.bucketize(points, _midpoints(dynamic_map(torch.device("cpu")))).to(torch.uint8)
