"""A Lepton workspace on this machine for each test in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.lepton import Lepton
from support.lepton_site import Site

REASON = "{} is not installed (pip install 'peft-steps[cluster]')"


@pytest.fixture
def lepton() -> Iterator[Lepton]:
    for name in ("nemo_run", "leptonai"):
        pytest.importorskip(name, reason=REASON.format(name))
    with Lepton() as running:
        yield running


@pytest.fixture
def site(tmp_path, lepton, monkeypatch) -> Site:
    """Also for this process: the workspace's credentials, and a home without any."""
    for name, value in {**lepton.env, "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    site = Site(tmp_path, lepton)
    site.store.mkdir()
    (tmp_path / "home").mkdir()
    site.profile()
    return site
