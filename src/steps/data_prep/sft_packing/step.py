"""Chat data to packed rows of tokens with a loss mask."""

from __future__ import annotations

import os
from pathlib import Path

from steps import runtime
from steps.data_prep.sft_packing.schema import Config
from steps.engine.data import blend, reading, sft
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.data.tokenizing import Settings
from steps.runtime import Job


def run(job: Job[Config]) -> None:
    """Pack, unless the result is already there."""
    config = job.config
    plan = _plan(config)
    output = Path(config.output_dir).expanduser()
    report = None if config.force else sft.published(output, plan)
    if report is not None:
        job.progress.log(f"{output} already holds exactly this; it is kept (force=true packs again)")
    else:
        workers = len(os.sched_getaffinity(0)) if config.num_workers is None else config.num_workers
        with job.produce("output_dir", keep_partial=True) as out:
            report = sft.pack_conversations(out.path, plan, job.progress, workers, config.max_drop_ratio)
            out.facts.update(sft.facts(report))
    train = report["splits"]["train"]
    job.summary(
        output_dir=str(output),
        rows_read=report["rows"]["read"],
        rows_dropped=report["rows"]["dropped"],
        train_packs=train["packs"],
        train_tokens=train["tokens"],
        trained_tokens=train["trained_tokens"],
        efficiency=train["efficiency"],
    )


def _plan(config: Config) -> sft.Plan:
    settings = Settings(
        pack_size=config.pack_size,
        messages_field=config.messages_field,
        tools_field=config.tools_field,
        loss=config.loss,
        overlong=config.overlong,
        pad_multiple=config.pad_multiple,
        ratios=(config.train_ratio, config.valid_ratio, config.test_ratio),
        seed=config.seed,
        library=config.tokenizer.library,
    )
    tokenizer = Tokenizer.load(config.tokenizer.model, config.chat_template)
    files = reading.examine(blend.resolve(config.blend_path))
    return sft.Plan(tokenizer, files, settings, config.num_shards, config.max_rows)


if __name__ == "__main__":
    runtime.main(run)
