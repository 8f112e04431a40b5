"""Steps that add, take and exchange entries of containers that they are given: done once per call, and refused by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.report import RefusalCount

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings(f"ignore::{NotReplayed.__module__}.{NotReplayed.__name__}")


def adds(d: Any) -> Tensor:
    d["y"] = d["x"] * 2
    return d["y"]


def adds_a_number(d: Any) -> Tensor:
    d["n"] = d.get("n", 0) + 1
    return d["x"] * 2


def adds_a_container(d: Any) -> Tensor:
    d["in"] = {"a": d["x"]}
    return d["in"]["a"] * 2


def takes(d: Any) -> Tensor:
    return d.pop("x") * 2


def exchanges(d: Any) -> Tensor:
    d["x"] = d["x"] * 2
    return d["x"] + 1


def empties(d: Any) -> Tensor:
    y = d["x"] * 2
    d.clear()
    return y


def adds_inside(d: Any) -> Tensor:
    d["in"]["y"] = d["in"]["x"] * 2
    return d["in"]["y"]


def appends(items: Any) -> Tensor:
    items.append(items[0] * 2)
    return items[-1]


def sets_item(items: Any) -> Tensor:
    items[0] = items[0] * 2
    return items[0] + 1


def takes_last(items: Any) -> Tensor:
    return items.pop() * 2


def turns_round(items: Any) -> Tensor:
    items.reverse()
    return items[0] * 2


def deletes(items: Any) -> Tensor:
    del items[0]
    return items[0] * 2


def one(call: int) -> dict[str, Any]:
    return {"x": torch.full((2,), float(call))}


def two(call: int) -> list[Tensor]:
    return [torch.full((2,), float(call)), torch.full((2,), call + 5.0)]


STEPS: dict[str, tuple[Callable[[Any], Tensor], Callable[[int], Any], str]] = {
    "adds": (adds, one, "argument[0]['y']"),
    "adds to an ordered dict": (adds, lambda call: OrderedDict(one(call)), "argument[0]['y']"),
    "adds a number": (adds_a_number, one, "argument[0]['n']"),
    "adds a container": (adds_a_container, one, "argument[0]['in']"),
    "takes": (takes, one, "argument[0]['x']"),
    "exchanges": (exchanges, one, "argument[0]['x']"),
    "empties": (empties, one, "argument[0]['x']"),
    "adds inside": (adds_inside, lambda call: {"in": one(call)}, "argument[0]['in']['y']"),
    "appends": (appends, two, "argument[0][2]"),
    "sets an item": (sets_item, two, "argument[0][0]"),
    "takes the last": (takes_last, two, "argument[0][1]"),
    "turns round": (turns_round, two, "argument[0][0]"),
    "deletes": (deletes, two, "argument[0][0]"),
}


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", STEPS)
def test_a_changed_container_is_named_from_the_first_call_on(name: str, grad: Any) -> None:
    model, make, operator = STEPS[name]
    step = graphs.capture(model)
    with grad():
        for call in range(3):
            mine, other = make(call), make(call)
            assert torch.equal(step(mine), model(other))
            assert _listed(mine) == _listed(other)
    report = step.report()
    (refusal,) = report.refusals
    assert (refusal.reason, refusal.operator, refusal.count) == ("changing-value", operator, 3)
    assert (report.recordings, report.replays, report.eager_calls) == (0, 0, 3)


def test_a_container_that_only_the_first_call_adds_to_is_no_obstacle() -> None:
    done: list[bool] = []

    def model(d: Any) -> Tensor:
        if not done:
            d["first"] = True
            done.append(True)
        return d["x"] * 2

    step = graphs.capture(model)
    with torch.no_grad():
        given = [one(call) for call in range(3)]
        for d in given:
            assert torch.equal(step(d), d["x"] * 2)
    assert [list(d) for d in given] == [["x", "first"], ["x"], ["x"]]
    assert (step.report().replays, step.report().eager_calls) == (2, 1)


def test_a_call_that_initialises_has_its_reason_in_the_report() -> None:
    class Lazy(torch.nn.Module):
        scale: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.full((2,), 3.0)
            return x * self.scale

    step = graphs.capture(Lazy())
    with torch.no_grad():
        for _ in range(3):
            assert step(torch.ones(2)).tolist() == [3.0, 3.0]
    report = step.report()
    assert (report.replays, report.eager_calls) == (2, 1)
    assert _reasons(report.refusals) == [("changing-value", "self.scale", 1)]


def _reasons(refusals: tuple[RefusalCount, ...]) -> list[tuple[str, str, int]]:
    return [(refusal.reason, refusal.operator, refusal.count) for refusal in refusals]


def _listed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [(key, _listed(item)) for key, item in value.items()]
    return [_listed(item) for item in value] if isinstance(value, list) else value
