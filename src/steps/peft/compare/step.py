"""Methods, ranks or any other settings compared: the same base, data, seeds and steps, each in a job of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from steps import runtime
from steps.artifacts import record
from steps.config import yaml12
from steps.engine.comparison import plots
from steps.engine.comparison.report import told, write
from steps.engine.comparison.results import summarized
from steps.engine.comparison.running import Runner, compare
from steps.errors import StepFailed
from steps.peft.compare.schema import Config
from steps.runtime import Job
from steps.runtime.started import Starter


def run(job: Job[Config]) -> None:
    """Train what is missing, then tell everything."""
    config = job.config
    starter = Starter(config.profile, config.env_file and str(Path(config.env_file).absolute()), config.parallel)
    if config.profile is not None:
        _rehearse(job, starter)
    runner = Runner(starter.start, config.parallel, job.progress, _classification(config))
    made_of = [item.record.digest if item.record else item.value for item in job.inputs.values()]
    with starter.stopping():
        outcomes = compare(config.compared, config.common(), config.used_seeds, config.runs, made_of, runner)
    rows = summarized(outcomes)
    if not any(row.runs for row in rows):
        raise StepFailed(f"no variant ended well; the first: {rows[0].error}", name="every_variant_failed")
    with job.produce("output_dir") as out:
        pictures = plots.draw(rows, outcomes, out.path)
        facts = told(config.common(), config.used_seeds, job.inputs)
        best = write(out.path, rows, outcomes, facts, pictures)
        out.facts.update(variants={row.name: row.facts() for row in rows}, seeds=config.used_seeds)
    failed = [row.name for row in rows if row.error]
    job.summary(best=best, variants=len(rows), failed=", ".join(failed) or "none", output_dir=config.output_dir)


def _rehearse(job: Job[Config], starter: Starter) -> None:
    """Refuse a profile that the first run could not be submitted with. Raises StepFailed."""
    config = job.config
    first = config.compared[0].trial(config.common(), None, config.used_seeds[0], config.runs)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "first.yaml"
        record.write_text(path, yaml12.dump(dict(first.config)))
        # An env.toml is looked for from there upwards, as it will be from the runs' own directories.
        near = next(folder for folder in (config.runs, *config.runs.parents) if folder.is_dir())
        if told := starter.refused(first.step, path, near):
            what = f"profile {config.profile!r} cannot run them. A dry run of the first says:\n{told}"
            raise StepFailed(what, name="profile_refused")


def _classification(config: Config) -> dict[str, Any] | None:
    if config.classify is None:
        return None
    section = config.classify.model_dump()
    return {**section, "examples_path": str(Path(config.classify.examples_path).expanduser().absolute())}


if __name__ == "__main__":
    runtime.main(run)
