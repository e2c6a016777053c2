"""Train all weights of a model: packed_parquet and checkpoint_megatron in, checkpoint_megatron out."""

from __future__ import annotations

from steps import runtime
from steps.runtime.training import train
from steps.sft.megatron_bridge.schema import Config


def run(job: runtime.Job[Config]) -> None:
    """Hand the work to the engine that the configuration chooses."""
    train(job)


if __name__ == "__main__":
    runtime.main(run)
