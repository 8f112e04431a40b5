"""`RewrittenGraph.host_values`: which pass took each value that the host read, and what refused it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import passes
from graphs.observation.eager_trace import trace_eager
from tests.passes.steps import flat, rewritten, traced

X = torch.linspace(-1, 1, 24).view(8, 3)
T = torch.tensor(3)
NUMBERS = torch.full((6,), 3)


def of_line(step: Callable[..., Any], values: tuple[passes.HostValue, ...], marker: str) -> passes.HostValue:
    """What became of the one value that is read in the line of ``step`` that ends in ``# marker``."""
    lines, first = inspect.getsourcelines(step)
    number = next(first + index for index, line in enumerate(lines) if line.rstrip().endswith(f"# {marker}"))
    (found,) = [value for value in values if value.read.site[1] == number]
    return found


def taken(value: passes.HostValue) -> set[str]:
    return {use.by for use in value.uses}


def by_every_rule(x: Tensor, t: Tensor) -> Tensor:
    place = int(t[0])  # place
    length = int(t[1])  # length
    scale = float(t[2])  # scale
    way = t[3].item()  # way
    both = int(t[4])  # both
    t[5].item()  # unused
    if way > 2:
        x = x + 1
    return x[place] * scale + x[:length].sum(0) + x[both] * both


@pytest.mark.parametrize(
    ("marker", "by"),
    [
        ("place", {"addressing"}),
        ("length", {"bounded"}),
        ("scale", {"arithmetic"}),
        ("way", {"branches"}),
        ("both", {"addressing", "arithmetic"}),
        ("unused", set[str]()),
    ],
)
@pytest.mark.parametrize("merge", [False, True])
def test_each_use_has_its_pass(marker: str, by: set[str], merge: bool) -> None:
    value = of_line(by_every_rule, rewritten(by_every_rule, X, NUMBERS, merge=merge).graph.host_values, marker)
    assert taken(value) == by and value.refusal is None
    assert value.read.value == 3


def test_a_use_names_its_operator_and_its_line() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        number = int(t)
        return x * torch.tensor([number])

    (value,) = rewritten(step, X, T).graph.host_values
    (use,) = value.uses
    line = inspect.getsourcelines(step)[1] + 2
    assert (use.by, use.operator, use.site) == ("arithmetic", "aten.scalar_tensor.default", (__file__, line))


def raised_to(x: Tensor, t: Tensor) -> Tensor:
    return x ** t.item()  # read


def without_a_rule(x: Tensor, t: Tensor) -> Tensor:
    return x[: int(t)].logcumsumexp(0).sum(0)  # read


def as_many_trips(x: Tensor, t: Tensor) -> Tensor:
    for _ in range(int(t)):  # read
        x = x + 1
    return x


@pytest.mark.parametrize("step", [raised_to, without_a_rule, as_many_trips])
def test_a_number_that_the_graph_assumes_is_a_matter_of_branches(step: Callable[..., Any]) -> None:
    value = of_line(step, rewritten(step, X.abs() + 1, T).graph.host_values, "read")
    assert "branches" in taken(value) and taken(value) <= {"branches", "addressing"}


def calculated_with(x: Tensor, t: Tensor) -> Tensor:
    half = float(t) / 2 + 0.25  # read
    return x * half


def test_what_is_calculated_of_a_number_is_a_use_of_it() -> None:
    assert taken(of_line(calculated_with, rewritten(calculated_with, X, T).graph.host_values, "read")) == {"arithmetic"}


def test_the_numbers_of_a_list_are_one_value() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        first, last, scale = t.tolist()
        return x[first] + x[:last].sum(0) * scale

    (value,) = rewritten(step, X, torch.tensor([1, 2, 3])).graph.host_values
    assert taken(value) == {"addressing", "bounded", "arithmetic"} and value.read.operator == "Tensor.tolist"


def read_twice(x: Tensor, t: Tensor) -> Tensor:
    place = int(t)  # first
    return x[place] * int(t)  # second


@pytest.mark.parametrize("marker", ["first", "second"])
def test_the_same_number_read_again_is_used_as_it_is(marker: str) -> None:
    value = of_line(read_twice, rewritten(read_twice, X, T).graph.host_values, marker)
    assert taken(value) == {"addressing", "arithmetic"}


def unbounded(x: Tensor, t: Tensor) -> Tensor:
    place = int(t[0])  # place
    length = int(t[1])  # length
    return x[place] + x.new_zeros(length).sum()


def test_a_refusal_says_what_it_refuses_and_what_was_taken_until_then() -> None:
    with pytest.raises(passes.NoBound) as raised:
        rewritten(unbounded, X, NUMBERS)
    place, length = (of_line(unbounded, raised.value.host_values, marker) for marker in ("place", "length"))
    assert taken(place) == {"addressing"} and place.refusal is None
    assert taken(length) == set() and isinstance(length.refusal, passes.NoBound)


def told(x: Tensor, t: Tensor) -> Tensor:
    place = int(t[0])  # place
    shown = int(t[1])  # shown
    row = x[place]
    print(f"row {shown}")
    return row * int(t[2])  # later


def test_a_step_that_no_graph_stands_for_is_looked_at_up_to_there() -> None:
    _, trace = trace_eager(lambda: told(X, NUMBERS), [X, NUMBERS])
    reads = [passes.Read(r.operator, r.frame, r.value, r.index, r.place, r.turn, r.source) for r in trace.reads]

    def step(leaves: Any, _: Any) -> list[Any]:
        return flat(told(*leaves))

    with pytest.raises(passes.Unremovable, match="its text needs the value"):
        passes.trace_step(step, [X, NUMBERS], reads, [__name__])
    graph = passes.trace_step(step, [X, NUMBERS], reads, [__name__], partial=True)
    assert graph.stopped is not None and "text" in graph.stopped.detail
    values = passes.remove_host_values(graph).host_values
    assert taken(of_line(told, values, "place")) == {"addressing"}
    shown = of_line(told, values, "shown")
    assert shown.refusal is graph.stopped and taken(shown) == set()
    assert len(values) == 2  # the trace did not come to the third


def test_what_asks_for_no_number_is_none() -> None:
    assert rewritten(lambda x, t: x * t, X, T).graph.host_values == ()
    assert passes.RewrittenGraph.unchanged(traced(lambda x, t: x * t, X, T)).host_values == ()
