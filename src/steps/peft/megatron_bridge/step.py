"""Train adapters on a frozen base: packed_parquet and checkpoint_megatron in, checkpoint_lora out."""

from __future__ import annotations

from steps import runtime
from steps.peft.megatron_bridge.schema import Config
from steps.runtime.training import train


def run(job: runtime.Job[Config]) -> None:
    """Hand the work to the engine that the configuration chooses."""
    train(job)


if __name__ == "__main__":
    runtime.main(run)
