"""Typed sections: every fault at once, each with its source and a way out."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from steps.config.base import Section, StepConfig
from steps.config.validate import validate
from steps.errors import ConfigError, Problem


class Inner(Section):
    dim: int = Field(8, ge=1)
    kind: Literal["lora", "dora"] = "lora"
    rate: float = 0.1
    names: list[str] = Field(default_factory=list)
    flag: bool = False


class Example(StepConfig):
    peft: Inner = Field(default_factory=Inner)
    train_iters: int
    target: str | None = Field(None, alias="_target_")

    def accepts_unknown(self, key: str) -> str:
        return "passed on" if key.startswith("model.") or key == "model" else ""

    def check_values(self):
        if self.peft.dim == 13:
            yield Problem(where="peft.dim", what="13 is unlucky")


def problems(data, sources=None):
    with pytest.raises(ConfigError) as caught:
        validate(Example, data, sources)
    return {problem.where: problem for problem in caught.value.problems}


def test_all_faults_at_once_with_their_sources():
    found = problems(
        {"peft": {"dmi": 1, "kind": "lorra", "dim": 0, "rate": "fast", "flag": 1}, "trane": 3},
        {"peft.dmi": "command line", "peft.kind": "tiny.yaml:4", "peft": "tiny.yaml:3"},
    )
    assert set(found) == {"peft.dmi", "peft.kind", "peft.dim", "peft.rate", "peft.flag", "trane", "train_iters"}
    assert str(found["peft.dmi"]) == "peft.dmi: unknown key (from command line). Did you mean peft.dim?"
    assert found["peft.kind"].allowed == "lora, dora"
    assert found["peft.kind"].hint == "Did you mean lora?"
    assert found["peft.dim"].allowed == ">= 1"
    assert found["peft.dim"].source == "tiny.yaml:3"
    assert found["peft.rate"].what == "'fast' is not a number"
    assert found["train_iters"].what == "is required"


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"train_iters": "5"}, "train_iters"),
        ({"train_iters": 5.0}, "train_iters"),
        ({"train_iters": True}, "train_iters"),
        ({"train_iters": None}, "train_iters"),
        ({"train_iters": 5, "peft": {"rate": float("inf")}}, "peft.rate"),
        ({"train_iters": 2**64}, "train_iters"),
        ({"train_iters": 5, "peft": 5}, "peft"),
        ({"train_iters": 5, "peft": {"names": "a"}}, "peft.names"),
        ({"train_iters": 5, "peft": {"names": [1]}}, "peft.names.0"),
        ({"train_iters": 5, "peft": {"dim": 13}}, "peft.dim"),
    ],
)
def test_strict_types(data, where):
    assert set(problems(data)) == {where}


def test_a_whole_number_is_a_number_and_aliases_count():
    config, notes = validate(Example, {"train_iters": 5, "peft": {"rate": 1}, "_target_": "x.y"})
    assert config.peft.rate == 1.0
    assert config.target == "x.y"
    assert notes == []
    assert "_taget_" in problems({"train_iters": 5, "_taget_": "x"})


def test_unknown_keys_may_be_let_through_with_a_note():
    _, notes = validate(Example, {"train_iters": 5, "model": {"a": 1}})
    assert notes == ["model: passed on"]


def test_the_right_key_in_the_wrong_place_is_pointed_to():
    assert problems({"train_iters": 5, "dim": 4})["dim"].hint == "Did you mean peft.dim?"


@pytest.mark.parametrize(
    ("variables", "key", "message"),
    [
        ({"HF_TOKEN": ["hf_hush"]}, "run.env.env_vars.HF_TOKEN", "a list is not text"),
        ({"DB": {"PASSWORD": "hush"}}, "run.env.env_vars.DB", "a mapping is not text"),
        (["HF_TOKEN=hf_hush"], "run.env.env_vars", "a list is not a mapping"),
        ("HF_TOKEN=hf_hush", "run.env.env_vars", "its value is not a mapping"),
        ({"API_KEY": 10**30}, "run.env.env_vars.API_KEY", "its value is too large"),
        ({"LEVEL": ["debug"]}, "run.env.env_vars.LEVEL", "['debug'] is not text"),
    ],
)
def test_a_value_under_the_name_of_a_secret_is_never_quoted(variables, key, message):
    assert problems({"train_iters": 1, "run": {"env": {"env_vars": variables}}})[key].what == message
    assert problems({"train_iters": {"hub_token": "hush"}})["train_iters"].what == "a mapping is not an integer"
