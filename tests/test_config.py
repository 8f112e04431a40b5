"""Settings: every value that is not legal is named with the legal ones."""

import inspect
import re
from typing import Any

import pytest
import torch

import graphs
from graphs import config, environment
from graphs.config import PASSES
from graphs.environment import VARIABLES
from graphs.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "fast"),
        ("mode", 1),
        ("buckets", []),
        ("buckets", [0]),
        ("buckets", [1.5]),
        ("buckets", [True]),
        ("buckets", "1,2"),
        ("buckets", 5),
        ("batch_dims", ["x"]),
        ("batch_dims", {"x": "0"}),
        ("padding", "repeat"),
        ("padding", {"x": "reflect"}),
        ("padding", {"x": None}),
        ("static", "x"),
        ("static", 3),
        ("outputs", "mine"),
        ("verify", True),
        ("strict", "no"),
        ("max_recordings", 0),
        ("max_recordings", 2.0),
        ("passes", "on"),
        ("passes", 5),
        ("passes", ["adressing"]),
        ("passes", [1]),
        ("passes", {"bounded": True, "merging": False}),
        ("bounds", ["n"]),
        ("bounds", "n"),
        ("bounds", {"n": 0}),
        ("bounds", {"n": -4}),
        ("bounds", {"n": 4.0}),
        ("bounds", {"n": True}),
        ("bounds", {"n": "4"}),
        ("bounds", {4: 4}),
    ],
)
def test_an_illegal_setting_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as raised:
        graphs.capture(lambda x: x, **{name: value})
    assert "must be" in str(raised.value)


@pytest.mark.parametrize("value", ["on", ["adressing"]])
def test_an_unknown_pass_is_named_with_those_there_are(value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        graphs.capture(lambda x: x, passes=value)
    assert all(repr(name) in str(raised.value) for name in PASSES)


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        (None, None, PASSES),
        ("auto", "off", PASSES),
        ("off", None, ()),
        (None, "off", ()),
        (["bounded", "branches"], "off", ("bounded", "branches")),
        ((), None, ()),
    ],
)
def test_an_argument_beats_the_environment(
    given: Any, variable: str | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("GRAPHS_PASSES", variable)
    assert graphs.capture(lambda x: x, passes=given)._graphs_recordings.config.passes == expected


def test_an_illegal_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHS_PASSES", "some")
    with pytest.raises(ConfigError, match="GRAPHS_PASSES"):
        graphs.capture(lambda x: x)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("GRAPHS_MODES", "GRAPHS_MODE"),
        ("GRAPHS_BUCKET", "GRAPHS_BUCKETS"),
        ("GRAPHS_MAX_RECORDING", "GRAPHS_MAX_RECORDINGS"),
        ("GRAPHS_COMPILE", "GRAPHS_COMPILER"),
        ("GRAPHS_WOA", "GRAPHS_WO_A"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest(name: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    for use in (lambda: graphs.capture(lambda x: x), lambda: graphs.GroupedProjection(torch.zeros(1, 128, 128))):
        with pytest.raises(ConfigError, match=rf"{name} = '1' is not legal.* nearest is {nearest}\."):
            use()


def test_every_variable_that_is_read_is_a_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    read = set(
        re.findall(
            r'"(GRAPHS_[A-Z_]+)"', inspect.getsource(environment).partition("_TRUE, _FALSE")[2] + inspect.getsource(config)
        )
    )
    assert read - {"GRAPHS_"} == set(VARIABLES)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRAPH_MODE", "another program's")
    graphs.capture(lambda x: x)


def test_a_padding_of_an_unknown_kind_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match="repeat"):
        graphs.Padding("reflect")
