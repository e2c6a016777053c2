"""How well a model predicts the trained tokens of packed data."""

from __future__ import annotations

from pathlib import Path

from steps import runtime
from steps.engine.data.shards import PackedSplit
from steps.engine.evaluation import perplexity
from steps.engine.evaluation.model import open_model
from steps.engine.evaluation.report import asked, write
from steps.eval.perplexity.schema import DATA, Config
from steps.runtime import Job
from steps.runtime.figures import interval


def run(job: Job[Config]) -> None:
    """Score every document, then say the means."""
    config, data = job.config, job.inputs[DATA]
    split = PackedSplit(data.path or Path(data.value), config.split)
    rows = min(len(split), config.max_rows or len(split))
    model = open_model(asked(config, job.inputs), job.progress)
    scores = perplexity.score(model.decoder, split, rows, config.micro_batch_size, job.progress)
    found = perplexity.figures(scores, config.confidence)
    with job.produce("output_dir") as out:
        scores.write(out.path / "documents.parquet")
        told = {"model": config.model_facts(job.inputs), "data": data.value, "split": config.split, "rows": rows}
        out.facts.update(write(out.path, "perplexity", told, found, base_fingerprint=model.fingerprint))
    job.summary(
        rows=rows,
        documents=found["documents"],
        trained_tokens=found["trained_tokens"],
        **{name: interval(found, name) for name in ("loss", "perplexity", "accuracy")},
        output_dir=config.output_dir,
    )


if __name__ == "__main__":
    runtime.main(run)
