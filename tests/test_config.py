"""Settings: every value that is not legal is named with the legal ones."""

from typing import Any

import pytest

import graphs
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
    ],
)
def test_an_illegal_setting_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as raised:
        graphs.capture(lambda x: x, **{name: value})
    assert "must be" in str(raised.value)


def test_a_padding_of_an_unknown_kind_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match="repeat"):
        graphs.Padding("reflect")
