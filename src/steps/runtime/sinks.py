"""TensorBoard and Weights & Biases: imported when asked for, and named when they are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from steps.errors import ConfigError, Problem


class _TensorBoard:
    def __init__(self, directory: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("logger.tensorboard_dir", "tensorboard") from error
        self._writer = SummaryWriter(directory)

    def write(self, values: Mapping[str, float]) -> None:
        step = int(values["iteration"])
        for key, value in values.items():
            if key != "iteration":
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, name: str | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("logger.wandb_project", "wandb") from error
        self._run = wandb.init(project=project, name=name)

    def write(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=int(values["iteration"]))

    def close(self) -> None:
        self._run.finish()


def sinks(logger: Any) -> Iterator[Any]:
    """The sinks that a `logger` section asks for; none for a step without one."""
    if getattr(logger, "tensorboard_dir", None):
        yield _TensorBoard(logger.tensorboard_dir)
    if getattr(logger, "wandb_project", None):
        yield _WandB(logger.wandb_project, logger.wandb_exp_name)


def _missing(key: str, package: str) -> ConfigError:
    return ConfigError(
        Problem(where=key, what=f"the package {package} is not installed", hint=f"pip install {package}")
    )
