"""report.json: what a model scored, for people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steps.artifacts.opening import Artifact
from steps.artifacts.record import write_text
from steps.config.evaluated import ADAPTER, EvaluatedModel
from steps.engine.evaluation.model import Asked

REPORT = "report.json"


def asked(config: EvaluatedModel, inputs: Mapping[str, Artifact]) -> Asked:
    """The model that a configuration names."""
    base, adapter = config.base(inputs), inputs.get(ADAPTER)
    return Asked(
        megatron=None if config.base_megatron_path is None else Path(config.base_megatron_path).expanduser(),
        hf=config.base_hf_path,
        adapter=None if config.lora_checkpoint is None else Path(config.lora_checkpoint).expanduser(),
        precision=config.precision,
        base_fingerprint=base.facts.get("base_fingerprint"),
        trained_on=None if adapter is None else adapter.facts.get("base_fingerprint"),
    )


def write(
    directory: Path, kind: str, told: Mapping[str, Any], found: Mapping[str, Any], *, base_fingerprint: str
) -> dict[str, Any]:
    """Write the report; returns it as facts of the artifact's record.

    kind: of evaluation.   told: what was evaluated.   found: the figures.
    """
    report = {"kind": kind, **told, "base_fingerprint": base_fingerprint, "figures": dict(found)}
    write_text(directory / REPORT, json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n")
    return report
