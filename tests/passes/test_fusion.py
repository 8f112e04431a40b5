"""`passes.optimize.fuse_exact`: what is gathered, what stays where it is, and that nothing is computed differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import graphs.first_call.candidates
import passes
from graphs.compile.fused_region import CompiledRegion
from passes.core.traced_step import STORAGE, placeholders
from passes.optimize import bit_exact, fuse_exact
from tests.corpus import combined, experts, selection
from tests.corpus.case import RECORDED, Case
from tests.corpus.collection import CASES
from tests.corpus.running import check
from tests.passes.steps import printed, rewritten

aten = torch.ops.aten
HOMES = {module.__name__ for module in (combined, experts, selection)}


def fused(module: GraphModule) -> list[str]:
    """Fuse ``module``, with regions that are run as they are; returns the regions as text."""
    bodies: list[str] = []

    def make(body: GraphModule) -> GraphModule:
        bodies.append(printed(body))
        return body

    passes.run(module, [lambda module: passes.fuse_exact(module, make)])
    return bodies


def graph_of(step: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    return make_fx(step)(*inputs)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs are worth it."""
    monkeypatch.setattr(fuse_exact, "WORTH", 2)


AFTER = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
slice_tensor [8, 3] = slice.Tensor(arg0_1, 0, 0, 8, 1)
_pass_constant_0 [8] = get_attr(_pass_constant_0)
exact_0 = call_module(exact_0)
getitem [8] = <built-in function getitem>(exact_0, 0)
getitem_1 [] = <built-in function getitem>(exact_0, 1)
view_default [8, 1] = view.default(getitem, [8, 1])
masked_fill_scalar [8, 3] = masked_fill.Scalar(slice_tensor, view_default, 0)
sum_dim_int_list [3] = sum.dim_IntList(masked_fill_scalar, [0])
return [sum_dim_int_list, getitem_1]"""
REGION = """\
input_0 = placeholder(input_0)
input_1 = placeholder(input_1)
value_1 = add.Scalar(input_0, 1)
value_3 = ge.Tensor(input_1, value_1)
value_4 = ge.Scalar(value_1, 0)
value_5 = logical_not.default(value_4)
return [value_3, value_5]"""


def test_places_masks_and_conditions_become_one_region(any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_exact, "LARGEST", 8)
    module = rewritten(lambda x, t: x[: int(t) + 1].sum(0), torch.randn(8, 3), torch.tensor(4)).module
    assert fused(module) == [REGION]
    assert printed(module) == AFTER


def rounding(x: Tensor, n: Tensor) -> Tensor:
    return (x * x + x) * (n + 1).clamp(0, 5).gt(2)


def test_what_rounds_twice_is_not_compiled_together(any_size: None) -> None:
    module = graph_of(rounding, torch.randn(4), torch.arange(4))
    (region,) = fused(module)
    assert "mul.Tensor(input_0, input_0)" in region
    assert "add = add.Tensor(getitem, x_1)" in printed(module).replace(" [4]", "")


@pytest.mark.parametrize(
    ("step", "stays"),
    [
        (lambda x, n: ((x * x) > x).logical_and(n + 1 > 2), "gt.Tensor"),  # the product has more digits in a register
        (lambda x, n: (x / 3, (n + 1) * 2), "div.Tensor"),
        (lambda x, n: (x.to(torch.bfloat16), (n + 1) * 2), "_to_copy"),
        (lambda x, n: (x > 0.1, (n + 1) * 2), "gt.Scalar"),  # bfloat16 rounds 0.1, a register does not
        (lambda x, n: (x.exp(), (n + 1) * 2), "exp"),
        (lambda x, n: ((n.to(torch.uint8) + 200) > 255, (n + 1) * 2), "add.Tensor"),  # wraps in memory
        (lambda x, n: (torch.rand(4), (n + 1) * 2), "rand"),
    ],
    ids=["comparison of a product", "division", "narrower", "number", "exponential", "bytes", "random"],
)
def test_what_a_compiler_may_round_differently_stays(step: Callable[..., Any], stays: str, any_size: None) -> None:
    module = graph_of(step, torch.randn(4), torch.arange(4))
    fused(module)
    assert stays in printed(module)


def written_later(x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    before = n[1:] + 1, n * 2
    n.add_(1)
    return *before, n + 3


def test_what_reads_memory_that_is_written_stays_where_it_was(any_size: None) -> None:
    module = graph_of(written_later, torch.randn(4), torch.arange(4))
    assert fused(module) == []


def test_a_result_that_is_written_stays(any_size: None) -> None:
    def step(x: Tensor, n: Tensor) -> Tensor:
        made = n + 1
        made.add_(x.sum().to(torch.int64))
        return made * 2 - n.clamp(0, 3) + n * 5

    module, x, n = graph_of(step, torch.ones(4), torch.arange(4)), torch.ones(4), torch.arange(4)
    fused(module)
    assert torch.equal(module(x, n), step(x, n))


def test_few_operators_are_left_as_they_are() -> None:
    module = graph_of(lambda n: (n + 1) * 2, torch.arange(4))
    before = printed(module)
    assert fused(module) == [] and printed(module) == before


def test_views_of_results_are_views_of_the_regions_results(any_size: None) -> None:
    def step(n: Tensor) -> tuple[Tensor, ...]:
        grid = (n + 1).view(2, 2) * 2
        return grid.t(), grid[0] + 1, grid.sum()

    module = graph_of(step, torch.arange(4))
    (region,) = fused(module)
    made, wanted = module(torch.arange(4) * 7), step(torch.arange(4) * 7)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(made, wanted, strict=True))
    assert made[0].untyped_storage().data_ptr() != made[1].untyped_storage().data_ptr() and "t.default" not in region


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.expect == RECORDED and c.step.__module__ in HOMES], ids=lambda case: case.name
)
def test_a_fused_step_of_the_corpus_equals_eager(case: Case, any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.first_call.candidates, "_is_fused", lambda step: True)
    monkeypatch.setattr(graphs.first_call.candidates, "CompiledRegion", lambda body: body)
    check(case, "cpu")


OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a * b - 3,
    lambda a, b: torch.where(a < b, a, b),
    lambda a, b: a.index_select(0, b.remainder(4)),
    lambda a, b: a.clamp(-4, 4).maximum(b),
    lambda a, b: a.flip(0) + b.sum(),
    lambda a, b: a.view(2, 2).t().reshape(4),
    lambda a, b: a.view(2, 2)[0].repeat(2),
    lambda a, b: a[1:].cumsum(0).sum() + b,
    lambda a, b: a.add_(b),
    lambda a, b: a.view(2, 2)[1].mul_(2).repeat(2),
    lambda a, b: a.copy_(b),
    lambda a, b: a.index_put_([b.remainder(4)[:1]], b[:1] * 5),
    lambda a, b: (a.double() * 0.5 + b).floor().to(torch.int64),
]
programs = st.lists(
    st.tuples(st.sampled_from(range(len(OPERATIONS))), st.integers(0, 30), st.integers(0, 30)), min_size=3, max_size=14
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs, st.lists(st.integers(-9, 9), min_size=12, max_size=12))
def test_a_random_program_of_reads_writes_and_views_stays_the_same(
    any_size: None, program: list[tuple[int, int, int]], numbers: list[int]
) -> None:
    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        values = list(tensors)
        for operation, first, second in program:
            values.append(OPERATIONS[operation](values[first % len(values)], values[second % len(values)]))
        return tuple(value.clone() for value in values)

    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.tensor(numbers).view(3, 4).unbind())

    ours, theirs = (tuple(value.clone() for value in inputs()) for _ in range(2))
    module = graph_of(step, *(value.clone() for value in inputs()))
    for index, node in enumerate(placeholders(module)):
        node.meta[STORAGE] = index
    fused(module)
    for made, wanted in zip((*module(*ours), *ours), (*step(*theirs), *theirs), strict=True):
        assert torch.equal(made, wanted)


def test_a_region_is_compiled_once_for_all_that_are_like_it() -> None:
    def body() -> GraphModule:
        return make_fx(lambda n, m: ((n + m).clamp(0, 6), n < m))(torch.arange(6), torch.arange(6))

    first, second = CompiledRegion(body()), CompiledRegion(body())
    n, m = torch.arange(6), torch.tensor([3, -9, 4, 0, 5, 1])
    for region in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(region(n, m), region.body(n, m), strict=True))
    assert first._function is second._function


def test_a_region_that_cannot_be_compiled_runs_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    region = CompiledRegion(make_fx(lambda n: ((n * 5 - 3).remainder(7),))(torch.arange(5)))
    with pytest.warns(RuntimeWarning, match="run unfused: no compiler found"):
        (made,) = region(torch.arange(5))
    assert torch.equal(made, (torch.arange(5) * 5 - 3).remainder(7))
