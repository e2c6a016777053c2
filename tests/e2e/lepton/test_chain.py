"""A chain on Lepton, whose jobs cannot wait for each other."""

from __future__ import annotations

import pytest
from support.lepton_site import Site


@pytest.mark.parametrize("more", [["-d"], []])
def test_a_chain_is_not_submitted_all_at_once(site: Site, more: list[str]):
    done = site.steps("run", "convert/merge_lora", "-c", "tiny", "--upstream", "-b", "here", *more)
    assert done.returncode == 2
    assert "cannot wait for others" in done.stderr
    assert "-r here" in done.stderr
    assert not site.lepton.jobs
    assert not (site.directory / ".steps").exists()
