"""A broken manifest is told with its file and fault; named failures carry cause and recovery."""

from __future__ import annotations

import pytest

from steps import manifest
from steps.dispatch import catalog
from steps.errors import Problem, StepsError, UsageError

GOOD = """
[step]
id = "peft/x"
name = "X"
category = "peft"
description = "does x"
[[produces]]
type = "checkpoint_lora"
key = "out"
[[errors]]
name = "boom"
cause = "It exploded."
recovery = "Duck."
"""


def read(tmp_path, text):
    folder = tmp_path / "peft" / "x"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.toml").write_text(text)
    return manifest.read(folder, tmp_path)


def test_good(tmp_path):
    found = read(tmp_path, GOOD)
    assert found.module == "steps.peft.x.step"
    assert found.produces[0].type == "checkpoint_lora"
    assert found.run.launch == "python"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "peft/x"', 'id = "peft/y"', "is not its path"),
        ('category = "peft"', 'category = "sft"', "is not the first part"),
        ('type = "checkpoint_lora"', 'type = "checkpoint_loar"', "unknown artifact type"),
        ('name = "X"', "", r"\[step\]: name is missing"),
        ('name = "X"', 'name = "X"\ncolour = "red"', "unknown key 'colour'"),
        ('key = "out"', 'key = "out"\nkeys = 1', r"\[\[produces\]\]: unknown key 'keys'"),
        ("[[errors]]", "[[erors]]", "unknown table 'erors'"),
        ("[step]", "[step", "step.toml"),
    ],
)
def test_bad(tmp_path, old, new, message):
    with pytest.raises(StepsError, match=message):
        read(tmp_path, GOOD.replace(old, new))


def test_a_bad_launch(tmp_path):
    with pytest.raises(StepsError, match="neither python nor torchrun"):
        read(tmp_path, GOOD + '[run]\nlaunch = "bash"\n')


def test_known_errors_are_explained(tmp_path):
    found = read(tmp_path, GOOD)
    explained = found.explain(Problem(where="a", what="bang", name="boom"))
    assert str(explained) == "a: bang. [boom] It exploded. Duck."
    assert found.explain(explained) == explained
    other = Problem(where="a", what="bang", name="unheard")
    assert found.explain(other) is other


def test_steps_are_found_by_tail_and_ambiguity_lists_the_candidates(monkeypatch, tmp_path):
    one = read(tmp_path, GOOD)
    monkeypatch.setattr(catalog, "catalog", lambda: {"peft/x": one, "sft/x": one, "sft/y": one})
    assert catalog.find("y") is one
    assert catalog.find("sft/y/") is one
    with pytest.raises(UsageError, match="could be any of peft/x, sft/x"):
        catalog.find("x")
