"""YAML as people expect it: the 1.2 core schema, duplicate keys refused, the line of every value known.

YAML 1.1 (PyYAML's default) reads 12:00:00 as 43200 and `no` as False; sbatch then runs a 12-hour job for 30 days.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from steps.errors import ConfigError, Problem

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_MOST_KEYS = 100_000


class _Loader(_Base):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _int(loader: Any, node: yaml.ScalarNode) -> int:
    text = node.value.lower()
    return int(text, 8 if "0o" in text else 16 if "0x" in text else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def scalar(text: str) -> Any:
    """The scalar that the whole of `text` means: 16, 1e-4, true, null; anything else, '' too, is text."""
    if text == "":
        return text
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text)) if tag != "tag:yaml.org,2002:merge" else text
    finally:
        loader.dispose()


def parse_value(text: str) -> Any:
    """The value of a text in flow style (`[1, 2]`, `{a: b}`, `"quoted"`). Raises ValueError when it is not closed."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506, a safe loader
    except yaml.YAMLError as error:
        raise ValueError(str(getattr(error, "problem", None) or error)) from error


def load(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of each dotted key.

    Raises ConfigError for a file that is missing, no YAML, no mapping, or names a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    loader = _Loader(text)
    lines: dict[str, int] = {}
    try:
        node = loader.get_single_node()
        data = {} if node is None else _build(loader, node, "", lines, path)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested without end (an alias inside itself?)") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(Problem(where=where, what=str(getattr(error, "problem", None) or error))) from error
    finally:
        loader.dispose()
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, not a mapping of keys")
    return data, lines


def _build(loader: Any, node: yaml.Node, prefix: str, lines: dict[str, int], path: Path) -> Any:
    if len(lines) > _MOST_KEYS:  # aliases of aliases: a few lines can stand for billions of values
        raise ConfigError(f"{path} stands for more than {_MOST_KEYS:,} values")
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen and name != "<<":
                where = f"{path}:{key_node.start_mark.line + 1}"
                raise ConfigError(Problem(where=where, what=f"the key {prefix}{name} is given twice"))
            seen.add(name)
        loader.flatten_mapping(node)
        result = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            lines[f"{prefix}{name}"] = key_node.start_mark.line + 1
            result[name] = _build(loader, value_node, f"{prefix}{name}.", lines, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
        return [_build(loader, item, f"{prefix}{index}.", lines, path) for index, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def dump(data: Any) -> str:
    """YAML text that this loader, and any other, reads back as the same values."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    pass


def _str(dumper: Any, text: str) -> Any:
    # Quote what the 1.2 resolver would read as another type (1e-4: text for YAML 1.1, a number for us).
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if scalar(text) == text else '"')


_Dumper.add_representer(str, _str)
