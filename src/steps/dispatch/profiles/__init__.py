"""Env profiles: where a job runs, and what that place needs to know. Tables that extend each other, typed by the
executor they name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steps.dispatch.compose import Composed, is_unfilled
from steps.dispatch.interpolation import leaves
from steps.dispatch.profiles import env_files
from steps.dispatch.profiles.env_files import Table, Tables
from steps.errors import ExecutorError, Problem, suggest

LOCAL = "local"
EXTENDS, EXECUTOR, DESCRIPTION = "extends", "executor", "description"

#: Words of the model project's older files, by executor ('' for all), and ours.
_OTHER_WORDS: Mapping[str, Mapping[str, str]] = {
    "": {"container": "container_image", "nproc_per_node": "nprocs_per_node"},
    "slurm": {"nemo_run_dir": "remote_job_dir"},
}
#: Fields of the model project that have no meaning here, and why.
_WITHOUT_MEANING = {
    "packager": "Drop it: the code travels with every job as it is here, uncommitted changes included.",
    "run_command": "Drop it: a step is started by its own manifest; use startup_commands for what comes before.",
}


@dataclass(frozen=True)
class Profile:
    """One profile: the executor it names and the `run.env` values it brings, `${…}` in them unresolved.

    sources: key of each value, dotted ("env_vars.HF_TOKEN", "mounts.0") -> "env.toml [slurm_base]".
    chain:   the places of the table itself and of everything it extends.
    """

    name: str
    executor: str = LOCAL
    env: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    chain: tuple[str, ...] = ()

    @property
    def environment(self) -> Composed | None:
        """The layer that this profile is under a step's configuration."""
        if not self.env:
            return None
        sources = {f"run.env.{key}": source for key, source in self.sources.items()}
        return Composed({"run": {"env": dict(self.env)}}, sources)


def load(name: str | None, env_file: str | None = None) -> Profile:
    """The profile of that name, its fields checked; without a name, this machine.

    With neither a name nor a file nothing is read, so that no broken env.toml can disturb a run on this machine.
    Raises ExecutorError with everything that is wrong.
    """
    if name is None and env_file is None:
        return Profile(LOCAL)
    profile = assemble(name or LOCAL, env_files.tables(env_file))
    if problems := faults(profile):
        raise ExecutorError(problems)
    return profile


def names(tables: Tables) -> list[str]:
    """The tables that are profiles or mean to be: those that name an executor, or extend something."""
    return [name for name, table in tables.all.items() if EXECUTOR in table.values or EXTENDS in table.values]


def assemble(name: str, tables: Tables) -> Profile:
    """The profile with everything it inherits. Raises ExecutorError where its tables do not fit together.

    Mappings merge, everything else replaces; a list under `KEY+` is appended to the inherited one.
    """
    chain = _chain(name, tables)
    nearest = chain[0]
    executor = next((table.values[EXECUTOR] for table in chain if EXECUTOR in table.values), None)
    if executor is None:
        what = "is no profile: it names no executor" + (", and nothing that it extends does" if len(chain) > 1 else "")
        hint = 'Profiles have executor = "…" or extends = "…"; other tables are left alone.'
        raise ExecutorError(Problem(where=nearest.place, what=what, hint=hint))
    words = {**_OTHER_WORDS[""], **(_OTHER_WORDS.get(executor, {}) if isinstance(executor, str) else {})}
    env: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[Problem] = []
    for table in reversed(chain):
        problems += _lay(env, sources, _fields(table, words), table.place)
    told = [table for table in chain if not isinstance(table.values.get(DESCRIPTION, ""), str)]
    problems += [Problem(DESCRIPTION, "is one line of text", source=table.place) for table in told]
    if problems:
        raise ExecutorError(problems)
    description = nearest.values.get(DESCRIPTION, "")
    return Profile(name, str(executor), env, sources, description, tuple(table.place for table in chain))


def _chain(name: str, tables: Tables) -> list[Table]:
    """The table of that name and what it extends, nearest first."""
    everything = tables.all
    if name not in everything:
        raise ExecutorError(f"there is no profile {name!r}", hint=_meant(name, names(tables)))
    chain = [everything[name]]
    while (parent := chain[-1].values.get(EXTENDS)) is not None:
        place = chain[-1].place
        if not isinstance(parent, str):
            raise ExecutorError(Problem(where=place, what=f"`extends` names one profile, got {parent!r}"))
        if parent not in everything:
            hint = suggest(parent, [known for known in names(tables) if known not in {table.name for table in chain}])
            raise ExecutorError(Problem(where=place, what=f"extends {parent!r}, which is no profile", hint=hint))
        seen = [table.name for table in chain]
        if parent in seen:
            circle = chain[seen.index(parent) :]
            what = f"`extends` goes round in a circle: {' -> '.join([*(table.name for table in circle), parent])}"
            hint = next(
                filter(None, (_hidden(table.name, tables) for table in circle)), "One of them has to stand alone."
            )
            raise ExecutorError(Problem(where=place, what=what, hint=hint))
        chain.append(everything[parent])
    return chain


def _hidden(name: str, tables: Tables) -> str:
    """What to do about an own table that hides the shipped one it was meant to extend."""
    if name not in tables.own or name not in tables.shipped:
        return ""
    above = tables.shipped[name].values.get(EXTENDS)
    way_out = f"rename it, or extend {above}, as the shipped one does" if above else "rename it"
    return f"Your own {name} takes the place of the shipped one, so nothing of yours can extend that: {way_out}."


def _meant(name: str, known: Sequence[str]) -> str:
    """What a person who wrote `name` may have meant: a part of a name, or one with a slip in it."""
    longer = [candidate for candidate in known if name and name in candidate]
    if 0 < len(longer) <= 3:
        return f"Did you mean {' or '.join(longer)}?"
    return suggest(name, known) or f"`steps profiles list` shows the {len(known)} there are."


def _fields(table: Table, words: Mapping[str, str]) -> dict[str, Any]:
    """What a table says about `run.env`, in our words."""

    def ours(key: str) -> str:
        word = words.get(key, key)
        return key if word in table.values else word

    return {ours(key): value for key, value in table.values.items() if key not in (EXTENDS, DESCRIPTION)}


def _lay(
    target: dict[str, Any], sources: dict[str, str], layer: Mapping[str, Any], place: str, prefix: str = ""
) -> Iterator[Problem]:
    """Lay a table over what is inherited; yields what cannot be laid."""
    for written in sorted(layer, key=lambda name: name.endswith("+")):
        value, name = layer[written], written.rstrip("+")
        key = f"{prefix}{name}"
        if written != name:
            inherited = target.get(name, [])
            if isinstance(value, list) and isinstance(inherited, list):
                _note(sources, key, value, place, start=len(inherited))
                target[name] = [*inherited, *value]
            else:
                what = f"appends to a list, but {'it' if not isinstance(value, list) else 'what it inherits'} is none"
                yield Problem(where=f"{prefix}{written}", what=what, source=place)
            continue
        if isinstance(value, Mapping):
            if not isinstance(target.get(name), dict):
                _forget(sources, key)
                target[name] = {}
            if not value:
                sources.setdefault(key, place)
            yield from _lay(target[name], sources, value, place, f"{key}.")
            continue
        _forget(sources, key)
        target[name] = value
        _note(sources, key, value, place)


def _note(sources: dict[str, str], key: str, value: Any, place: str, start: int = 0) -> None:
    """Remember where a value came from, and each leaf of it; `start`: where the items of an appended list begin."""
    known = sources.get(key)
    sources[key] = f"{known} + {place}" if known and start else place
    for path, _ in leaves(value):
        if path:
            first = path[0] + start if isinstance(path[0], int) else path[0]
            sources[".".join(map(str, (key, first, *path[1:])))] = place


def _forget(sources: dict[str, str], key: str) -> None:
    for known in [entry for entry in sources if entry == key or entry.startswith(f"{key}.")]:
        del sources[known]


def faults(profile: Profile) -> list[Problem]:
    """Fields that the executor does not know, and values of the wrong type. What holds `${…}` is typed when it is
    resolved, a placeholder when it is filled in."""
    from steps.config.validate import check_section
    from steps.dispatch import executors

    try:
        executor = executors.get(profile.executor)
    except ExecutorError as error:
        source = profile.sources.get(EXECUTOR, "")
        return [Problem(EXECUTOR, problem.what, source=source, hint=problem.hint) for problem in error.problems]
    _, problems = check_section(executor.env, profile.env, profile.sources, "")
    return list(_explained(problem for problem in problems if not _is_late(profile.env, problem.where)))


def _explained(problems: Iterable[Problem]) -> Iterator[Problem]:
    for problem in problems:
        why = _WITHOUT_MEANING.get(problem.where)
        what = "has no meaning here" if why else problem.what
        yield Problem(problem.where, what, source=problem.source, hint=why) if why else problem


def _is_late(value: Any, key: str) -> bool:
    """Whether the value under a dotted key is, or lies in, text with `${…}`, or is a placeholder."""
    for part in key.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
    return isinstance(value, str) and ("${" in value or is_unfilled(value))
