"""Shell completion: step ids, config names, dotlist keys. Called by the shell's Tab, so it must be quick and silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steps.errors import StepsError


def step_ids(incomplete: str) -> list[str]:
    """Ids, and tails for those who type tails."""
    from steps.dispatch.catalog import catalog

    ids = [step for step in catalog() if step.startswith(incomplete)]
    return ids or [tail for step in catalog() if (tail := step.rpartition("/")[2]).startswith(incomplete)]


def configs(ctx: Any, incomplete: str) -> list[str]:
    """The configs that the step on the line ships."""
    from steps.dispatch import catalog

    try:
        return [name for name in catalog.configs(catalog.find(_step(ctx))) if name.startswith(incomplete)]
    except StepsError:
        return []


def _step(ctx: Any) -> str:
    """The step on the line. Behind an option that waits for its value, positional words are not assigned yet."""
    return ctx.params.get("step") or next(iter(ctx.args), "")


def overrides(ctx: Any, incomplete: str) -> list[str]:
    """`key=` for every key of the step's config, and `key=choice` behind the equals sign."""
    from steps.dispatch import catalog
    from steps.dispatch.parameters import parameters

    try:
        rows = parameters(catalog.find(_step(ctx)))
    except StepsError:
        return []
    return _settings({row["key"]: row["type"] for row in rows}, incomplete)


def _settings(types: Mapping[str, str], incomplete: str) -> list[str]:
    """types: of each dotted key, as `parameters` writes them."""
    sign = incomplete[:1] if incomplete[:1] in "+~" else ""
    key, equals, start = incomplete[len(sign) :].partition("=")
    if equals:
        kind = types.get(key, "")
        choices = ["true", "false"] if kind == "bool" else kind.split(" | ") if " | " in kind else []
        return [f"{sign}{key}={choice}" for choice in choices if choice.startswith(start)]
    end = "" if sign == "~" else "="
    return [f"{sign}{name}{end}" for name in types if name.startswith(key)]


def job_ids(incomplete: str) -> list[str]:
    """Ids, the newest first, `latest`, and for those who type the end of an id, the ends."""
    from steps.dispatch import jobs

    known = jobs.ids()[::-1]
    ids = [name for name in ("latest", *known) if name.startswith(incomplete)]
    return ids or [end for name in known if (end := name.rpartition("-")[2]).startswith(incomplete)]


def states(incomplete: str) -> list[str]:
    """The states of a job."""
    from steps.dispatch.job import STATES

    return [state for state in STATES if state.startswith(incomplete)]


def shapes(incomplete: str) -> list[str]:
    """Names of shipped model shapes, or none, and the shell offers paths."""
    from steps.shapes.presets import presets

    return [name for name in presets() if name.startswith(incomplete.lower())]


def asked(incomplete: str) -> list[str]:
    """The settings that `steps params` takes."""
    from steps.config.validate import fields
    from steps.dispatch.parameters import type_name
    from steps.dispatch.params import Asked

    return _settings({key: type_name(info.annotation) for key, info in fields(Asked)}, incomplete)
