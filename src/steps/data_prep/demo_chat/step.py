"""Real dialogues of two people as chat data: something to fine-tune on that pip can install."""

from __future__ import annotations

from pathlib import Path

from steps import runtime
from steps.data_prep.demo_chat.schema import Config
from steps.engine.data import dialogues
from steps.runtime import Job


def run(job: Job[Config]) -> None:
    """Convert, and say what was left out."""
    config = job.config
    data = dialogues.load(Path(config.dataset_json).expanduser())
    with job.produce("output_dir") as out:
        written, dropped = dialogues.write(out.path / "conversations.jsonl", data, config.max_conversations)
        out.facts.update(conversations=written, dropped=dict(dropped))
    for reason, count in dropped.items():
        job.progress.log(f"dropped {count:,} {reason}: {dialogues.REASONS[reason]}")
    job.summary(output_dir=config.output_dir, conversations=written, dropped=sum(dropped.values()))


if __name__ == "__main__":
    runtime.main(run)
