"""What is missing in a profile for Lepton, without asking anybody."""

from __future__ import annotations

from steps.dispatch.executors.lepton import checks
from steps.dispatch.executors.lepton.env import LeptonEnv


def test_a_lepton_job_needs_a_container():
    """An empty image says: none. One that is not set is the step's."""

    def named(image: str | None) -> bool:
        return any("container_image" in problem.where for problem in checks.check(LeptonEnv(container_image=image)))

    assert (named(""), named(None), named("image:1")) == (True, False, False)
