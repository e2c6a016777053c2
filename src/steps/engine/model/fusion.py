"""Chains of elementwise operations and sums over rows as one pass over memory each, where torch.compile can make it so.

Only such pieces are compiled, never the model: matrix products gain nothing, and rows of any length, adapters of any
kind and recomputation stay out of the compiler's sight. A piece is written once, in plain PyTorch:

    @fused
    def swiglu_forward(x): ...

It runs as written until `start` has been called, compiled from then on. Both give the same to rounding (tests hold
them against each other); a run is one or the other from its first step to its last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Fused(Generic[P, R]):
    """A function that can be compiled."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.plain = function
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        self._called: Callable[P, R] = function
        #: What the first call took since `start`, compilation included; None before it.
        self.first_seconds: float | None = None
        _PIECES.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.compiled or self.first_seconds is not None:
            return self._called(*args, **kwargs)
        began = time.perf_counter()
        result = self._called(*args, **kwargs)
        self.first_seconds = time.perf_counter() - began
        return result

    @property
    def compiled(self) -> bool:
        """Whether it is compiled, or will be by the next call."""
        return self._called is not self.plain

    def switch(self, *, compiled: bool) -> None:
        """Run compiled, or as written, from now on."""
        # Rows differ in length: one kernel for all of them, not one for each.
        self._called = torch.compile(self.plain, dynamic=True) if compiled else self.plain
        self.first_seconds = None


_PIECES: list[Fused[Any, Any]] = []


def fused(function: Callable[P, R]) -> Fused[P, R]:
    """Decorator: see the module."""
    return Fused(function)


def start(device: torch.device) -> str:
    """Compile every piece when it is called next; '' or, where a trial on `device` fails, why nothing was changed."""
    import_module("torch._dynamo").reset()
    if device.type == "cpu":
        # Six small pieces: worker processes, each with a torch of its own, would cost more than they save.
        inductor: Any = import_module("torch._inductor.config")
        inductor.compile_threads = 1
    try:
        trial = torch.compile(lambda x: x.exp() + 1, dynamic=True)
        trial(torch.ones(3, 40, device=device))
    except Exception as error:  # no compiler, no headers of Python, a full disk: half a dozen kinds of it
        return str(error).strip().partition("\n")[0] or type(error).__name__
    for piece in _PIECES:
        piece.switch(compiled=True)
    return ""


def stop() -> None:
    """Run every piece as it is written."""
    for piece in _PIECES:
        piece.switch(compiled=False)


def active() -> bool:
    """Whether pieces are compiled."""
    return any(piece.compiled for piece in _PIECES)


def spent() -> tuple[int, float]:
    """How many pieces have been compiled since `start`, and the seconds that it took."""
    seconds = [piece.first_seconds for piece in _PIECES if piece.first_seconds is not None]
    return len(seconds), sum(seconds)
