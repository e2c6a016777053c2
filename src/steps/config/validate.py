"""From a plain mapping to a step's typed Config, with every fault found at once and each traced to its source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from steps.config.base import Adopted, RunEnv, Section, StepConfig
from steps.config.secrets import is_secret, is_secret_key
from steps.errors import ConfigError, Problem, suggest

#: The mapping of a job's environment variables.
VARIABLES = "env_vars"

C = TypeVar("C", bound=StepConfig)
S = TypeVar("S", bound=Section)

_EXPECTED = {
    "int_type": "an integer", "float_type": "a number", "string_type": "text", "bool_type": "true or false",
    "list_type": "a list", "dict_type": "a mapping", "int_from_float": "an integer",
    "model_type": "a section with keys", "model_attributes_type": "a section with keys",
    "finite_number": "a finite number",
    "is_instance_of": "a section with keys", "none_required": "null",
}  # fmt: skip


def validate(cls: type[C], data: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> tuple[C, list[str]]:
    """Build `cls` from `data`.

    sources: where each dotted key came from ("command line", "tiny.yaml:7"), for the messages.
    Returns the config and notes (unknown keys that an engine takes as they are).
    Raises ConfigError with every unknown key, wrong type, value outside its choices and inconsistency.
    """
    sources = sources or {}
    config, problems = _typed(cls, data, sources, "")
    notes: list[str] = []
    for key, name, siblings in unknown_keys(cls, data):
        # A config that is invalid elsewhere cannot be asked; build what can be built, unchecked, to ask it.
        why = (config or cls.model_construct(**data)).accepts_unknown(key)
        if why:
            notes.append(f"{key}: {why}")
        else:
            problems.append(_unknown(key, name, siblings, cls, sources))
    if config is not None:
        problems += [_with_source(problem, sources) for problem in config.check_values()]
    if problems:
        raise ConfigError(problems)
    assert config is not None
    return config, notes


def validate_adopted(cls: type[C], adopted: Adopted) -> tuple[C, list[str]]:
    """The same for a configuration that went through `cls.adopt`; problems are told at the keys that the user wrote."""
    problems = list(adopted.problems)
    try:
        config, notes = validate(cls, adopted.data, adopted.sources)
    except ConfigError as error:
        problems += as_written(adopted, error.problems)
    if problems:
        raise ConfigError(problems)
    return config, [*adopted.notes, *notes]


def check_section(
    cls: type[S], data: Mapping[str, Any], sources: Mapping[str, str], prefix: str
) -> tuple[S | None, list[Problem]]:
    """Type one section by itself: the section, None where it is wrong, and everything that is wrong with it.

    prefix: the dotted key of the section ("run.env"), '' for none.
    """
    dot = f"{prefix}." if prefix else ""
    section, problems = _typed(cls, data, sources, dot)
    problems += [_unknown(key, name, siblings, cls, sources) for key, name, siblings in unknown_keys(cls, data, dot)]
    return section if not problems else None, problems


def _typed(
    cls: type[S], data: Mapping[str, Any], sources: Mapping[str, str], prefix: str
) -> tuple[S | None, list[Problem]]:
    """`data` as `cls`, None where pydantic refuses it, and what is wrong with the values; unknown keys are let pass."""
    section: S | None = None
    problems: list[Problem] = []
    try:
        section = cls.model_validate(data)
    except ValidationError as error:
        problems += [_from_pydantic(entry, sources, prefix) for entry in error.errors(include_url=False)]
    problems += _too_large(data, sources, prefix)
    return section, problems


def _too_large(data: Any, sources: Mapping[str, str], prefix: str = "") -> Iterator[Problem]:
    """Integers that no machine integer holds: every library behind us would fail on them in its own words, later."""
    for name, value in data.items() if isinstance(data, Mapping) else ():
        key = f"{prefix}{name}"
        if isinstance(value, int) and abs(value) >= 2**63:
            what = f"{show(value, key)} is too large"
            yield Problem(where=key, what=what, source=source_of(key, sources), allowed="64 bits")
        yield from _too_large(value, sources, f"{key}.")


def unknown_keys(cls: type[BaseModel], data: Any, prefix: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Dotted keys of `data` that the model lacks, each with its own name and the keys that exist beside it."""
    if not isinstance(data, Mapping):
        return
    known = keys(cls)
    for name, value in data.items():
        key = f"{prefix}{name}"
        field = known.get(str(name))
        if field is None:
            yield key, str(name), list(known)
        elif (section := section_of(field.annotation)) is not None and section is not RunEnv:
            # Beyond the common ones, keys of run.env belong to the executor, which knows them.
            yield from unknown_keys(section.variant(value), value, f"{key}.")


def keys(cls: type[BaseModel]) -> dict[str, Any]:
    """A section's own keys as they are written in YAML (`_target_`, not `target`), with their FieldInfo."""
    return {info.alias or name: info for name, info in cls.model_fields.items()}


def section_of(annotation: Any) -> type[Section] | None:
    """The Section class in an annotation (`Peft`, `Peft | None`), or None; a list of sections is none."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, Section)), None)


def fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config class as (dotted key, pydantic FieldInfo), in the order of definition."""
    for name, info in keys(cls).items():
        section = section_of(info.annotation)
        if section is None:
            yield f"{prefix}{name}", info
        elif variants := section.classes():
            yield from _fields_of_all(variants, section.variant({}), f"{prefix}{name}.")
        else:
            yield from fields(section, f"{prefix}{name}.")


def _fields_of_all(
    variants: Mapping[str, type[Section]], default: type[Section], prefix: str
) -> Iterator[tuple[str, Any]]:
    """The leaves of a section of several kinds: the default kind's first, then the others' own with their names."""
    order = [default, *(cls for cls in variants.values() if cls is not default)]
    owners: dict[str, list[str]] = {}
    infos: dict[str, Any] = {}
    for cls in order:
        for key, info in fields(cls, prefix):
            owners.setdefault(key, []).append(next(name for name, other in variants.items() if other is cls))
            infos.setdefault(key, info)
    for key, info in infos.items():
        told = copy(info)
        if key == f"{prefix}type":
            told.annotation = Literal[tuple(variants)]  # type: ignore[assignment]
        elif len(owners[key]) < len(variants):
            told.description = f"{info.description} ({', '.join(owners[key])})"
        yield key, told


def source_of(key: str, sources: Mapping[str, str]) -> str:
    """Where a key came from: its own source, that of a key inside it, or that of the section it lies in."""
    if key not in sources:
        inside = next((source for name, source in sources.items() if name.startswith(f"{key}.")), "")
        if inside:
            return inside
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0]
    return ""


def as_written(adopted: Adopted, problems: Iterable[Problem]) -> list[Problem]:
    """The problems at the keys that the user wrote, where these were put into the step's own."""
    return [replace(problem, where=adopted.written.get(problem.where, problem.where)) for problem in problems]


def _with_source(problem: Problem, sources: Mapping[str, str]) -> Problem:
    return Problem(**{**vars(problem), "source": problem.source or source_of(problem.where, sources)})


def _unknown(key: str, name: str, siblings: list[str], cls: type[BaseModel], sources: Mapping[str, str]) -> Problem:
    parent = key.removesuffix(name).rstrip(".")
    if owners := _owners(cls, parent, name):
        what = f"is a setting of type {' and '.join(owners)}"
        hint = f"Leave it out, or choose {parent}.type={owners[0]}."
        return Problem(where=key, what=what, source=source_of(key, sources), hint=hint)
    if "." in name and any(full == key for full, _ in fields(cls)):
        hint = f"Nest it in the YAML: {key.replace('.', ': {')}: …{'}' * key.count('.')}"
        return Problem(where=key, what="a key with dots", source=source_of(key, sources), hint=hint)
    hint = suggest(name, siblings)
    if hint and parent:
        hint = hint.replace("Did you mean ", f"Did you mean {parent}.")
    if not hint:  # the right name in the wrong section
        hint = suggest(key, [full for full, _ in fields(cls)])
        same = [full for full, _ in fields(cls) if full.rpartition(".")[2] == name]
        hint = f"Did you mean {same[0]}?" if same else hint
    allowed = "" if hint else ", ".join(sorted(siblings))
    return Problem(where=key, what="unknown key", source=source_of(key, sources), allowed=allowed, hint=hint)


def _owners(cls: type[BaseModel], parent: str, name: str) -> list[str]:
    """The kinds of the section `parent` that have the key `name`; none where it has no kinds."""
    section = section_of(info.annotation) if (info := keys(cls).get(parent)) is not None else None
    return [kind for kind, other in section.classes().items() if name in keys(other)] if section else []


def _from_pydantic(entry: Mapping[str, Any], sources: Mapping[str, str], prefix: str) -> Problem:
    # pydantic adds the tags of union members to the location; keys of our data are what counts.
    key = ".".join(str(part) for part in entry["loc"] if not str(part).startswith(("function-", "constrained-")))
    for tag in (".int", ".float", ".str", ".bool", ".list[str]", ".literal"):
        key = key.removesuffix(tag)
    key = f"{prefix}{key}"
    kind, context, value = entry["type"], entry.get("ctx", {}), entry.get("input")
    allowed, hint = "", ""
    if kind == "missing":
        return Problem(where=key, what="is required", hint=f"Add {key}=… to the command line or the YAML.")
    if kind == "extra_forbidden":  # inside an entry of a list, which pydantic judges by itself
        return Problem(where=key, what="unknown key", source=source_of(key, sources))
    if kind in ("literal_error", "enum"):
        what = f"{show(value, key)} is not one of the choices"
        allowed = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
        hint = suggest(str(value), allowed.split(", "))
    elif kind in _EXPECTED:
        what = f"{show(value, key)} is not {_EXPECTED[kind]}"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}[kind]
        what, allowed = f"{show(value, key)} is out of range", f"{sign} {next(iter(context.values()))}"
    elif kind == "value_error":
        what = str(context.get("error", entry["msg"]))
    else:
        what = f"{show(value, key)}: {entry['msg'][0].lower()}{entry['msg'][1:]}"
    return Problem(where=key, what=what, source=source_of(key, sources), allowed=allowed, hint=hint)


def show(value: Any, key: str) -> str:
    """The value under a dotted key, for a message; what may be a secret is told by its kind."""
    if _is_hidden(value, key):
        return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else "its value"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_hidden(value: Any, key: str) -> bool:
    """Whether a secret stands under the key, or below it."""
    parts = key.split(".")
    secret = is_secret if VARIABLES in parts else is_secret_key  # a configuration's `key` is an everyday word
    if any(map(secret, parts)) or (parts[-1] == VARIABLES and isinstance(value, str | list)):
        return True
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return any(_is_hidden(item, f"{key}.{name}") for name, item in items)
