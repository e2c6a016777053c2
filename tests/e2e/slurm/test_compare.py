"""peft/compare as jobs of a profile, on a real Slurm: each run is a job there, and is watched to its end."""

from __future__ import annotations

import json
import re

import pytest
from support.packed import PACK_SIZE, random_rows, write_base, write_packed
from support.slurm_site import Site

from steps.config import yaml12

pytest.importorskip("nemo_run", reason="nemo_run is not installed (pip install 'peft-steps[cluster]')")
pytest.importorskip("matplotlib", reason="extra report")


@pytest.fixture
def site(tmp_path, cluster):
    write_base(tmp_path / "base", true=True)
    write_packed(tmp_path / "packed", random_rows(20), random_rows(6, seed=9))
    data = {
        "engine": "torch",
        "recipe": {"seq_length": PACK_SIZE},
        "dataset": {"nano3_packed_sft_dir": "packed"},
        "train": {"train_iters": 3, "global_batch_size": 4, "eval_interval": 3, "eval_iters": 2},
        "peft": {"type": "lora", "dim": 4, "alpha": 8},
        "checkpoint": {"pretrained_checkpoint": "base", "save": "runs"},
        "variants": [
            {"name": "lora", "set": []},
            {"name": "broken", "set": ["optimizer.lr=1e30"]},
            {"name": "full", "set": ["peft=null"]},
        ],
        "parallel": 2,
        "profile": "here",
        "output_dir": "report",
    }
    (tmp_path / "compare.yaml").write_text(yaml12.dump(data))
    return Site(tmp_path, cluster)


def test_each_run_is_a_job_of_the_profile_and_runs_once(site):
    site.profile("")
    done = site.steps("run", "peft/compare", "-c", "compare.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"broken, .* failed: iteration \d", done.stdout)
    report = json.loads((site.directory / "report/report.json").read_text())
    rows = {row["name"]: row for row in report["variants"]}
    assert rows["lora"]["valid_loss"]["mean"] > 0
    assert rows["full"]["valid_loss"]["mean"] > 0
    assert "iteration" in rows["broken"]["error"]

    assert _submitted(site) == 3
    again = site.steps("run", "peft/compare", "-c", "compare.yaml")
    assert again.returncode == 0, again.stderr
    # Only what failed is tried again.
    assert _submitted(site) == 4


def _submitted(site):
    """Numbers that Slurm gave to runs."""
    return len({path.read_text() for path in site.directory.glob("runs/*/*/.steps/jobs/*/slurm_job_id")})


def test_a_profile_that_is_not_there_is_told_before_anything_starts(site):
    done = site.steps("run", "peft/compare", "-c", "compare.yaml")
    assert done.returncode == 1
    assert "[profile_refused]" in done.stdout
    assert "there is no profile 'here'" in done.stdout
    assert not list(site.directory.glob("runs/*/*/.steps"))
