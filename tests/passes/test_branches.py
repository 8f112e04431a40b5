"""`passes.speculation.speculate`: golden graphs of assumptions, flags that tell when they fail, writes that are taken back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import passes
from tests.passes.steps import check, printed, rewritten, traced

aten = torch.ops.aten
Step = Callable[..., Tensor]


def two_ways(x: Tensor, t: Tensor) -> Tensor:
    if t.item() > 2:
        return x * 2
    return x * 3


BEFORE = """\
arg0_1 [3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
_local_scalar_dense = _local_scalar_dense.default(arg1_1)
mul [3] = mul.Tensor(arg0_1, 2)
return [mul]"""
AFTER = """\
arg0_1 [3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
mul [3] = mul.Tensor(arg0_1, 2)
gt_scalar [] = gt.Scalar(arg1_1, 2)
logical_not_default [] = logical_not.default(gt_scalar)
return [mul, logical_not_default]"""


def test_the_graphs_before_and_after() -> None:
    arguments = torch.ones(3), torch.tensor(5)
    assert printed(traced(two_ways, *arguments)) == BEFORE
    graph = rewritten(two_ways, *arguments)
    assert printed(graph.module) == AFTER and graph.assumes
    assert graph.graph.results == 1 and graph.graph.undo == ()


@pytest.mark.parametrize("taken", [5, 1])
@pytest.mark.parametrize("value", [-1, 2, 3, 7])
def test_the_flag_is_the_way_that_was_not_taken(taken: int, value: int) -> None:
    graph = rewritten(two_ways, torch.ones(3), torch.tensor(taken))
    held = check(graph, two_ways, torch.ones(3), torch.tensor(value), may_break=True)
    assert held == ((value > 2) == (taken > 2))


def test_an_assumption_is_refused_where_nothing_checks_it() -> None:
    with pytest.raises(passes.Unremovable, match="would assume that u0 > 2") as raised:
        rewritten(two_ways, torch.ones(3), torch.tensor(5), only=["addressing", "arithmetic", "bounded"])
    assert raised.value.site == (__file__, two_ways.__code__.co_firstlineno + 1)
    assert '"branches"' in raised.value.remedy


def test_what_holds_for_any_data_is_not_checked() -> None:
    def step(x: Tensor, m: Tensor) -> Tensor:
        count = int(m.sum() * 0 + m.nonzero().shape[0])
        return x * 2 if m.nonzero().shape[0] <= 3 else x * count

    assert not rewritten(step, torch.ones(3), torch.ones(3, dtype=torch.bool)).assumes


def rows(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache.index_copy_(0, torch.stack([t, t + 1]) % 6, x[:2])


def sums(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache.index_add_(0, torch.stack([t, t]) % 6, x[:2])


def places(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache[t % 6, torch.tensor([0, 2])] = x[0, :2]


def columns(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache[:, int(t) % 3] += 1


def a_view(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache[2:4].mul_(2)


def a_row(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache[int(t) % 6] = x[0]


def a_prefix(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache[: int(t) % 6] += 1


def masked(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache[cache[:, 0] > t] = 9.0


def everything(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache.zero_()


def scattered(cache: Tensor, x: Tensor, t: Tensor) -> None:
    cache.scatter_(0, (t % 6).expand(1, 3), x[:1])


WRITES = [rows, sums, places, columns, a_view, a_row, a_prefix, masked, everything, scattered]


def writing(plan: list[Callable[[Tensor, Tensor, Tensor], None]]) -> Step:
    """A step that writes in several ways, before and after it decides something."""

    def step(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
        for write in plan[::2]:
            write(cache, x, t)
        scale = 2.0 if t.item() < 4 else 3.0
        for write in plan[1::2]:
            write(cache, x, t)
        return cache.sum() * scale

    return step


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(WRITES), min_size=1, max_size=5),
    st.integers(0, 3),
    st.lists(st.integers(0, 8), min_size=3, max_size=3),
)
def test_every_byte_is_put_back_where_an_assumption_failed(
    plan: list[Callable[[Tensor, Tensor, Tensor], None]], taken: int, values: list[int]
) -> None:
    cache, x = torch.randn(6, 3), torch.randn(3, 3)
    step = writing(plan)
    graph = rewritten(step, cache, x, torch.tensor(taken))
    for value in values:
        held = check(graph, step, cache, x, torch.tensor(value), exact=False, may_break=True)
        assert held == (value < 4)


@pytest.mark.parametrize("write", [rows, sums, places, columns, a_row])
def test_only_the_rows_that_are_written_are_saved(write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    graph = rewritten(writing([write]), torch.randn(6, 3), torch.randn(3, 3), torch.tensor(1))
    assert not any(node.target is aten.clone.default for node in graph.module.graph.nodes)
    assert all(undo.dim is not None for undo in graph.graph.undo)


def test_what_the_step_makes_itself_is_not_saved() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        y = x.clone()
        y[0] = 1.0
        return y.mul_(2) if t.item() > 0 else y

    graph = rewritten(step, torch.ones(3), torch.tensor(1))
    assert graph.assumes and graph.graph.undo == ()


def test_ways_inside_of_ways_are_told_apart() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        if t[0].item() > 0:
            return x + 1 if t[1].item() > 0 else x + 2
        return x + 3

    arguments = torch.zeros(2), torch.tensor([1, -1])
    graph = rewritten(step, *arguments)
    for first in (-1, 1):
        for second in (-1, 1):
            held = check(graph, step, torch.zeros(2), torch.tensor([first, second]), may_break=True)
            assert held == ((first, second) == (1, -1))


def test_a_value_is_that_of_the_line_that_read_it() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        before = t.item()
        t.add_(1)
        return x * 2 if before > 2 else x * t.item()

    graph = rewritten(step, torch.ones(2), torch.tensor(1))
    for value in range(5):
        assert check(graph, step, torch.ones(2), torch.tensor(value), may_break=True) == (value <= 2)


def test_a_flag_and_a_chain_of_conditions() -> None:
    def step(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
        if (t > 0).all() and not (u.item() and t[0].item() < 5):
            return x * 2
        return x * 3

    arguments = torch.ones(2), torch.tensor([7, 1]), torch.tensor(True)
    graph = rewritten(step, *arguments)
    for t in ([7, 1], [7, -1], [3, 1], [5, 2]):
        for u in (True, False):
            check(graph, step, torch.ones(2), torch.tensor(t), torch.tensor(u), may_break=True)
