"""How often the likeliest label word is the right one."""

from __future__ import annotations

import json

from steps import runtime
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.evaluation import labels
from steps.engine.evaluation.answers import read_prompts
from steps.engine.evaluation.model import open_model
from steps.engine.evaluation.report import asked, write
from steps.eval.classify.schema import Config
from steps.runtime import Job
from steps.runtime.figures import confusion, interval


def run(job: Job[Config]) -> None:
    """Score every label of every example, then count."""
    config = job.config
    prompts = read_prompts(config.examples_path, config.messages_field, config.max_examples)
    examples, names = labels.examples(prompts, config.labels)
    model = open_model(asked(config, job.inputs), job.progress)
    tokenizer = Tokenizer.load(str(model.source.path))
    scored = list(labels.score(model.decoder, tokenizer, examples, names, config.batch_size, job.progress))
    found = labels.figures(scored, names, config.confidence)
    with job.produce("output_dir") as out:
        with (out.path / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for one in scored:
                file.write(json.dumps(one.row(names), ensure_ascii=False) + "\n")
        told = {"model": config.model_facts(job.inputs), "data": config.examples_path}
        out.facts.update(write(out.path, "classification", told, found, base_fingerprint=model.fingerprint))
    for line in confusion(found["confusion"], names):
        job.progress.log(line)
    shown = {name: found[name] for name in ("examples", "macro_f1", "loss", "majority")}
    job.summary(accuracy=interval(found, "accuracy"), **shown, output_dir=config.output_dir)


if __name__ == "__main__":
    runtime.main(run)
