"""The floor: how fast this machine multiplies matrices, by torch's own product."""

from __future__ import annotations

import sys

import torch

from benchmarks.contenders.turns import Turns

SIZE, REPEATS = 2048, 10


def main() -> None:
    a, b = (torch.randn(SIZE, SIZE).to(getattr(torch, sys.argv[1])) for _ in range(2))
    turns = Turns()
    while turns.asked():
        for _ in range(REPEATS):
            a @ b
        turns.done(flops=REPEATS * 2 * SIZE**3)


if __name__ == "__main__":
    main()
