"""What a model answers to prompts."""

from __future__ import annotations

import json
import time

from steps import runtime
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.evaluation.answers import answers, read_prompts, stop_tokens, summary
from steps.engine.evaluation.model import open_model
from steps.engine.evaluation.report import asked
from steps.engine.model.generate import Sampling
from steps.eval.generate.schema import Config
from steps.runtime import Job


def run(job: Job[Config]) -> None:
    """Answer every prompt, and show the first answer."""
    config = job.config
    prompts = read_prompts(config.prompts_path, config.messages_field, config.max_prompts)
    model = open_model(asked(config, job.inputs), job.progress)
    tokenizer = Tokenizer.load(str(model.source.path))
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    found, began = [], time.perf_counter()
    with job.produce("output_dir") as out, (out.path / "answers.jsonl").open("w", encoding="utf-8") as file:
        for answer in answers(
            model.decoder,
            tokenizer,
            prompts,
            stop_tokens(tokenizer, model.source),
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            sampling=sampling,
            progress=job.progress,
        ):
            file.write(json.dumps(answer.row(), ensure_ascii=False) + "\n")
            found.append(answer)
        seconds = time.perf_counter() - began
        out.facts.update(summary(found), model=config.model_facts(job.inputs), base_fingerprint=model.fingerprint)
    first = found[0]
    job.progress.log(f"{first.prompt.messages[-1].get('content')} -> {first.text}")
    told = summary(found)
    job.summary(**told, tokens_per_second=told["answer_tokens"] / seconds, output_dir=config.output_dir)


if __name__ == "__main__":
    runtime.main(run)
