"""Whether artifacts belong together, an adapter and its base above all, by what their records say."""

from __future__ import annotations

from collections.abc import Iterator

from steps.artifacts.opening import Artifact
from steps.errors import Problem


def disagree(one: Artifact, other: Artifact, fact: str) -> bool:
    """Whether both know a fact and do not agree on it."""
    return fact in one.facts and fact in other.facts and bool(one.facts[fact] != other.facts[fact])


def mismatch(adapter: Artifact, base: Artifact) -> Iterator[Problem]:
    """The fault (base_model_mismatch) of an adapter trained on other weights; none where a record is silent."""
    trained_on, here = (artifact.facts.get("base_fingerprint") for artifact in (adapter, base))
    if trained_on and here and trained_on != here:
        what = (
            f"the adapter {adapter.value} was trained on another base than {base.value} "
            f"(fingerprints {trained_on[:12]}… and {here[:12]}…)"
        )
        yield Problem(where=base.key, what=what, name="base_model_mismatch")
