"""A real Slurm for all tests in this folder, started once for each test process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.slurm import Cluster
from support.slurm_jobs import Place, login_to
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


@pytest.fixture
def login(cluster, tmp_path, monkeypatch) -> Place:
    """A login node of the cluster: this shell."""
    return login_to(cluster, tmp_path, monkeypatch)


@pytest.fixture
def remote(cluster, sshd, tmp_path, monkeypatch) -> Place:
    """The same cluster behind ssh. Nothing else here knows of it."""
    sshd.write_ssh(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    env = {"tunnel": "ssh", "host": sshd.host, "user": sshd.user, "port": sshd.port, "identity": str(sshd.identity)}
    return Place(cluster, tmp_path / "here", tmp_path / "there", {**env, "remote_job_dir": str(tmp_path / "there")})


@pytest.fixture(params=["login", pytest.param("remote", marks=pytest.mark.slow)])
def place(request) -> Place:
    """Where jobs are submitted: on a login node, or through ssh."""
    place: Place = request.getfixturevalue(request.param)
    return place
