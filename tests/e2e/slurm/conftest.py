"""A real Slurm for all tests in this folder, started once for each test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.slurm import Cluster
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
