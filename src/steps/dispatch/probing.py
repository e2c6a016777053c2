"""`steps run --probe`: a step tries a little of its work, here and now, and leaves nothing but what it found out."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from steps.dispatch import executors, job, sheet
from steps.dispatch.plan import Planned
from steps.errors import UsageError


class Options(Protocol):
    """Of the options of `steps run` those that a probe cannot have beside it."""

    @property
    def dry_run(self) -> bool: ...
    @property
    def batch(self) -> str | None: ...
    @property
    def upstream(self) -> bool: ...
    @property
    def after(self) -> tuple[str, ...]: ...


def refuse_options(options: Options) -> None:
    """Raise UsageError for options that ask for something else than a try here and now."""
    if options.dry_run:
        raise UsageError("--probe and -d exclude each other", hint="-d estimates, --probe runs a few steps.")
    for option, given in (("-b", options.batch), ("--after", options.after), ("--upstream", options.upstream)):
        if given:
            raise UsageError(f"--probe and {option} exclude each other", hint="A probe runs here, now and alone.")


def refuse_step(entry: Planned) -> None:
    """Raise UsageError for a step that runs elsewhere, or has nothing to try."""
    if entry.spec.executor != "local":
        what = f"the profile {entry.spec.profile} runs its jobs with {entry.spec.executor}, but --probe runs here"
        raise UsageError(what, hint="Leave the profile out, or give --probe on a machine like those of the cluster.")
    if why := entry.config.unprobed():
        raise UsageError(f"{entry.step.id} cannot be probed: {why}")


def run(entry: Planned) -> None:
    """Run it as a job outside of .steps/jobs, which is gone afterwards. Raises SystemExit with its code if it fails."""
    executor = executors.get(entry.spec.executor)
    with tempfile.TemporaryDirectory(prefix="steps-probe-") as parent:
        spec = replace(entry.spec, directory=Path(parent) / entry.spec.id, probe=True)
        os.environ["TMPDIR"] = parent  # what torchrun and others leave in there goes too
        job.create(spec, executor.render(spec))
        if code := executor.attach(spec):
            raise SystemExit(code)
        summary = json.loads((spec.directory / "summary.json").read_text())
    print("\n".join(sheet.probed(entry, summary)), flush=True)
