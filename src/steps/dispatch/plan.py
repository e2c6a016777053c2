"""From a command line to jobs that may run: composed, validated, inputs checked, missing inputs planned for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps import preflight
from steps.artifacts import graph
from steps.config.base import StepConfig
from steps.config.validate import validate
from steps.dispatch import catalog, executors, profiles
from steps.dispatch.compose import Composed, compose, leaves
from steps.dispatch.job import JobSpec, is_secret, is_secret_key, new_spec
from steps.errors import ArtifactError, ConfigError, Problem, StepsError, UsageError, suggest
from steps.manifest import Manifest, Port


@dataclass
class Planned:
    """One step, ready to run as far as can be known now.

    waits_for: config key -> id of the planned step that will make this input.
    """

    step: Manifest
    config_name: str
    composed: Composed
    config: StepConfig
    findings: preflight.Findings
    problems: list[Problem]
    notes: list[str]
    spec: JobSpec
    waits_for: dict[str, str] = field(default_factory=dict)


def prepare(
    step: Manifest,
    config_name: str,
    overrides: Sequence[str] = (),
    *,
    profile: str | None = None,
    passthrough: tuple[str, ...] = (),
    debug: bool = False,
) -> Planned:
    """Compose, validate and check one step.

    Raises UsageError, ConfigError or ExecutorError for what makes the configuration itself wrong; what is wrong with
    its inputs or with running it here is in `problems`.
    """
    if passthrough and not step.run.passthrough:
        raise UsageError(f"{step.id} takes no arguments behind --, got {' '.join(passthrough)!r}")
    chosen = profiles.load(profile)
    executor = executors.get(chosen.executor)
    environment = {**chosen.env, "_source": f"profile {chosen.name}"} if chosen.env else None
    composed = compose(step, config_name, overrides, environment)
    config, notes = typed(step, composed)
    findings = preflight.check(step, config, composed.sources)
    spec = new_spec(
        step, composed.data, config.run.env, sources=composed.sources, config_name=config_name, profile=chosen.name,
        executor=chosen.executor, torchrun=config.wants_torchrun(), passthrough=passthrough, debug=debug,
    )  # fmt: skip
    problems = [*findings.problems, *executor.check(config)]
    if step.run.launch != "torchrun" and (config.run.env.nprocs_per_node or 1) > 1:
        notes.append(f"run.env.nprocs_per_node: {step.id} always runs as one process")
    empty = [name for name in config.run.env.env_vars if is_secret(name) and not config.run.env.env_vars[name]]
    notes += [f"run.env.env_vars.{name} is empty: what this shell holds under that name stays" for name in empty]
    return Planned(step, config_name, composed, config, findings, problems, notes, spec)


def typed(step: Manifest, composed: Composed) -> tuple[StepConfig, list[str]]:
    """The typed configuration; the manifest's choices are enforced with the schema's rules, all faults together."""
    cls: type[StepConfig] = importlib.import_module(step.schema_module).Config
    problems: list[Problem] = []
    result: tuple[StepConfig, list[str]] | None = None
    try:
        result = validate(cls, composed.data, composed.sources)
    except ConfigError as error:
        problems += error.problems
    reported = {problem.where for problem in problems}
    for parameter in step.parameters:
        value = preflight.lookup(composed.data, parameter.name)
        if (
            parameter.choices
            and value is not None
            and value not in parameter.choices
            and parameter.name not in reported
        ):
            choices = [str(choice) for choice in parameter.choices]
            what, source = f"{value!r} is not one of the choices", composed.sources.get(parameter.name, "")
            hint = suggest(str(value), choices)
            problems.append(Problem(parameter.name, what, source=source, allowed=", ".join(choices), hint=hint))
    problems += _secrets(composed)
    if problems:
        raise ConfigError(problems)
    assert result is not None
    return result


def _secrets(composed: Composed) -> Iterator[Problem]:
    """Secrets outside of run.env.env_vars: what a step reads from its configuration is on disk for everybody."""
    for path, value in leaves(composed.data):
        key = ".".join(map(str, path))
        if isinstance(value, str) and value and is_secret_key(str(path[-1])) and path[:3] != ("run", "env", "env_vars"):
            what = "looks like a secret, and the configuration is written to the job's directory"
            hint = "Give it as run.env.env_vars.NAME, which is passed on in memory."
            yield Problem(key, what, source=composed.sources.get(key, ""), hint=hint)


def chain(target: Planned) -> list[Planned]:
    """The steps that make what `target` lacks, in the order to run them, and `target` last.

    Each runs with the same config name. Raises ArtifactError for what no step makes at the path that is asked for.
    """
    planned: dict[str, Planned] = {}
    _plan(target, planned, ())
    return list(planned.values())


def _plan(wanting: Planned, planned: dict[str, Planned], above: tuple[str, ...]) -> None:
    if wanting.step.id in planned:
        return
    if wanting.step.id in above:
        raise ArtifactError(f"the steps need each other in a circle: {' -> '.join((*above, wanting.step.id))}")
    for port in (*wanting.findings.missing, *_unfinished(wanting)):
        maker = _maker(port, wanting)
        wanting.waits_for[port.key] = maker.step.id
        _plan(maker, planned, (*above, wanting.step.id))
    # The rest of what is wrong stays wrong; what is only missing so far is being made.
    made = {f"missing_{port.type}" for port in wanting.findings.missing}
    wanting.problems = [
        problem for problem in wanting.problems if not (problem.where in wanting.waits_for and problem.name in made)
    ]
    planned[wanting.step.id] = wanting


def _unfinished(wanting: Planned) -> list[Port]:
    """Inputs that are there but whose run was stopped: running their step again takes it up where it was."""
    found = wanting.findings.inputs
    return [
        port for port in wanting.step.consumes if port.key in found and found[port.key].facts.get("finished") is False
    ]


def _maker(port: Port, wanting: Planned) -> Planned:
    """The step that, with the same config name, writes the artifact that `port` misses."""
    value = preflight.lookup(wanting.config, port.key)
    elsewhere = []
    for step in catalog.select(produces=port.type):
        if wanting.config_name not in catalog.configs(step):
            continue
        try:
            candidate = prepare(step, wanting.config_name, profile=wanting.spec.profile)
        except StepsError as error:
            elsewhere.append(f"{step.id} -c {wanting.config_name} cannot be composed ({error})")
            continue
        for output in step.produces:
            if graph.is_a(output.type, port.type):
                place = preflight.lookup(candidate.config, output.key)
                if value is not None and place is not None and _same(str(place), str(value)):
                    return candidate
                elsewhere.append(f"{step.id} -c {wanting.config_name} writes {place}")
    what = f"no step makes a {port.type} at {value} with the config {wanting.config_name!r}"
    raise ArtifactError(Problem(where=port.key, what=what, hint="; ".join(elsewhere), name=f"missing_{port.type}"))


def _same(left: str, right: str) -> bool:
    def full(path: str) -> str:
        return os.path.normpath(Path(path).expanduser().absolute())

    return full(left) == full(right)


def refuse(planned: Sequence[Planned]) -> None:
    """Raise everything that refuses the run, together."""
    problems: list[Any] = [problem for entry in planned for problem in entry.problems]
    if problems:
        artifacts = {problem for entry in planned for problem in entry.findings.problems}
        kind = ArtifactError if any(problem in artifacts for problem in problems) else ConfigError
        raise kind(problems)
