"""Layers, inheritance, interpolation, and where each value came from."""

from __future__ import annotations

import pytest
from support.steps import fake_step

from steps.dispatch.compose import Composed, compose, settle
from steps.errors import ConfigError, ExecutorError


def environment(**values) -> Composed:
    return Composed({"run": {"env": values}}, {f"run.env.{key}": "profile p" for key in values})


def test_layers_weakest_first(tmp_path):
    step = fake_step(
        tmp_path,
        default="train:\n  iters: 100\n  list: [a, b]\nname: x\n",
        tiny="defaults: default\ntrain:\n  iters: 5\n  list: [c]\n",
    )
    composed = compose(step, "tiny", ["train.iters=7"], environment(nodes=2))
    assert composed.data == {"train": {"iters": 7, "list": ["c"]}, "name": "x", "run": {"env": {"nodes": 2}}}
    assert composed.sources["train.iters"] == "command line"
    assert composed.sources["train.list"] == "tiny.yaml:4"
    assert composed.sources["name"] == "default.yaml:4"
    assert composed.sources["run.env.nodes"] == "profile p"


def test_dotlist_wins_over_the_profile(tmp_path):
    step = fake_step(tmp_path, default="a: 1\n")
    composed = compose(step, "default", ["run.env.time=12:00:00"], environment(time="4:00:00"))
    assert composed.data["run"]["env"]["time"] == "12:00:00"


def test_a_users_overlay_may_name_a_shipped_config_and_a_neighbour(tmp_path):
    step = fake_step(tmp_path / "step", default="a: 1\nb: 1\nc: 1\n")
    (tmp_path / "other.yaml").write_text("b: 2\nc: 2\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [default, other, _self_]\nc: 3\n")
    composed = compose(step, str(mine))
    assert composed.data == {"a": 1, "b": 2, "c": 3}
    assert composed.sources == {"a": "default.yaml:1", "b": "other.yaml:1", "c": "mine.yaml:2"}


def test_an_overlay_named_like_a_shipped_config_inherits_from_the_shipped_one(tmp_path):
    step = fake_step(tmp_path / "step", default="a: 1\n")
    mine = tmp_path / "default.yaml"
    mine.write_text("defaults: default\nb: 2\n")
    assert compose(step, str(mine)).data == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            {"default": "defaults: tiny\n", "tiny": "defaults: default\n"},
            "round in a circle: default.yaml -> tiny.yaml",
        ),
        ({"default": "defaults: nowhere\n"}, "neither a file beside default.yaml nor a config"),
        ({"default": "defaults: {a: b}\n"}, "a name or a list of names"),
        ({"default": "defaults: [_self_, x]\n"}, "can only come last"),
    ],
)
def test_bad_inheritance(tmp_path, configs, message):
    with pytest.raises(ConfigError, match=message):
        compose(fake_step(tmp_path, **configs), "default")


def test_unknown_config_names_what_there_is(tmp_path):
    step = fake_step(tmp_path, default="a: 1\n", tiny="a: 1\n")
    with pytest.raises(ConfigError, match=r"no config 'tny'.*default, tiny.*Did you mean tiny"):
        compose(step, "tny")
    with pytest.raises(ConfigError, match="no file"):
        compose(step, "not/here.yaml")


def test_interpolations_resolve(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS_TEST_DIR", "/data")
    step = fake_step(
        tmp_path,
        default="a: 1\nb: ${a}\nc: ${oc.env:STEPS_TEST_DIR}/x\nd: ${oc.env:STEPS_NOT_SET,fallback}\n"
        "e: ['${a}', {f: '${oc.env:STEPS_TEST_DIR}'}]\ng: ${steps.package_file:steps,py.typed}\nh: ${e}\n",
    )
    data = compose(step, "default").data
    assert data["b"] == 1
    assert data["c"] == "/data/x"
    assert data["d"] == "fallback"
    assert data["e"] == [1, {"f": "/data"}] == data["h"]
    assert data["g"].endswith("steps/py.typed")


def test_every_interpolation_that_does_not_resolve_is_reported(tmp_path):
    step = fake_step(
        tmp_path,
        default="a: ${nowhere}\nb:\n  - ${oc.env:STEPS_NOT_SET}\nc: ${steps.package_file:no_such_package,x}\nd: fine\n",
    )
    with pytest.raises(ConfigError) as caught:
        compose(step, "default")
    assert [problem.where for problem in caught.value.problems] == ["a", "b.0", "c"]
    assert [problem.source for problem in caught.value.problems] == [
        "default.yaml:1",
        "default.yaml:3",
        "default.yaml:4",
    ]
    assert "no_such_package is not installed" in caught.value.problems[2].what
    told = str(caught.value.problems[1])
    assert told.startswith("b.0: the variable STEPS_NOT_SET is not set (from default.yaml:3). export STEPS_NOT_SET=…")


@pytest.mark.parametrize("text", ["${oc.env:STEPS_NOT_SET}", "/lustre/${oc.env:STEPS_NOT_SET}/out"])
def test_a_variable_that_is_not_set_is_told_in_the_same_words_however_it_was_resolved(tmp_path, text):
    with pytest.raises(
        ConfigError, match=r"^a: the variable STEPS_NOT_SET is not set \(from default.yaml:1\)\. export"
    ):
        compose(fake_step(tmp_path, default=f"a: {text}\n"), "default")


def test_what_is_still_to_be_filled_in_is_told_at_once_and_before_anything_else(tmp_path):
    step = fake_step(tmp_path, default="a: ${nowhere}\nb: <data>\n")
    given = environment(account="<account>", mounts=["<a:b>", "/c:/c"], env_vars={"BOS": "<s>"}, time="<time>")
    with pytest.raises(ExecutorError) as caught:
        compose(step, "default", ["run.env.time=1:00:00"], given)
    assert str(caught.value).splitlines() == [
        "run.env.account: <account> is still to be filled in (from profile p)",
        "run.env.mounts.0: <a:b> is still to be filled in",
    ]


@pytest.mark.parametrize(
    ("key", "text", "name"),
    [
        ("run.env.comment", "${oc.env:DB_PASSWORD}", "DB_PASSWORD"),
        ("run.env.startup_commands", ["true", "login ${oc.env:DB_PASSWORD} now"], "DB_PASSWORD"),
        ("a", "x-${oc.env:DB_PASSWORD,none}", "DB_PASSWORD"),
        ("a", "${run.env.env_vars.MY_TOKEN}", "MY_TOKEN"),
        ("a", "${oc.env:NOT_SET_TOKEN,none}", ""),
        ("a", "${oc.env:STEPS_TEST_DIR}", ""),
        ("run.env.identity", "${oc.env:SSH_KEY}", ""),
        ("run.env.env_vars.PG", "u:${oc.env:DB_PASSWORD}", ""),
    ],
)
def test_where_a_secret_variable_would_stand_in_the_open(tmp_path, monkeypatch, key, text, name):
    for variable in ("DB_PASSWORD", "SSH_KEY", "STEPS_TEST_DIR"):
        monkeypatch.setenv(variable, "hush")
    monkeypatch.delenv("NOT_SET_TOKEN", raising=False)
    data: dict = {"run": {"env": {"env_vars": {"MY_TOKEN": "hush"}}}}
    *above, last = key.split(".")
    place = data
    for part in above:
        place = place[part]
    place[last] = text
    composed = Composed(data)
    settle(composed)
    exposed = f"{key}.1" if isinstance(text, list) else key
    assert composed.exposed == ({exposed: name} if name else {})


def test_broken_grammar_is_told_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"b: .*grammar is broken"):
        compose(fake_step(tmp_path, default="a: 1\nb: ${oc.env\n"), "default")


def test_dollar_without_brace_is_data(tmp_path):
    assert compose(fake_step(tmp_path, default="a: $(rm x) $HOME\n"), "default").data == {"a": "$(rm x) $HOME"}


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:STEPS_TEST_DIR}",
        "${oc.env:STEPS_TEST_DIR,other}",
        "${oc.env:STEPS_NOT_SET,a/b-c.d}",
        "${oc.env:STEPS_NOT_SET,output/default/base}",
        "${steps.package_file:steps,py.typed}",
    ],
)
def test_the_quick_way_of_resolving_agrees_with_omegaconf(tmp_path, monkeypatch, text):
    monkeypatch.setenv("STEPS_TEST_DIR", "/data 1")
    quick = compose(fake_step(tmp_path, default=f"a: {text}\n"), "default").data
    # Another value that only OmegaConf can read sends both through it.
    slow = compose(fake_step(tmp_path, default=f"a: {text}\nb: 1\nc: x${{b}}\n"), "default").data
    assert quick["a"] == slow["a"]
    assert slow["c"] == "x1"
