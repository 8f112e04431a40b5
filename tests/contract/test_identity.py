"""Identity and nothing else: an equal object in the place of another does not hold."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphs.contract.identity import identity_check
from graphs.contract.steering import WINDOW, Steering


class Equal:
    """Says that it equals everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Node:
    def __init__(self) -> None:
        self.value = Equal()


def links_of(*containers: tuple[Any, Any]) -> list[tuple[Any, Any, Any]]:
    return [(container, key, container[key]) for container, key in containers]


CONTAINERS: dict[str, tuple[Any, Any]] = {
    "dict": ({"a": Equal()}, "a"),
    "attributes": (vars(Node()), "value"),
    "list": ([0, Equal()], 1),
    "negative index": ([Equal(), 0], -2),
    "deque": (deque([Equal()]), 0),
    "key of another type": ({("a", 1): Equal()}, ("a", 1)),
    "key that needs quoting": ({"it's\n": Equal()}, "it's\n"),
    "subclass of str as key": ({type("Name", (str,), {"__repr__": lambda self: "!"})("a"): Equal()}, "a"),
    "tensor": ({"a": torch.ones(1)}, "a"),
    "none": ({"a": None}, "a"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_another_object_or_none_at_all_does_not_hold(name: str) -> None:
    container, key = CONTAINERS[name]
    before = container[key]
    check = identity_check(links_of((container, key)))
    assert check()
    container[key] = Equal()
    assert not check()
    container[key] = before
    assert check()
    container.clear()
    assert not check()


def test_no_links_hold() -> None:
    assert identity_check(())()


@given(st.integers(1, 40), st.data())
def test_any_one_of_many_links_is_seen(count: int, data: st.DataObject) -> None:
    shared = Equal()
    containers: list[Any] = [{"x": shared, "y": Equal()} if index % 2 else [Equal(), shared] for index in range(count)]
    places = [(container, key) for container in containers for key in (container if type(container) is dict else range(2))]
    check = identity_check(links_of(*places))
    container, key = data.draw(st.sampled_from(places))
    container[key] = Equal()
    assert not check()


@pytest.mark.parametrize("count", [1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_a_steering_value_is_looked_at_within_a_round_of_windows(count: int) -> None:
    settings = {f"s{index}": 1000.0 + index for index in range(count)}
    steering = Steering([(f"self.{key}", settings, key, value) for key, value in settings.items()])
    settings["s0"] = float(str(settings["s0"]))  # equal, and another object
    rounds = -(-count // WINDOW)
    assert [steering.changed() for _ in range(2 * rounds)] == [None] * 2 * rounds
    settings[f"s{count - 1}"] = 2.0
    found = [change for change in (steering.changed() for _ in range(rounds)) if change is not None]
    assert [(change.path, change.after) for change in found] == [(f"self.s{count - 1}", "2.0")]
    del settings[f"s{count - 1}"]
    assert [change.after for _ in range(rounds) if (change := steering.changed()) is not None] == ["absent"]


def test_a_flag_that_becomes_a_number_has_changed() -> None:
    settings = {"flag": True}
    steering = Steering([("self.flag", settings, "flag", True)])
    settings["flag"] = 1
    assert steering.changed() is not None
