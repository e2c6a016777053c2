"""Labelled tweets as chat data: a task with one right word, to measure what fine-tuning is worth."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from steps import runtime
from steps.data_prep.demo_tweets.schema import Config
from steps.engine.data import tweets
from steps.runtime import Job


def run(job: Job[Config]) -> None:
    """Convert, split, and say what was left out."""
    config = job.config
    found, dropped = tweets.load(Path(config.dataset_csv).expanduser())
    train, test = tweets.chosen(found, config.max_per_label, config.test_ratio, config.seed)
    splits = {"train": train, "test": test}
    with job.produce("output_dir") as out:
        for split, rows in splits.items():
            tweets.write(out.path / split / "tweets.jsonl", rows)
            out.facts[split] = dict(Counter(label for _, label in rows))
        out.facts["dropped"] = dict(dropped)
    for reason, count in dropped.items():
        job.progress.log(f"dropped {count:,} {reason}: {tweets.REASONS[reason]}")
    counts = {split: len(rows) for split, rows in splits.items()}
    job.summary(output_dir=config.output_dir, **counts, dropped=sum(dropped.values()))


if __name__ == "__main__":
    runtime.main(run)
