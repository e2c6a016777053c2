"""YAML 1.2: what people write is what they get."""

from __future__ import annotations

import math

import pytest

from steps.config import yaml12
from steps.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:00:00", "12:00:00"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        (".5", 0.5),
        ("-3", -3),
        ("null", None),
        ("~", None),
        ("", ""),
        ("<<", "<<"),
        ("a: b #c", "a: b #c"),
        ("$(rm x)", "$(rm x)"),
    ],
)
def test_scalar(text: str, value: object) -> None:
    assert yaml12.scalar(text) == value
    assert type(yaml12.scalar(text)) is type(value)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(yaml12.scalar(".nan"))


def test_load_knows_the_line_of_every_key(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  iters: 5\n  list:\n    - x\n    - 12:00:00\n")
    data, lines = yaml12.load(path)
    assert data == {"train": {"iters": 5, "list": ["x", "12:00:00"]}}
    assert lines == {"train": 1, "train.iters": 2, "train.list": 3, "train.list.0": 4, "train.list.1": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a\.yaml:3: the key a is given twice"),
        ("x:\n  a: 1\n  a: 2\n", r"a\.yaml:3: the key x\.a is given twice"),
        ("- 1\n", "holds list, not a mapping"),
        ("a: [1\n", r"a\.yaml:2"),
        ("a: *nowhere\n", "undefined alias"),
        ("a: &x [*x]\n", "nested without end"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in ("ab", "bc", "cd", "de", "ef")),
            "more than 100,000 values",
        ),
    ],
)
def test_load_refuses(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        yaml12.load(path)


def test_load_of_nothing_is_empty_and_of_a_missing_file_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("# only a comment\n")
    assert yaml12.load(tmp_path / "a.yaml") == ({}, {})
    with pytest.raises(ConfigError, match="No such file"):
        yaml12.load(tmp_path / "b.yaml")


def test_anchors_and_merges_work(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &b {x: 1, y: 2}\nother:\n  <<: *b\n  y: 3\n")
    assert yaml12.load(path)[0]["other"] == {"x": 1, "y": 3}


def test_dump_is_read_back_the_same(tmp_path):
    data = {
        "a": ["12:00:00", "1e-4", "no", "~", "", "null", "1", 1, 1.5, 1e-7, True, None],
        "b": {"c": "x: y # z", "d": "line\nline", "e": "ünïcode", "f": "$(rm x) 'quoted' \"twice\""},
        "g": {},
        "h": [],
    }
    path = tmp_path / "a.yaml"
    path.write_text(yaml12.dump(data))
    assert yaml12.load(path)[0] == data
