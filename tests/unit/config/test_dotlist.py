"""Overrides: each form does what it says or is refused."""

from __future__ import annotations

import pytest

from steps.config import dotlist
from steps.errors import ConfigError, UsageError


def applied(data, *texts):
    sources = {"a": "tiny.yaml:1", "a.b": "tiny.yaml:2", "list.0": "tiny.yaml:3"}
    dotlist.apply(data, sources, dotlist.parse(texts))
    return data, sources


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a.b=5"], {"a": {"b": 5}, "list": ["x", "y"]}),
        (["+a.c=5"], {"a": {"b": 1, "c": 5}, "list": ["x", "y"]}),
        (["++a.b=5"], {"a": {"b": 5}, "list": ["x", "y"]}),
        (["~a.b"], {"a": {}, "list": ["x", "y"]}),
        (["~a"], {"list": ["x", "y"]}),
        (["list.0=z"], {"a": {"b": 1}, "list": ["z", "y"]}),
        (["list[1]=z"], {"a": {"b": 1}, "list": ["x", "z"]}),
        (["list.2=z"], {"a": {"b": 1}, "list": ["x", "y", "z"]}),
        (["~list.0"], {"a": {"b": 1}, "list": ["y"]}),
        (["list=[1, no]"], {"a": {"b": 1}, "list": [1, "no"]}),
        (["a={b: 12:00:00}"], {"a": {"b": "12:00:00"}, "list": ["x", "y"]}),
        (["a.b="], {"a": {"b": ""}, "list": ["x", "y"]}),
        (["a.b=null"], {"a": {"b": None}, "list": ["x", "y"]}),
        (["a.b=x=y"], {"a": {"b": "x=y"}, "list": ["x", "y"]}),
        (["a.b='5'"], {"a": {"b": "5"}, "list": ["x", "y"]}),
        (["new.deep.key=1", "new.deep.key=2"], {"a": {"b": 1}, "list": ["x", "y"], "new": {"deep": {"key": 2}}}),
    ],
)
def test_apply(texts, expected):
    assert applied({"a": {"b": 1}, "list": ["x", "y"]}, *texts)[0] == expected


def test_sources_follow():
    _, sources = applied({"a": {"b": 1}, "list": ["x"]}, "a.b=5", "~list")
    assert sources == {"a": "tiny.yaml:1", "a.b": "command line"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("list.5=z", "list has 2 items"),
        ("list.x=z", "no index"),
        ("a.b.c=1", "a.b is a plain value"),
        ("~a.zzz", "no such key to delete"),
        ("+a.b=2", "exists already"),
    ],
)
def test_what_does_not_fit_is_a_config_error(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        applied({"a": {"b": 1}, "list": ["x", "y"]}, text)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["dryrun", "a..b=1", "=1", "a b=1", "~a=1", "a=[1, 2", "a='x", "list[x]=1"])
def test_malformed_is_a_usage_error(text):
    with pytest.raises(UsageError) as caught:
        dotlist.parse([text])
    assert caught.value.exit_code == 2


def test_all_malformed_are_reported_together():
    with pytest.raises(UsageError) as caught:
        dotlist.parse(["one", "two", "a=1"])
    assert [problem.where for problem in caught.value.problems] == ["one", "two"]
