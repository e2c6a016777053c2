"""Plain YAML values onto Megatron-Bridge's configuration objects, name by name, type by type.

Its configuration is dataclasses, some of which take values that YAML cannot hold (a torch dtype, an enum). Setting an
attribute that no dataclass field declares would be accepted by Python and read by nobody, hence the checks.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from steps.engine.megatron_bridge.findings import Findings

_UNIONS: tuple[Any, ...] = (Union, types.UnionType)


class Misfit(ValueError):
    """A value that a field does not take; the message says what it takes."""


def assign(target: Any, values: Mapping[str, Any], where: str, findings: Findings) -> None:
    """Set every value of `values` on the attribute of its name; mappings go into nested objects.

    where: the dotted key of `values`, for the messages.
    """
    hints, known = _hints(type(target)), names(target)
    for key, value in values.items():
        place = f"{where}.{key}"
        if key not in known:
            findings.no_counterpart(place, value, type(target).__name__, known)
            continue
        current = getattr(target, key, None)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(current):
            assign(current, value, place, findings)
        elif isinstance(value, Mapping) and isinstance(current, dict):
            setattr(target, key, {**current, **value})
        elif isinstance(value, Mapping) and (cls := _dataclass_in(hints.get(key))) is not None:
            made = construct(cls, value, place, findings)
            if made is not None:
                setattr(target, key, made)
        else:
            _set(target, key, value, hints.get(key, Any), place, findings)


def construct(cls: type, values: Mapping[str, Any], where: str, findings: Findings) -> Any:
    """`cls(**values)`; None when a value does not fit or the class itself refuses (both are in `findings`)."""
    hints = _hints(cls)
    known = [item.name for item in dataclasses.fields(cls) if item.init]
    arguments, before = {}, len(findings.problems)
    for key, value in values.items():
        if key not in known:
            findings.no_counterpart(f"{where}.{key}", value, cls.__name__, known)
            continue
        try:
            arguments[key] = fit(hints.get(key, Any), value)
        except Misfit as error:
            findings.problem(f"{where}.{key}", f"{value!r} does not fit", allowed=str(error))
    if len(findings.problems) > before:
        return None
    try:
        return cls(**arguments)
    except (AssertionError, TypeError, ValueError) as error:
        findings.problem(where, f"{cls.__name__} refuses this: {error}")
        return None


def names(target: Any) -> set[str]:
    """The settings an object has: its dataclass fields, what it carries besides, and properties one can set."""
    properties = {
        name
        for cls in type(target).__mro__
        for name, member in vars(cls).items()
        if isinstance(member, property) and member.fset is not None
    }
    declared = {item.name for item in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else set()
    return {name for name in declared | set(vars(target)) | properties if not name.startswith("_")}


def fit(hint: Any, value: Any) -> Any:
    """`value` as the annotation `hint` wants it.

    Raises Misfit. An annotation that cannot be judged (Any, a type variable, a protocol) takes everything.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    # Null is never judged: recipes use it for "none" also where the annotation does not say Optional.
    if value is None or hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return value
    if origin in _UNIONS:
        return _fit_union(arguments, value)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise Misfit(", ".join(map(str, arguments)))
    if hint is None or hint is type(None):
        raise Misfit("null")
    return _fit_class(origin or hint, value)


def _fit_union(arguments: tuple[Any, ...], value: Any) -> Any:
    # Exact types first: 1 stays an int in `float | int`, and a text stays a text in `Path | str`.
    for argument in sorted(arguments, key=lambda argument: type(value) is not argument):
        try:
            return fit(argument, value)
        except Misfit:
            continue
    raise Misfit(" or ".join(_told(argument) for argument in arguments))


def _fit_class(cls: Any, value: Any) -> Any:
    import torch

    if not isinstance(cls, type):
        return value
    if cls is torch.dtype:
        return _dtype(value)
    if issubclass(cls, enum.Enum):
        return _member(cls, value)
    if issubclass(cls, bool) or isinstance(value, bool):
        if cls in (bool, object) and isinstance(value, bool):
            return value
        raise Misfit(_told(cls))
    if cls is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if cls is float and isinstance(value, int):
        return float(value)
    if issubclass(cls, Path) and isinstance(value, str):
        return Path(value)
    if cls in (tuple, set, frozenset) and isinstance(value, list):
        return cls(value)
    if cls in (int, float, str, list, dict, tuple, set, frozenset):
        if not isinstance(value, cls):
            raise Misfit(_told(cls))
        return value
    if isinstance(value, cls):
        return value
    raise Misfit(f"a {cls.__name__}, which a YAML value cannot be")


def _dtype(value: Any) -> Any:
    import torch

    if isinstance(value, str):
        spelled = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value.removeprefix("torch."))
        value = getattr(torch, spelled, None)
    if isinstance(value, torch.dtype):
        return value
    raise Misfit("a torch dtype such as bfloat16")


def _member(cls: type[enum.Enum], value: Any) -> Any:
    for member in cls:
        if value is member or value == member.name or value == member.value:
            return member
    raise Misfit(", ".join(cls.__members__))


def _set(target: Any, key: str, value: Any, hint: Any, where: str, findings: Findings) -> None:
    current = getattr(target, key, None)
    try:
        value = fit(hint, value)
    except Misfit as error:
        # Recipes themselves go beyond annotations (cuda_graph_scope = "full" where a list is declared). Where one does,
        # whatever is of the type that stands there is a value of that kind.
        if type(current) is not type(value) or _fits(hint, current):
            findings.problem(where, f"{value!r} does not fit", allowed=str(error))
            return
    setattr(target, key, value)


def _fits(hint: Any, value: Any) -> bool:
    try:
        fit(hint, value)
    except Misfit:
        return False
    return True


def _dataclass_in(hint: Any) -> type | None:
    """The one dataclass among the alternatives of an annotation (`Optional[CommOverlapConfig]`)."""
    options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    found = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return found[0] if len(found) == 1 else None


def _hints(cls: type) -> dict[str, Any]:
    """The annotations of a class. One that cannot be resolved (its package is not here) says nothing, not an error."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        return {}


def _told(hint: Any) -> str:
    known = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        list: "a list",
        dict: "a mapping",
    }
    if hint is type(None):
        return "null"
    return known.get(hint, getattr(hint, "__name__", str(hint)))
