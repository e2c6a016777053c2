"""Which values of a configuration become absolute paths, and which stay as they are."""

from __future__ import annotations

import pytest
from support.steps import fake_step

from steps.dispatch.compose import compose
from steps.dispatch.places import absolute


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("output/tiny/packed", "/work/output/tiny/packed"),
        ("./here", "/work/here"),
        ("name", "/work/name"),
        ("/data/chats", "/data/chats"),
        ("~/chats", "~/chats"),
        ("chats/*.jsonl", "/work/chats/*.jsonl"),
        ("it's $(rm x)", "/work/it's $(rm x)"),
        ("", ""),
        (None, None),
        (7, 7),
    ],
)
def test_a_path_starts_at_the_workspace(value, expected):
    assert absolute({"a": {"b": value}}, ["a.b"], [], "/work", visible=False) == {"a": {"b": expected}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("./gpt2", "/work/gpt2"),
        ("models/tiny/base", "/work/models/tiny/base"),
        ("{% for message in messages %}{% endfor %}", "{% for message in messages %}{% endfor %}"),
    ],
)
def test_what_may_be_a_hub_id_or_text_is_left_alone_when_it_looks_like_one(value, expected):
    assert absolute({"model": value}, [], ["model"], "/work", visible=False) == {"model": expected}


def test_where_the_files_can_be_seen_looking_decides(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    data = {"model": "org/model", "other": "org/another"}
    seen = absolute(data, [], ["model", "other"], str(tmp_path), visible=True)
    assert seen == {"model": str(tmp_path / "org/model"), "other": "org/another"}


def test_keys_that_are_not_there_and_the_given_data_stay_as_they_are():
    data = {"a": {"b": "c"}}
    assert absolute(data, ["x.y", "a.b.c"], ["z"], "/work", visible=True) == data
    absolute(data, ["a.b"], [], "/work", visible=True)
    assert data == {"a": {"b": "c"}}


def test_the_jobs_own_variables_are_what_a_configuration_sees(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS_TEST_DIR", "of the shell")
    step = fake_step(
        tmp_path,
        default="data: ${oc.env:STEPS_TEST_DIR}\n"
        "run: {env: {env_vars: {STEPS_TEST_DIR: '${oc.env:STEPS_TEST_DIR}/of the job'}}}\n",
    )
    composed = compose(step, "default")
    assert composed.data["data"] == "of the shell/of the job"
    assert composed.data["run"]["env"]["env_vars"]["STEPS_TEST_DIR"] == "of the shell/of the job"


@pytest.mark.parametrize(
    ("value", "hidden"),
    [
        ("${oc.env:ANY}", True),
        ("${oc.env:ANY,''}", True),
        ("${oc.env:ANY,/home/${oc.env:USER}/x}", True),
        ("/scratch/${oc.env:USER}/out", False),
        ("${oc.env:NOT_SET,/lustre/hf}", False),
        ("${oc.env:NOT_SET,${oc.env:ANY}}", True),
        ("postgres://ada:${oc.env:DB_PASSWORD}@host", True),
        ("https://x:${run.env.env_vars.MY_TOKEN}@host", True),
        ("${a}", False),
        ("plain", False),
    ],
)
def test_a_variable_that_is_handed_on_from_the_environment_may_be_a_secret(tmp_path, monkeypatch, value, hidden):
    monkeypatch.setenv("ANY", "thing")
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("DB_PASSWORD", "hush")
    monkeypatch.delenv("NOT_SET", raising=False)
    variables = f'      NAME: "{value}"\n      MY_TOKEN: hush\n'
    step = fake_step(tmp_path, default=f"a: 1\nrun:\n  env:\n    env_vars:\n{variables}")
    assert ("NAME" in compose(step, "default").from_environment) is hidden
