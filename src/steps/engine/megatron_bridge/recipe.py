"""`recipe._target_`: found under either spelling, called with what its signature takes."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from steps.engine.megatron_bridge.findings import Findings
from steps.engine.megatron_bridge.release import import_module
from steps.errors import ConfigError, Problem, suggest

_DEFAULT = "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_{}_config"

#: Older releases have one recipe for full and adapter fine-tuning where newer ones have two.
_BOTH, _ADAPTERS, _ALL_WEIGHTS = "_finetune_config", "_peft_config", "_sft_config"
#: What the recipes of different releases call the adapter scheme.
_SCHEME = ("peft_scheme", "peft")


def default(*, adapts: bool) -> str:
    """The recipe of a configuration that names none."""
    return _DEFAULT.format("peft" if adapts else "sft")


def find(target: str, findings: Findings, *, adapts: bool = True) -> Callable[..., Any]:
    """The function that the dotted path `target` names, or its other spelling, which is then noted.

    adapts: whether adapters are trained, or all weights.
    Raises ConfigError when there is none, StepFailed when its module needs a package that is not installed.
    """
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError(_wrong(target, "is no dotted path to a function", f"For example {default(adapts=True)}."))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        hint = "Look for its place in megatron.bridge.recipes of the release that is installed."
        raise ConfigError(_wrong(target, f"there is no module {error.name}", hint)) from error
    for spelling in (name, *_other_spellings(name, adapts)):
        function = getattr(module, spelling, None)
        if callable(function):
            if spelling != name:
                findings.note(f"recipe._target_: this release has no {name}; its {spelling} is used")
            return function  # type: ignore[no-any-return]
    recipes = sorted(key for key in vars(module) if key.endswith("_config") and not key.startswith("_"))
    hint = suggest(name, recipes) or f"It has: {', '.join(recipes) or 'no recipe'}."
    raise ConfigError(_wrong(target, f"{module_name} has no {name}", hint))


def call(
    function: Callable[..., Any], section: Mapping[str, Any], scheme: str | None, base: str, findings: Findings
) -> Any:
    """The container that a recipe returns, called with what it takes of the recipe section.

    section: the `recipe` mapping. What the function does not take is left to the caller, to set on the container.
    scheme:  of adapters to ask for; None: none. A recipe for both trains adapters unless it is told so.
    Raises ConfigError when the recipe refuses.
    """
    skip = {"_target_", *_SCHEME}
    wanted = {key: value for key, value in section.items() if key not in skip and value is not None}
    offered = {"packed_sequence": True, "pretrained_checkpoint": base, **wanted}
    taken = accepts(function)
    arguments = {key: value for key, value in offered.items() if taken is None or key in taken}
    for key in _SCHEME:
        if taken is not None and key in taken:
            arguments[key] = scheme
            break
    left = sorted(set(wanted) - set(arguments))
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


def _other_spellings(name: str, adapts: bool) -> list[str]:
    own = _ADAPTERS if adapts else _ALL_WEIGHTS
    pairs = ((own, _BOTH), (_BOTH, own))
    return [name.removesuffix(ours) + theirs for ours, theirs in pairs if name.endswith(ours)]


def _wrong(target: str, what: str, hint: str = "") -> Problem:
    return Problem(where="recipe._target_", what=f"{target}: {what}", hint=hint, name="recipe_not_found")
