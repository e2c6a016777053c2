"""`recipe._target_`: found under either spelling, called with what its signature takes."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from steps.engine.megatron_bridge.findings import Findings
from steps.engine.megatron_bridge.release import import_module
from steps.errors import ConfigError, Problem, suggest

DEFAULT = "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_peft_config"

#: Older releases have one recipe for full and adapter fine-tuning where newer ones have two.
_SPELLINGS = ("_peft_config", "_finetune_config")
#: What the recipes of different releases call the adapter scheme.
_SCHEME = ("peft_scheme", "peft")


def find(target: str, findings: Findings) -> Callable[..., Any]:
    """The function that the dotted path `target` names, or its other spelling, which is then noted.

    Raises ConfigError when there is none, StepFailed when its module needs a package that is not installed.
    """
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError(_wrong(target, "is no dotted path to a function", f"For example {DEFAULT}."))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        hint = "Look for its place in megatron.bridge.recipes of the release that is installed."
        raise ConfigError(_wrong(target, f"there is no module {error.name}", hint)) from error
    for spelling in (name, *_other_spellings(name)):
        function = getattr(module, spelling, None)
        if callable(function):
            if spelling != name:
                findings.note(f"recipe._target_: this release has no {name}; its {spelling} is used")
            return function  # type: ignore[no-any-return]
    recipes = sorted(key for key in vars(module) if key.endswith("_config") and not key.startswith("_"))
    hint = suggest(name, recipes) or f"It has: {', '.join(recipes) or 'no recipe'}."
    raise ConfigError(_wrong(target, f"{module_name} has no {name}", hint))


def call(function: Callable[..., Any], section: Mapping[str, Any], base: str, findings: Findings) -> Any:
    """The container that a recipe returns, called with what it takes of the recipe section.

    section: the `recipe` mapping, `peft` being the adapter scheme to ask for. What the function does not take is left
             to the caller, which sets it on the container.
    Raises ConfigError when the recipe refuses.
    """
    wanted = {key: value for key, value in section.items() if key != "_target_" and value is not None}
    offered = {"packed_sequence": True, "pretrained_checkpoint": base, **wanted}
    scheme = offered.pop("peft", None)
    taken = accepts(function)
    arguments = {key: value for key, value in offered.items() if taken is None or key in taken}
    for key in _SCHEME:
        if scheme is not None and key not in arguments and taken is not None and key in taken:
            arguments[key] = scheme
            break
    left = sorted(set(wanted) - set(arguments) - {*_SCHEME})
    name = getattr(function, "__name__", str(function))
    if left:
        findings.note(f"{name} takes no argument {', '.join(left)}: set on what it returns instead")
    try:
        return function(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(_wrong(name, f"refuses its arguments {arguments}: {error}")) from error


def accepts(function: Callable[..., Any]) -> set[str] | None:
    """The names of the arguments a recipe takes; None for `**kwargs` that are not spelled out.

    `**kwargs: Unpack[SomeTypedDict]` counts as the keys of that TypedDict.
    """
    parameters = inspect.signature(function).parameters.values()
    found = {item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    for item in parameters:
        if item.kind is item.VAR_KEYWORD:
            try:
                hint = typing.get_type_hints(function).get(item.name, item.annotation)
            except (NameError, TypeError, AttributeError):
                hint = item.annotation
            inside = typing.get_args(hint)
            if not inside or not hasattr(inside[0], "__annotations__"):
                return None
            found |= set(inside[0].__annotations__)
    return found


def _other_spellings(name: str) -> list[str]:
    return [
        name.removesuffix(ours) + theirs
        for ours in _SPELLINGS
        if name.endswith(ours)
        for theirs in _SPELLINGS
        if theirs != ours
    ]


def _wrong(target: str, what: str, hint: str = "") -> Problem:
    return Problem(where="recipe._target_", what=f"{target}: {what}", hint=hint, name="recipe_not_found")
