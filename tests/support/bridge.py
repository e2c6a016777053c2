"""Where genuine Megatron-Bridge is: this interpreter, or the one that STEPS_BRIDGE_PYTHON names."""

from __future__ import annotations

import importlib.util
import os
import sys


def _interpreter() -> str | None:
    try:
        here = importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:
        here = False
    return sys.executable if here else os.environ.get("STEPS_BRIDGE_PYTHON") or None


#: It wants other versions of some packages than the rest of the tests; CONTRIBUTING.md tells how to make it.
PYTHON = _interpreter()
