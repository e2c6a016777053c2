"""Where jobs run. One module or package each, found by its name: it holds `EXECUTOR`, an object as `base.Executor`
describes."""

from __future__ import annotations

import importlib
import pkgutil

from steps.dispatch.executors.base import Executor
from steps.errors import ExecutorError, suggest


def names() -> list[str]:
    """The executors there are."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]


def get(name: str) -> Executor:
    """The executor of that name."""
    if name not in names():
        raise ExecutorError(
            f"there is no executor {name!r}", hint=suggest(name, names()) or f"Executors: {', '.join(names())}"
        )
    executor: Executor = importlib.import_module(f"{__name__}.{name}").EXECUTOR
    return executor
