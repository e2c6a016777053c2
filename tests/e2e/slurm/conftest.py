"""A real Slurm for all tests in this folder, started once for each test process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.slurm import Cluster
from support.slurm_jobs import Place
from support.sshd import Sshd


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, no accounting. Its environment must be given to what uses it: cluster.env."""
    if lack := Cluster.missing():
        pytest.skip(lack)
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def sshd(cluster) -> Iterator[Sshd]:
    """The login node of that cluster, reached over ssh."""
    if lack := Sshd.missing():
        pytest.skip(lack)
    with Sshd(env=cluster.env) as running:
        yield running


@pytest.fixture(params=["local", "ssh"])
def place(request, tmp_path, monkeypatch) -> Place:
    """Where jobs are submitted: a login node, or its other side. Behind ssh nothing here knows the cluster."""
    cluster = request.getfixturevalue("cluster")
    env: dict[str, Any] = {"remote_job_dir": str(tmp_path / "there")}
    if request.param == "local":
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
    else:
        sshd = request.getfixturevalue("sshd")
        sshd.write_ssh(tmp_path / "bin")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
        monkeypatch.delenv("SLURM_CONF", raising=False)
        env |= {"tunnel": "ssh", "host": sshd.host, "user": sshd.user, "port": sshd.port}
        env["identity"] = str(sshd.identity)
    return Place(cluster, tmp_path / "here", tmp_path / "there", env)
