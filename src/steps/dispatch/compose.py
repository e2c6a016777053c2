"""YAML, inheritance, profile and dotlist into one resolved configuration that knows where each value came from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.config import dotlist, yaml12
from steps.config.secrets import is_secret
from steps.config.validate import source_of
from steps.dispatch import catalog
from steps.dispatch.interpolation import copied, dotted, leaves, resolve, resolved
from steps.errors import ConfigError, ExecutorError, Problem
from steps.manifest import Manifest

if TYPE_CHECKING:
    from steps.config.base import Adopted

DEFAULTS = "defaults"


@dataclass
class Composed:
    """A configuration as plain data.

    sources:          dotted key of each value -> "tiny.yaml:7" or "command line"; a stronger layer's keys come later.
    from_environment: names in run.env.env_vars whose value was handed on from this process's environment.
    exposed:          dotted key outside of them -> the secret variable that stands in its value.
    adopted:          what the step read in another program's words; None before it was asked.
    """

    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    from_environment: frozenset[str] = frozenset()
    exposed: Mapping[str, str] = field(default_factory=dict)
    adopted: Adopted | None = None

    @property
    def told(self) -> Adopted:
        """The configuration as it is, with what the step said when it was asked."""
        from steps.config.base import Adopted

        return self.adopted or Adopted(self.data, self.sources)


def compose(
    step: Manifest,
    config: str,
    overrides: Iterable[str] = (),
    environment: Composed | None = None,
    adopt: Callable[[Mapping[str, Any], Mapping[str, str]], Adopted] | None = None,
) -> Composed:
    """The resolved configuration of a step.

    config:      what `-c` names.
    environment: what a profile lays under `run.env`.
    adopt:       the step's `Config.adopt`.
    Raises ConfigError (or UsageError for a malformed override) with everything that is wrong, ExecutorError with every
    value of `run.env` that is still to be filled in.
    """
    parsed = dotlist.parse(overrides)
    composed = _read(catalog.config_path(step, config), step, ())
    if environment:
        _merge(composed, environment.data, lambda key: environment.sources.get(key, ""))
    dotlist.apply(composed.data, composed.sources, parsed)
    if blanks := list(unfilled(composed)):
        raise ExecutorError(blanks)
    unresolved = _settle(composed)
    if adopt is not None:
        unresolved = _adopt(composed, adopt, unresolved)
    if unresolved:
        raise ConfigError(unresolved)
    return composed


def _adopt(
    composed: Composed, adopt: Callable[[Mapping[str, Any], Mapping[str, str]], Adopted], unresolved: list[Problem]
) -> list[Problem]:
    """Let the step read foreign sections, in place. Returns the problems that are left where something is read."""
    adopted = composed.adopted = adopt(composed.data, composed.sources)
    composed.data, composed.sources = dict(adopted.data), dict(adopted.sources)

    def read(key: str) -> bool:
        return not any(key == unread or key.startswith(f"{unread}.") for unread in adopted.unread)

    composed.exposed = {key: name for key, name in composed.exposed.items() if read(key)}
    return [problem for problem in unresolved if read(problem.where)]


#: A value that somebody still has to fill in, as the starters of `steps profiles init` write them.
_TO_FILL_IN = re.compile(r"<[^<>]+>")


def is_unfilled(value: Any) -> bool:
    """Whether a value of `run.env` is a placeholder."""
    return isinstance(value, str) and _TO_FILL_IN.fullmatch(value) is not None


def unfilled(composed: Composed) -> Iterator[Problem]:
    """Placeholders left in `run.env`. A variable of the job may hold anything, "<s>" too."""
    run = composed.data.get("run")
    for path, value in leaves(run.get("env") if isinstance(run, dict) else None):
        if is_unfilled(value) and path[:1] != ("env_vars",):
            key = dotted(("run", "env", *path))
            yield Problem(key, f"{value} is still to be filled in", source=source_of(key, composed.sources))


# A variable that is handed on as it is (`${oc.env:NAME}`, with or without a default) may hold anything; one that is put
# together here (/scratch/${oc.env:USER}/out) is no secret, unless a part says so (postgres://u:${oc.env:DB_PASSWORD}@h).
_IS_PASSED_ON = re.compile(r"\$\{oc\.env:[^{}]*(\$\{[^{}]*\}[^{}]*)*\}")
_NAMED = re.compile(r"\$\{(?:oc\.env:|run\.env\.env_vars\.)(\w+)")


def settle(composed: Composed) -> None:
    """Resolve `${…}` everywhere, in place, the job's own variables first. Raises ConfigError with every one that does
    not resolve."""
    if problems := _settle(composed):
        raise ConfigError(problems)


def _settle(composed: Composed) -> list[Problem]:
    variables = _job_variables(composed)
    composed.from_environment = frozenset(name for name, text in variables.items() if _may_be_secret(str(text)))
    composed.exposed = dict(_exposed(composed.data, variables))
    with _as_environment(_resolve_variables(composed, variables)):
        composed.data, problems = resolved(composed.data, composed.sources)
    return problems


def _may_be_secret(text: str) -> bool:
    """Whether a variable's value, as it is written, will hold what this process's environment keeps to itself."""
    parts = _NAMED.findall(text)
    if _IS_PASSED_ON.fullmatch(text) and any(name in os.environ for name in parts):  # otherwise it is a default's text
        return True
    return any(map(is_secret, parts))


#: Keys of run.env that hold no secret, whatever the variable is called: the job's variables, which are passed on in
#: memory, names of secrets, the path of a key.
_HARMLESS = {("run", "env", name) for name in ("env_vars", "secret_vars", "identity")}


def _exposed(data: Any, variables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys whose value, as it is written, takes a secret variable, and the variable; unset ones expose nothing."""
    for path, text in leaves(data):
        if not isinstance(text, str) or "${" not in text or path[:3] in _HARMLESS:
            continue
        for name in _NAMED.findall(text):
            if is_secret(name) and (os.environ.get(name) or variables.get(name)):
                yield dotted(path), name


def exposed_problems(composed: Composed) -> Iterator[Problem]:
    """Each of those keys, and how to hand the secret on instead."""
    for key, name in composed.exposed.items():
        what = f"holds a secret ({name}), and the configuration is written to the job's directory"
        hint = f'Pass it as run.env.env_vars.{name}, and use "${name}" in a command.'
        yield Problem(key, what, source=source_of(key, composed.sources), hint=hint)


def _job_variables(composed: Composed) -> dict[str, Any]:
    """run.env.env_vars as written, where it is a mapping."""
    value: Any = composed.data
    for part in ("run", "env", "env_vars"):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _resolve_variables(composed: Composed, variables: dict[str, Any]) -> dict[str, str]:
    """Resolve the job's own variables in place, so that `${oc.env:…}` elsewhere means what it will mean in the job.

    One that takes its value from another section is left to the main pass.
    """
    for name in variables:
        with suppress(ConfigError):
            alone = {"run": {"env": {"env_vars": {name: variables[name]}}}}
            variables[name] = resolve(alone, composed.sources)["run"]["env"]["env_vars"][name]
    plain = {name: value for name, value in variables.items() if isinstance(value, str | int | float) and value != ""}
    return {name: str(value) for name, value in plain.items() if "${" not in str(value)}


@contextmanager
def _as_environment(variables: Mapping[str, str]) -> Iterator[None]:
    known = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in known.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _read(path: Path, step: Manifest, seen: tuple[Path, ...]) -> Composed:
    """One file on top of what it inherits from."""
    if path.resolve() in seen:
        chain = " -> ".join(entry.name for entry in (*seen, path.resolve()))
        raise ConfigError(Problem(where=str(path), what=f"`defaults` goes round in a circle: {chain}"))
    data, lines = yaml12.load(path)
    parents = data.pop(DEFAULTS, [])
    parents = [parents] if isinstance(parents, str) else parents
    where = f"{path.name}:{lines.get(DEFAULTS, 1)}"
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(Problem(where=where, what="`defaults` is a name or a list of names"))
    if "_self_" in parents[:-1]:
        raise ConfigError(
            Problem(where=where, what="`_self_` can only come last: a file always wins over what it inherits")
        )
    # Of two files with one name, an overlay and what it inherits from, the lower one is told with its folder.
    label = f"{path.parent.name}/{path.name}" if any(path.name == above.name for above in seen) else path.name
    composed = Composed()
    for parent in parents:
        if parent != "_self_":
            inherited = _read(_parent(parent, path, step, where), step, (*seen, path.resolve()))
            _merge(composed, inherited.data, lambda key, above=inherited.sources: above.get(key, ""))
    _merge(composed, data, lambda key: f"{label}:{lines[key]}" if key in lines else label)
    return composed


def _parent(name: str, path: Path, step: Manifest, where: str) -> Path:
    """The file that a `defaults` entry of `path` means: beside it, or shipped with the step."""
    for candidate in (path.parent / name, path.parent / f"{name}.yaml"):
        if candidate.is_file() and candidate.resolve() != path.resolve():
            return candidate
    shipped = catalog.configs(step)
    if name in shipped and shipped[name].resolve() != path.resolve():
        return shipped[name]
    what = f"`defaults` names {name!r}, which is neither a file beside {path.name} nor a config of {step.id}"
    raise ConfigError(Problem(where=where, what=what, allowed=", ".join(shipped)))


def _merge(composed: Composed, data: Mapping[str, Any], source: Any) -> None:
    """Lay `data` over what is composed: mappings merge, everything else replaces."""

    def lay(target: dict[str, Any], layer: Mapping[str, Any], prefix: str) -> None:
        for name, value in layer.items():
            key = f"{prefix}{name}"
            if isinstance(value, Mapping) and isinstance(target.get(name), dict):
                lay(target[name], value, f"{key}.")
                continue
            for known in [entry for entry in composed.sources if entry == key or entry.startswith(f"{key}.")]:
                del composed.sources[known]
            target[name] = copied(value)
            for path, _ in leaves(value, empty=True):
                leaf = dotted((key, *path))
                composed.sources[leaf] = source(leaf) or source(key)
            composed.sources.setdefault(key, source(key))

    lay(composed.data, data, "")
