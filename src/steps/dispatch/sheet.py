"""The sheet of a dry run: everything that would happen, as text or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steps.dispatch import executors
from steps.dispatch.job import MASK, JobSpec, Status
from steps.dispatch.plan import Planned
from steps.dispatch.render import annotated, bold, four_digits, section

_FACTS = ("pack_size", "method", "dim", "family", "parameters", "dtype", "iteration")


def text(planned: Sequence[Planned]) -> Iterator[str]:
    """The sheet for people: one part a step, in the order they run."""
    for number, entry in enumerate(planned, start=1):
        order = f"{number} of {len(planned)}: " if len(planned) > 1 else ""
        yield bold(f"{order}{entry.step.id} -c {entry.config_name}, profile {entry.spec.profile}")
        yield from section("Configuration")
        yield from annotated(entry.spec.config, entry.composed.sources)
        yield from section("Inputs")
        yield from _inputs(entry) if entry.step.consumes else iter(["none"])
        yield from section("Outputs")
        for port in entry.step.produces:
            yield f"{port.key}: {_value(entry, port.key)} ({port.type})"
        warnings = [*entry.findings.warnings]
        if found := entry.config.accounts(entry.findings.inputs):
            from steps.dispatch import accounts

            yield from accounts.texts(found)
            warnings += dict.fromkeys(warning for account in found.values() for warning in account.warnings)
        notes = [*_notes(entry), *(f"warning: {warning}" for warning in warnings)]
        yield from ["", *notes] if notes else []
        for name, body in executors.get(entry.spec.executor).render(entry.spec).items():
            yield from section(f"Command ({name})")
            yield body.rstrip("\n")
        yield from section("Environment")
        yield from [f"{key}={value}" for key, value in _environment(entry).items()] or ["nothing beyond this shell's"]
        yield ""


def data(planned: Sequence[Planned], problems: Sequence[Any] = ()) -> dict[str, Any]:
    """The same for programs."""
    return {
        "ok": not problems,
        "problems": [problem.to_dict() for problem in problems],
        "steps": [
            {
                "step": entry.step.id,
                "config_name": entry.config_name,
                "profile": entry.spec.profile,
                "executor": entry.spec.executor,
                "config": entry.spec.config,
                "sources": entry.composed.sources,
                "inputs": {
                    port.key: {"type": port.type, "value": _value(entry, port.key), "state": _state(entry, port.key)}
                    for port in entry.step.consumes
                },
                "outputs": {
                    port.key: {"type": port.type, "value": _value(entry, port.key)} for port in entry.step.produces
                },
                **_accounts(entry),
                "notes": _notes(entry),
                "warnings": list(entry.findings.warnings),
                "files": dict(executors.get(entry.spec.executor).render(entry.spec)),
                "environment": _environment(entry),
            }
            for entry in planned
        ],
    }


def _accounts(entry: Planned) -> dict[str, Any]:
    """account: of a step with one model, or None; accounts: by name, of a step with several."""
    found = {name: account.to_dict() for name, account in entry.config.accounts(entry.findings.inputs).items()}
    return {"account": found.pop("", None), **({"accounts": found} if found else {})}


def _notes(entry: Planned) -> list[str]:
    """The plan's, and what a sheet has to say of inputs that it does not show."""
    if entry.looked or not (entry.step.consumes or entry.step.produces):
        return entry.notes
    return [*entry.notes, "the job runs on another machine: its inputs are checked there, when it starts"]


def _value(entry: Planned, key: str) -> Any:
    from steps.preflight import lookup

    return lookup(entry.spec.config, key)


def _state(entry: Planned, key: str) -> str:
    if key in entry.waits_for:
        return f"made by {entry.waits_for[key]}"
    if key in entry.findings.inputs:
        return "found"
    if _value(entry, key) is None:
        return "not given"
    return "missing" if entry.looked else "checked where the job runs"


def _inputs(entry: Planned) -> Iterator[str]:
    for port in entry.step.consumes:
        artifact = entry.findings.inputs.get(port.key)
        facts = {name: artifact.facts[name] for name in _FACTS if name in artifact.facts} if artifact else {}
        told = "".join(f", {name} {value}" for name, value in facts.items())
        yield f"{port.key}: {_value(entry, port.key)} ({port.type}, {_state(entry, port.key)}{told})"


def _environment(entry: Planned) -> dict[str, str]:
    return {**entry.spec.env, **dict.fromkeys(entry.spec.secret_env, MASK)}


def submitted(spec: JobSpec, status: Status) -> Iterator[str]:
    """What a detached submission leaves on the screen."""
    name = spec.id.rpartition("-")[2]
    yield f"job {spec.id} is {status.state}" + (f": {status.reason}" if status.reason else "")
    yield f"  steps jobs status {name}"
    yield f"  steps jobs logs -f {name}"
    yield f"  steps jobs cancel {name}"


def link(number: int, total: int, entry: Planned, status: Status) -> str:
    """One job of a chain that was just submitted."""
    name = entry.spec.id.rpartition("-")[2]
    waits = [before.rpartition("-")[2] for before in entry.spec.after]
    after = f", waits for {', '.join(waits)}" if waits else ""
    return f"[{number}/{total}] {name}  {entry.step.id} -c {entry.config_name}: {status.state}{after}"


def probed(entry: Planned, summary: dict[str, Any]) -> Iterator[str]:
    """What a probe has found."""
    yield bold(f"{entry.step.id} probed; nothing was written")
    yield from _facts(summary)


def results(entry: Planned, summary: dict[str, Any], directory: Path, seconds: float) -> Iterator[str]:
    """The last lines of a job that went well."""
    yield bold(f"{entry.step.id} done in {seconds:.1f} s") + f"  (job {directory})"
    yield from _facts(summary)


def _facts(summary: dict[str, Any]) -> Iterator[str]:
    for key, value in summary.items():
        yield f"  {key.replace('_', ' ')}: {four_digits(value) if isinstance(value, float) else value}"
