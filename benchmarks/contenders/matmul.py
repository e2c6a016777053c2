"""The floor: how fast this machine multiplies matrices, by torch's own product."""

from __future__ import annotations

import sys

import torch

from benchmarks.contenders.turns import Turns

CUDA = torch.cuda.is_available()
SIZE, REPEATS = (8192, 20) if CUDA else (2048, 10)


def main() -> None:
    a, b = (torch.randn(SIZE, SIZE, device="cuda" if CUDA else "cpu").to(getattr(torch, sys.argv[1])) for _ in range(2))
    turns = Turns()
    while turns.asked():
        for _ in range(REPEATS):
            a @ b
        if CUDA:
            torch.cuda.synchronize()
        turns.done(flops=REPEATS * 2 * SIZE**3)


if __name__ == "__main__":
    main()
