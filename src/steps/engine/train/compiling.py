"""Whether a run compiles the pieces of model/fusion.py, and when that is done.

The choice depends on the plan alone, and a run that goes on does as it did before: compiled sums round differently in
their last bits, and a resumed run must come to the same adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steps.engine.data.batches import MicroBatch
from steps.engine.model import fusion
from steps.engine.progress import Progress
from steps.engine.train.loss import batch_loss
from steps.engine.train.trained import Trained
from steps.errors import ConfigError, Problem

#: Work of one process, in floating-point operations, from which compiling pays. It takes 10 to 30 s and saves 5 to 10 %
#: of a step on a CPU: five to ten minutes of one core's 100 to 200 GFLOP/s. Not on a GPU: with 4,096 to 8,192 tokens at
#: a time an H200 waits for the host to launch its kernels, and what a compiled piece checks before it runs made steps
#: of a 1.2B and a 135M model 6 and 16 % longer.
_PAYS = {"cpu": 5e13}


def pays(parameters: int, tokens: int, device: torch.device) -> bool:
    """Whether a run of one process over so many tokens is long enough: 4 operations a token for each parameter of the
    frozen base, forward and for the gradient of its input."""
    return 4.0 * parameters * tokens >= _PAYS.get(device.type, float("inf"))


@contextmanager
def compiled(setting: str, *, by_itself: bool, device: torch.device, progress: Progress) -> Iterator[None]:
    """A run with the pieces compiled, or not.

    setting:   train.compile.
    by_itself: what auto comes to.
    Raises ConfigError where `always` cannot be had.
    """
    wanted = setting == "always" or (setting == "auto" and by_itself)
    if wanted and (fault := fusion.start(device)):
        if setting == "always":
            hint = "Install a C++ compiler (g++) and Python's headers, or leave it at auto."
            raise ConfigError(Problem("train.compile", f"always: torch.compile fails here: {fault}", hint=hint))
        progress.log(f"train.compile=auto: not compiled, since torch.compile fails here: {fault}")
    try:
        yield
    finally:
        fusion.stop()


def warm_up(trained: Trained, batch: MicroBatch, progress: Progress) -> None:
    """Compile now what the steps will call, and say what it took. Leaves gradients behind, which a step clears."""
    if not fusion.active():
        return
    trained.decoder.train()
    loss = batch_loss(trained.decoder, batch)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    pieces, seconds = fusion.spent()
    progress.log(f"torch.compile: {pieces} pieces in {seconds:.1f} s")
