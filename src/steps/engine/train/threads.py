"""How OpenMP's threads wait. Free of torch, because it must be decided before torch loads OpenMP."""

from __future__ import annotations

import os


def share_cores() -> None:
    """Let waiting threads sleep instead of spin, unless the user decided otherwise.

    A spinning thread takes the core from the thread it waits for as soon as anything else runs on the machine: beside
    one other process on two cores, training at 170 tokens/s fell to 27. On an idle machine the two are alike.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
