"""Everything that is checked before a step starts: by a dry run, by `steps run`, and once more inside the job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steps.artifacts.opening import Artifact, open_artifact
from steps.artifacts.record import check_replaceable
from steps.config.base import StepConfig, lookup
from steps.config.validate import source_of
from steps.errors import ArtifactError, Problem, refusal
from steps.manifest import Manifest, Port

__all__ = ["Findings", "check", "lookup"]


@dataclass(frozen=True)
class Findings:
    """What the checks found: the opened inputs by config key, what refuses the run, what is only worth saying.

    missing: required inputs that are not there at all; `--upstream` can make those.
    """

    inputs: Mapping[str, Artifact]
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    missing: tuple[Port, ...] = ()

    def raise_if_any(self) -> None:
        """Raise every problem: ConfigError where the inputs are right and only the settings are not, else
        ArtifactError."""
        if self.problems:
            raise refusal(self.problems)


def _destination(port: Port, value: Any, inputs: Mapping[str, Artifact]) -> Iterator[Problem]:
    """Why the artifact of `port` cannot be written where `value` says."""
    if value is None:
        return
    try:
        path = Path(str(value)).expanduser()
        check_replaceable(path, port.type)
    except ArtifactError as error:
        yield from (replace(problem, where=port.key) for problem in error.problems)
        return
    except (OSError, RuntimeError) as error:  # a name that is too long, a ~user that does not exist
        yield _unusable(port.key, value, error)
        return
    for key, item in inputs.items():
        if item.path and item.path.resolve() in (path.resolve(), *path.resolve().parents):
            what = f"{value} lies in the input {item.value} ({key}), which writing there would change"
            yield Problem(where=port.key, what=what, hint="Write beside it.")
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not above.is_dir():
        yield Problem(where=port.key, what=f"{value} cannot be made: {above} is no directory")
    elif not os.access(above, os.W_OK):
        yield Problem(where=port.key, what=f"{value} cannot be written: {above} is read-only for you")


def _unusable(key: str, value: Any, error: Exception) -> Problem:
    reason = getattr(error, "strerror", None) or str(error)
    return Problem(where=key, what=f"{value} cannot be used: {reason.lower()}")


def check(manifest: Manifest, config: StepConfig, sources: Mapping[str, str] | None = None) -> Findings:
    """Open every artifact the manifest says the step consumes and hold them against the configuration."""
    inputs: dict[str, Artifact] = {}
    problems: list[Problem] = []
    missing: list[Port] = []
    for port in manifest.consumes:
        value = lookup(config, port.key)
        if value is None:
            if port.required:
                what = f"no {port.type} is given"
                problems.append(Problem(where=port.key, what=what, name=f"missing_{port.type}"))
                missing.append(port)
            continue
        try:
            inputs[port.key] = open_artifact(str(value), port.type, port.key)
        except (OSError, RuntimeError) as error:
            problems.append(_unusable(port.key, value, error))
        except ArtifactError as error:
            problems += error.problems
            if error.name == f"missing_{port.type}":
                missing.append(port)
    if not problems:
        problems += config.check_inputs(inputs)
    for port in manifest.produces:
        problems += _destination(port, lookup(config, port.key), inputs)
    warnings = tuple(warning for artifact in inputs.values() for warning in artifact.warnings)
    located = (
        replace(problem, source=problem.source or source_of(problem.where, sources or {})) for problem in problems
    )
    return Findings(inputs, tuple(dict.fromkeys(located)), warnings, tuple(missing))
