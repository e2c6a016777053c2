"""Around the imports of NeMo-Run: nothing on the screen, and no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator

from steps.errors import ExecutorError


def must_be_installed() -> None:
    """Raises ExecutorError where there is no NeMo-Run. Imports nothing."""
    if importlib.util.find_spec("nemo_run") is None:
        hint = "pip install 'peft-steps[cluster]'"
        raise ExecutorError("NeMo-Run, which submits jobs to clusters, is not installed", hint=hint)


@contextlib.contextmanager
def nemo_run() -> Iterator[None]:
    """Import NeMo-Run's modules in this block. Raises ExecutorError when that cannot be done.

    It would import torch for one YAML representer of its own, half of the 3.5 seconds that a submission takes. It does
    without where there is none, so there is none for it.
    """
    quiet = io.StringIO()
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say: not here
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        hint = "pip install 'peft-steps[cluster]' brings versions that fit together."
        raise ExecutorError(f"NeMo-Run cannot be imported: {error}", hint=hint) from error
    finally:
        if hidden:
            del sys.modules["torch"]
