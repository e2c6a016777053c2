"""Have runs done, each once, several at a time; what one of them fails of the others do not feel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.artifacts import record
from steps.config import yaml12
from steps.engine.comparison.results import Outcome, best, collected
from steps.engine.comparison.variants import Trial, Variant
from steps.engine.progress import Progress


@dataclass(frozen=True)
class Ended:
    """How a step that was started ended: its exit code, and what it said of its failure."""

    exit_code: int
    error: str = ""


#: Starts a step with a configuration file, in a directory of its own, and returns when it has ended.
Start = Callable[[str, Path, Path], Ended]


@dataclass(frozen=True)
class Runner:
    """Does runs, `parallel` at a time.

    classify: the configuration of eval/classify without the model, or None.
    """

    start: Start
    parallel: int
    progress: Progress
    classify: Mapping[str, Any] | None = None

    def all(self, trials: Iterable[Trial]) -> list[Outcome]:
        """What each run came to, in their order. Runs that are done already are only read."""
        trials = list(trials)
        lock = threading.Lock()
        with self.progress.task("compare", len(trials), "runs") as task:

            def one(trial: Trial) -> Outcome:
                found = self._one(trial)
                with lock:
                    self.progress.log(found.line())
                    task.advance(1)
                return found

            pool = ThreadPoolExecutor(max_workers=self.parallel)
            try:
                return list(pool.map(one, trials))
            finally:
                # Not waited for after an interruption: who starts the runs stops them, and then the threads end.
                pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, trial: Trial) -> Outcome:
        ended = Ended(0)
        if not _is_finished(trial.checkpoint):
            ended = self._start(trial.step, trial.config, trial.directory)
        if ended.exit_code == 0 and self.classify is not None and not (trial.directory / "classification").exists():
            ended = self._start("eval/classify", {**self.classify, **_model(trial)}, trial.directory)
        return collected(trial, ended.exit_code, ended.error)

    def _start(self, step: str, config: Mapping[str, Any], directory: Path) -> Ended:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{step.replace('/', '-')}.yaml"
        record.write_text(path, yaml12.dump(dict(config)))
        return self.start(step, path, directory)


def compare(
    variants: Sequence[Variant],
    common: Mapping[str, Any],
    seeds: Sequence[int],
    runs: Path,
    made_of: Sequence[str],
    runner: Runner,
) -> list[Outcome]:
    """Every variant at each of its learning rates from the first seed, then at the best of them from the others.

    The rest as for `Variant.trial`.
    """

    def trial(variant: Variant, lr: float | None, seed: int) -> Trial:
        return variant.trial(common, lr, seed, runs, made_of)

    grid = [[trial(variant, lr, seeds[0]) for lr in variant.lrs or (None,)] for variant in variants]
    found = runner.all(trial for trials in grid for trial in trials)
    chosen = {variant.name: best([one for one in found if one.variant == variant.name]) for variant in variants}
    again = [
        trial(variant, outcome.lr, seed)
        for variant in variants
        if (outcome := chosen[variant.name]) is not None
        for seed in seeds[1:]
    ]
    return [*found, *(runner.all(again) if again else ())]


def _is_finished(checkpoint: Path) -> bool:
    known = record.read(checkpoint)
    return known is not None and bool(known.facts.get("finished")) and not record.missing_files(checkpoint, known)


def _model(trial: Trial) -> dict[str, Any]:
    """The run's model, as the eval steps name it."""
    is_adapter = "peft" in trial.config
    base = trial.config["checkpoint"]["pretrained_checkpoint"] if is_adapter else str(trial.checkpoint)
    adapter = {"lora_checkpoint": str(trial.checkpoint)} if is_adapter else {}
    output = {"output_dir": str(trial.directory / "classification")}
    return {
        **adapter,
        "base_megatron_path": base,
        "precision": trial.config["train"].get("precision", "auto"),
        **output,
    }
