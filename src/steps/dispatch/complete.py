"""Shell completion: step ids, config names, dotlist keys. Called by the shell's Tab, so it must be quick and silent."""

from __future__ import annotations

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
    sign = incomplete[:1] if incomplete[:1] in "+~" else ""
    key, equals, start = incomplete[len(sign) :].partition("=")
    if equals:
        kinds = next((row["type"] for row in rows if row["key"] == key), "")
        choices = ["true", "false"] if kinds == "bool" else kinds.split(" | ") if " | " in kinds else []
        return [f"{sign}{key}={choice}" for choice in choices if choice.startswith(start)]
    end = "" if sign == "~" else "="
    return [f"{sign}{row['key']}{end}" for row in rows if row["key"].startswith(key)]


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
