"""report.json, table.md and report.html of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steps.artifacts.opening import Artifact
from steps.artifacts.record import write_text
from steps.engine.comparison import page, table
from steps.engine.comparison.results import Outcome, Row, ranked
from steps.engine.train.settings import BASE, DATA

TITLE = "Comparison of fine-tuning variants"


def told(common: Mapping[str, Any], seeds: Sequence[int], inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """What all variants had in common, in words."""
    train = common["train"]
    rows = train["train_iters"] * train["global_batch_size"]
    return {
        "base": inputs[BASE].value,
        "data": inputs[DATA].value,
        "training": f"{train['train_iters']:,} optimizer steps of {train['global_batch_size']:,} packed rows "
        f"({rows:,} rows), the same in every run",
        "seeds": ", ".join(map(str, seeds)),
    }


def write(
    directory: Path, rows: Sequence[Row], outcomes: Sequence[Outcome], facts: Mapping[str, str],
    pictures: Mapping[str, str],
) -> str:  # fmt: skip
    """Write the report; returns the name of the variant with the lowest valid loss ("" where none has one)."""
    base_loss = next((one.base_loss for one in outcomes if one.base_loss is not None), None)
    remarks = list(table.remarks(rows, base_loss))
    report = {
        "compared": dict(facts),
        "base_loss": base_loss,
        "remarks": remarks,
        "variants": [row.to_dict() for row in rows],
        "runs": [asdict(one) for one in outcomes],
        "pictures": dict(pictures),
    }
    write_text(directory / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(directory / "table.md", table.markdown(rows) + "".join(f"\n- {remark}" for remark in remarks) + "\n")
    write_text(directory / "report.html", page.html(TITLE, rows, facts, remarks, pictures, directory))
    first = ranked(rows)[0]
    return first.name if first.valid_loss is not None else ""
