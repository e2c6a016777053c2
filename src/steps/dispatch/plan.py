"""From a command line to jobs that may run: composed, validated, inputs checked, missing inputs planned for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steps import preflight
from steps.artifacts import graph
from steps.artifacts.opening import NAMED_TYPES
from steps.config.base import RunEnv, StepConfig
from steps.config.validate import as_written, check_section, validate, validate_adopted
from steps.dispatch import catalog, executors, places, profiles
from steps.dispatch.compose import Composed, compose, exposed_problems
from steps.dispatch.executors.base import Executor
from steps.dispatch.interpolation import leaves
from steps.dispatch.job import JobSpec, is_secret, is_secret_key, new_spec
from steps.dispatch.jobs import order
from steps.errors import ArtifactError, ConfigError, ExecutorError, Problem, StepsError, UsageError, refusal, suggest
from steps.manifest import Manifest, Port

_TOKEN_LENGTH = 8
_RUN_ENV = re.compile(r"[+~]?run\.env\b")


@dataclass(frozen=True)
class Place:
    """Where jobs shall run. profile: its name, None for this machine. after: ids of jobs to wait for."""

    profile: str | None = None
    env_file: str | None = None
    attached: bool = True
    after: tuple[str, ...] = ()
    force_squash: bool = False


@dataclass
class Planned:
    """One step, ready to run as far as can be known now.

    waits_for: config key -> id of the planned step, or of the job, that will make this input.
    looked:    whether the inputs could be looked at from here.
    overrides: of the command line, for this step.
    """

    step: Manifest
    config_name: str
    composed: Composed
    config: StepConfig
    findings: preflight.Findings
    problems: list[Problem]
    notes: list[str]
    spec: JobSpec
    place: Place
    looked: bool = True
    overrides: Sequence[str] = ()
    waits_for: dict[str, str] = field(default_factory=dict)


def prepare(
    step: Manifest,
    config_name: str,
    overrides: Sequence[str] = (),
    *,
    place: Place = Place(),
    passthrough: tuple[str, ...] = (),
    debug: bool = False,
) -> Planned:
    """Compose, validate and check one step.

    Raises UsageError, ConfigError or ExecutorError for what makes the configuration itself wrong; what is wrong with
    its inputs or with running it there is in `problems`.
    """
    if passthrough and not step.run.passthrough:
        raise UsageError(f"{step.id} takes no arguments behind --, got {' '.join(passthrough)!r}")
    chosen = profiles.load(place.profile, place.env_file)
    composed = compose(step, config_name, overrides, chosen.environment, _schema(step).adopt)
    planned = plan(step, config_name, composed, place, profile=chosen.name, passthrough=passthrough, debug=debug)
    planned.overrides = tuple(overrides)
    return planned


def plan(
    step: Manifest,
    config_name: str,
    composed: Composed,
    place: Place,
    *,
    profile: str,
    passthrough: tuple[str, ...] = (),
    debug: bool = False,
) -> Planned:
    """The same from a configuration that is composed already. Raises ConfigError or ExecutorError."""
    executor = executors.get(_executor_name(composed))
    if place.force_squash and not executor.imports_images:
        raise UsageError(
            "--force-squash re-imports a container image on a cluster; this runs without one",
            hint="Drop it, or choose a Slurm profile with -r or -b.",
        )
    if place.after and not executor.has_order:
        raise UsageError(
            f"jobs of the executor {_executor_name(composed)} cannot wait for others", hint="Drop --after."
        )
    config, env, notes = typed(step, composed, executor)
    sees = executor.sees_this_machine(env)
    if (workspace := executor.workspace(env)) is not None:
        ports = [*step.produces, *(port for port in step.consumes if port.type not in NAMED_TYPES)]
        names = [port.key for port in step.consumes if port.type in NAMED_TYPES]
        paths, names = [*(port.key for port in ports), *config.path_keys()], [*names, *config.name_keys()]
        composed = replace(composed, data=places.absolute(composed.data, paths, names, workspace, visible=sees))
        config, _ = validate(type(config), composed.data, composed.sources)
    findings = preflight.check(step, config, composed.sources) if sees else preflight.Findings({})
    findings = replace(findings, problems=tuple(as_written(composed.told, findings.problems)))
    spec = new_spec(
        step, composed.data, env, sources=composed.sources, config_name=config_name, profile=profile,
        torchrun=config.wants_torchrun(), secret_names=composed.from_environment, passthrough=passthrough,
        after=place.after, attached=place.attached, force_squash=place.force_squash, debug=debug,
    )  # fmt: skip
    problems = [*findings.problems, *executor.check(config, env)]
    if step.run.launch != "torchrun" and env.processes > 1 and env.nprocs_per_node:
        notes.append(f"run.env.nprocs_per_node: {step.id} always runs as one process")
    if step.run.launch != "torchrun" and (env.nodes or 1) > 1:
        notes.append(f"run.env.nodes: {step.id} runs on one node")
    empty = [name for name in env.env_vars if is_secret(name) and not env.env_vars[name]]
    notes += [f"run.env.env_vars.{name} is empty: what the job's machine holds under that name stays" for name in empty]
    result = Planned(step, config_name, composed, config, findings, problems, notes, spec, place, looked=sees)
    if place.after:
        _expect(result)
    return result


def _expect(wanting: Planned) -> None:
    """Inputs that the jobs waited for will have made are not missing."""
    promised = order.promised(wanting.place.after)
    for port in wanting.findings.missing:
        value = preflight.lookup(wanting.config, port.key)
        if value is not None and (maker := promised.get(order.full_path(str(value)))):
            wanting.waits_for[port.key] = maker
    _excuse(wanting)


def _excuse(wanting: Planned) -> None:
    """What is only missing so far is being made; the rest of what is wrong stays wrong."""
    made = {f"missing_{port.type}" for port in wanting.findings.missing}
    wanting.problems = [
        problem for problem in wanting.problems if not (problem.where in wanting.waits_for and problem.name in made)
    ]


def _executor_name(composed: Composed) -> str:
    name = preflight.lookup(composed.data, "run.env.executor")
    return name if isinstance(name, str) else "local"


def typed(step: Manifest, composed: Composed, executor: Executor) -> tuple[StepConfig, RunEnv, list[str]]:
    """The typed configuration, and its run.env as the executor types it; the manifest's choices are enforced with the
    schema's rules, all faults together."""
    problems: list[Problem] = []
    result: tuple[StepConfig, list[str]] | None = None
    try:
        result = validate_adopted(_schema(step), composed.told)
    except ConfigError as error:
        problems += error.problems
    given = preflight.lookup(composed.data, "run.env")
    env, wrong = check_section(executor.env, given or {}, composed.sources, "run.env")
    problems += [problem for problem in wrong if problem.where not in {known.where for known in problems}]
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
    # What is wrong with a secret's value would quote it.
    problems = [*(problem for problem in problems if problem.where not in composed.exposed), *_secrets(composed)]
    if problems:
        raise ConfigError(problems)
    assert result is not None
    assert env is not None
    return result[0], env, result[1]


def _schema(step: Manifest) -> type[StepConfig]:
    config: type[StepConfig] = importlib.import_module(step.schema_module).Config
    return config


def _secrets(composed: Composed) -> Iterator[Problem]:
    """Secrets outside of run.env.env_vars: what a step reads from its configuration is on disk for everybody."""
    yield from exposed_problems(composed)
    variables = preflight.lookup(composed.data, "run.env.env_vars")
    hidden = {str(value) for name, value in variables.items() if is_secret(name)} if isinstance(variables, dict) else ()
    for path, value in leaves(composed.data):
        if not isinstance(value, str) or not value or path[:3] == ("run", "env", "env_vars"):
            continue
        key = ".".join(map(str, path))
        if key in composed.exposed:
            continue
        # A short value could be anything; a token never is.
        inside = any(len(secret) >= _TOKEN_LENGTH and secret in value for secret in hidden)
        if inside or (is_secret_key(str(path[-1])) and path[:3] != ("run", "env", "secret_vars")):
            what = "holds a secret of run.env.env_vars" if inside else "looks like a secret"
            what += ", and the configuration is written to the job's directory"
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
    for port, is_missing in _wanted(wanting):
        if port.key in wanting.waits_for:
            continue
        try:
            maker = _maker(port, wanting)
        except ArtifactError:
            if is_missing:
                raise
            continue  # nobody here makes it, and it may well be there
        wanting.waits_for[port.key] = maker.step.id
        _plan(maker, planned, (*above, wanting.step.id))
    _excuse(wanting)
    planned[wanting.step.id] = wanting


def _wanted(wanting: Planned) -> list[tuple[Port, bool]]:
    """Inputs that a step shall make, and whether it is known that they are missing.

    On a machine that cannot be seen from here, every input may be: its step runs, and leaves alone what is there.
    """
    if wanting.looked:
        return [(port, True) for port in (*wanting.findings.missing, *_unfinished(wanting))]
    return [(port, False) for port in wanting.step.consumes if preflight.lookup(wanting.config, port.key) is not None]


def _unfinished(wanting: Planned) -> list[Port]:
    """Inputs that are there but whose run was stopped: running their step again takes it up where it was."""
    found = wanting.findings.inputs
    return [
        port for port in wanting.step.consumes if port.key in found and found[port.key].facts.get("finished") is False
    ]


def _maker(port: Port, wanting: Planned) -> Planned:
    """The step that, with the same config name, writes the artifact that `port` misses."""
    value = preflight.lookup(wanting.config, port.key)
    # Where and how to run is said for the whole chain, what to compute only for its last step.
    where = [text for text in wanting.overrides if _RUN_ENV.match(text)]
    elsewhere = []
    for step in catalog.select(produces=port.type):
        if wanting.config_name not in catalog.configs(step):
            continue
        try:
            candidate = prepare(step, wanting.config_name, where, place=wanting.place)
        except StepsError as error:
            elsewhere.append(f"{step.id} -c {wanting.config_name} cannot be composed ({error})")
            continue
        for output in step.produces:
            if graph.is_a(output.type, port.type):
                made = preflight.lookup(candidate.config, output.key)
                # A part of what is made will do too: the test split of tweets, one iteration of a checkpoint.
                if value is not None and made is not None and _holds(str(made), str(value)):
                    return candidate
                elsewhere.append(f"{step.id} -c {wanting.config_name} writes {made}")
    what = f"{wanting.step.id} wants a {port.type} at {value}, and no step makes one there with the config"
    hint = "; ".join([*elsewhere, "put your own there, or name it on the command line"])
    problem = Problem(port.key, f"{what} {wanting.config_name!r}", hint=hint, name=f"missing_{port.type}")
    raise ArtifactError(problem)


def _holds(made: str, wanted: str) -> bool:
    """Whether one path is the other or lies above it."""
    whole, part = Path(order.full_path(made)), Path(order.full_path(wanted))
    return part == whole or whole in part.parents


def refuse(planned: Sequence[Planned]) -> None:
    """Raise everything that refuses the run, together."""
    problems: list[Any] = [problem for entry in planned for problem in entry.problems]
    if problems:
        artifacts = {problem for entry in planned for problem in entry.findings.problems}
        if any(problem in artifacts for problem in problems):
            raise refusal(problems)
        elsewhere = any(entry.spec.executor != "local" for entry in planned)
        raise (ExecutorError if elsewhere else ConfigError)(problems)
