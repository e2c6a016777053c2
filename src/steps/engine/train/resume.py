"""Where a run goes on from, decided by what is on disk. Free of torch, so that a dry run decides the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steps.artifacts import record as records
from steps.artifacts.checkpoint import iteration_dir, iterations
from steps.engine.train.plan import Plan, mismatches
from steps.errors import ArtifactError, Problem


@dataclass(frozen=True)
class Source:
    """One saved iteration. folder: its `iter_NNNNNNN`."""

    folder: Path
    iteration: int


def find(plan: Plan) -> Source | None:
    """The saved iteration that the run goes on from; None for a fresh start.

    The run's own saves come first, so that the same command after a kill loses nothing; then checkpoint.load. With
    checkpoint.ckpt_step the own saves come first only where they were made by the same command after it had gone back;
    the run goes back otherwise. Raises ArtifactError when checkpoint.load or checkpoint.ckpt_step names something that
    is not there, or checkpoint.save has to be rewound and belongs to another run.
    """
    home, step = plan.save_dir, plan.checkpoint.ckpt_step
    load = None if plan.checkpoint.load is None else Path(plan.checkpoint.load).expanduser()
    if load is not None and not load.exists():
        raise ArtifactError(Problem(where="checkpoint.load", what=f"there is no {plan.produces} at {load}"))
    known = records.read(home)
    if known is not None and step is not None and known.facts.get("rollback") == plan.rollback():
        step = None
    if (own := _at(home, step)) is not None:
        return own
    if load is not None and (other := _at(load, step)) is not None:
        if known is not None and (problems := list(mismatches(plan, known.facts, str(home)))):
            raise ArtifactError(problems)
        return other
    if step is not None:
        places = [home] if load is None else [home, load]
        have = sorted({number for path in places for number in iterations(path)})
        raise ArtifactError(
            Problem(
                where="checkpoint.ckpt_step",
                what=f"no iteration {step} is saved in {' or '.join(map(str, places))}",
                allowed=", ".join(map(str, have)),
                hint="" if have else "Leave ckpt_step out to start afresh.",
            )
        )
    if load is not None:
        raise ArtifactError(Problem(where="checkpoint.load", what=f"{load} holds no {plan.produces}"))
    return None


def too_far(plan: Plan, iteration: int) -> Problem | None:
    """The fault of a run that has come further than train_iters."""
    if iteration <= plan.train.train_iters:
        return None
    return Problem(
        where="train.train_iters",
        what=f"is {plan.train.train_iters}, but the run in {plan.save_dir} has come to iteration {iteration}",
        hint="Set checkpoint.ckpt_step to go back, or choose another checkpoint.save.",
    )


def _at(path: Path, step: int | None) -> Source | None:
    folder = iteration_dir(path, step)
    number = "" if folder is None else folder.name.removeprefix("iter_")
    if folder is None or not number.isdigit() or (step is not None and int(number) != step):
        return None
    return Source(folder, int(number))
