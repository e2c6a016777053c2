"""What of this machine's environment sbatch may hand to the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.stage import Cluster
from steps.dispatch.job import JobSpec


@pytest.fixture
def taken_out(tmp_path, monkeypatch):
    """The variables that a job with these secrets is not given."""

    def names(secrets: dict[str, str], environment: dict[str, str]) -> set[str]:
        monkeypatch.setattr("os.environ", environment)
        spec = JobSpec(
            id="a", step="a/b", module="m", directory=tmp_path, config={}, sources={}, config_name="tiny", profile="p",
            executor="slurm", environment=SlurmEnv(), secret_env=secrets, base=Path("/"),
        )  # fmt: skip
        call = Cluster("/usr/bin/sbatch", "", pyxis=False, has_image=False).sbatch(spec)
        assert call[0] == "env"
        assert call[-2:] == ["/usr/bin/sbatch", "--parsable"]
        assert set(call[1:-2:2]) <= {"-u"}
        return set(call[2:-2:2])

    return names


def test_what_gives_a_secret_away(taken_out):
    environment = {"MINE": "hf_0123456789", "NETRC": "login x password hf_0123456789", "HF_TOKEN": "old", "A": "hf_"}
    assert taken_out({"HF_TOKEN": "hf_0123456789"}, environment) == {"MINE", "NETRC", "HF_TOKEN"}


def test_a_directory_that_is_handed_on_leaves_the_job_its_path(taken_out, tmp_path):
    environment = {
        "HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/bin", "MODULEPATH": f"{tmp_path}/modules", "USER": "somebody",
    }  # fmt: skip
    assert taken_out({"CACHE": str(tmp_path), "WHO": "somebody"}, environment) == set()


def test_a_secret_that_looks_like_a_directory(taken_out, tmp_path):
    """Its name says what it is."""
    assert taken_out({"AWS_SECRET_ACCESS_KEY": str(tmp_path)}, {"MINE": str(tmp_path)}) == {"MINE"}
    assert taken_out({"RENAMED": "/no/such/place/4f2a"}, {"MINE": "/no/such/place/4f2a"}) == {"MINE"}
