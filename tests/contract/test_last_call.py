"""The short way of recognising a call never takes one call for another."""

from __future__ import annotations

import sys
from collections import defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import graphs

Tensor = torch.Tensor
X, Y, W = torch.ones(2), torch.full((2,), 5.0), torch.full((2,), 7.0)


def step(x: Tensor, y: Tensor | None = None, z: Tensor | None = None, scale: Any = 1) -> Tensor:
    out = x * scale
    out = out if y is None else out + 2 * y
    return out if z is None else out + 10 * z


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "one": lambda f: f(X),
    "by position": lambda f: f(X, Y),
    "by name": lambda f: f(X, y=Y),
    "by another name": lambda f: f(X, z=Y),
    "both": lambda f: f(X, Y, W),
    "in order": lambda f: f(X, y=Y, z=W),
    "in the other order": lambda f: f(X, z=Y, y=W),
    "all by name": lambda f: f(x=X, y=Y),
    "a constant": lambda f: f(X, scale=2),
    "an equal constant of another type": lambda f: f(X, scale=2.0),
    "a constant by position": lambda f: f(X, None, None, 2),
    "true": lambda f: f(X, scale=True),
    "another shape": lambda f: f(X.repeat(2), y=Y.repeat(2)),
    "another dtype": lambda f: f(X.double(), y=Y),
    "the same tensor twice": lambda f: f(X, y=X),
}


@pytest.mark.parametrize("first", CALLS)
def test_a_call_after_another_gets_its_own_result(first: str) -> None:
    captured = graphs.capture(step)
    for second in CALLS:
        for _ in range(2):  # the second time, the call before is one that was replayed
            assert torch.equal(CALLS[first](captured), CALLS[first](step)), first
        assert torch.equal(CALLS[second](captured), CALLS[second](step)), f"{second} after {first}"
        assert CALLS[second](captured).dtype == CALLS[second](step).dtype


Pair = namedtuple("Pair", "left right")
CONTAINERS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "a list of one": lambda: ((new(), [new()]), {}),
    "a tuple of one": lambda: ((new(), (new(),)), {}),
    "a dict of one": lambda: ((new(), {"x": new()}), {}),
    "nothing but a dict of one": lambda: (({"x": new()},), {}),
    "by name": lambda: ((new(),), {"y": [new()]}),
    "beside None": lambda: ((new(), [new()], None), {}),
    "nested": lambda: ((new(), [[(new(),)]]), {}),
    "as many tensors as arguments, in one of them": lambda: (([], [new(), new()]), {}),
    "a named tuple with None": lambda: ((new(), Pair(new(), None)), {}),
    "an output of a model": lambda: ((new(), BaseModelOutput(last_hidden_state=new())), {}),
    "an output of a model with None": lambda: ((new(), BaseModelOutput(last_hidden_state=new(), hidden_states=None)), {"z": 3}),
    "a default dict": lambda: ((new(), defaultdict(list, x=new())), {}),
}


def new() -> Tensor:
    return torch.randn(3)


def total(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value * 2
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum((total(item) for item in items), torch.zeros(3))


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_one_tensor_are_replayed(name: str) -> None:
    def model(*args: Any, **kwargs: Any) -> Tensor:
        return total(args) + 3 * total(kwargs)

    captured = graphs.capture(model)
    for _ in range(2):
        args, kwargs = CONTAINERS[name]()
        for _ in range(3):  # the very same containers, and then others
            assert torch.equal(captured(*args, **kwargs), model(*args, **kwargs))
    assert captured.report().replays == 6


def test_a_known_call_enters_few_functions_before_and_after_the_replay() -> None:
    """Each costs a good tenth of a microsecond at every call: one that is added here has to be worth it."""
    captured = graphs.capture(step)
    entered: list[str] = []

    def enter(frame: Any, event: str, _: Any) -> None:
        name, module = frame.f_code.co_name, str(frame.f_globals.get("__name__"))
        if event == "call" and module.startswith("graphs.dispatch.") and "<" not in name:
            entered.append(name)

    for _ in range(3):
        captured(X, y=Y)
    sys.setprofile(enter)
    try:
        captured(X, y=Y)
    finally:
        sys.setprofile(None)
    assert captured.report().replays == 4
    assert entered == ["__call__", "call", "_serve", "match", "_plain", "_replay", "stale", "replayed"]
