"""`upper_bounds`: where upper bounds come from, what is promised by name, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import passes
from passes.core.facts import Facts
from passes.host_values.upper_bounds import Bounds
from tests.passes.steps import check, rewritten

U, V = sympy.Symbol("u", integer=True), sympy.Symbol("v", integer=True)


def facts(*conditions: sympy.Basic) -> Facts:
    made = Facts(FakeTensorMode())
    for condition in conditions:
        made.decide(condition, True, ("", 0))
    return made


@pytest.mark.parametrize(
    ("conditions", "expression", "largest"),
    [
        ((), U, None),
        ((), sympy.Integer(7), 7),
        ((U <= 9,), U, 9),
        ((U < 9,), U, 8),
        ((U >= 9,), U, None),
        ((sympy.Ge(9, U),), U, 9),
        ((2 * U + 1 <= 9,), U, 4),
        ((U <= 9,), 2 * U + 1, 19),
        ((U <= 9,), sympy.Max(U, 3) + 1, 10),
        ((), sympy.Min(U, 5), 5),
        ((U <= 4, V <= 5), U * V, 20),
        ((U + V <= 9,), U + V, 9),
        ((sympy.Eq(U, V), V <= 6), U, 6),
        ((V <= 6, sympy.Eq(V, U)), U, 6),
        ((U <= V, V <= 6), U, 6),
        ((sympy.And(U >= 0, U <= 3),), U, 3),
        ((sympy.Or(U <= 3, V <= 3),), U, None),
        ((U >= 0, sympy.Eq(sympy.Max(0, sympy.Min(8, U)), U)), U, 8),
        ((U <= 1 << 40,), U, None),
        ((U <= -3,), U, 0),
    ],
)
def test_the_largest_value_of_an_expression(conditions: tuple, expression: sympy.Basic, largest: int | None) -> None:
    assert Bounds(facts(*conditions)).of(expression) == largest


def test_a_count_needs_no_assumption() -> None:
    bounds = Bounds(facts())
    assert not bounds.certain(U <= 8)
    bounds.count(U, 8)
    assert bounds.of(U) == 8 and bounds.certain(U <= 8) and bounds.certain(sympy.And(U >= 0, 2 * U <= 16))
    assert not bounds.certain(U < 8) and not bounds.certain(U >= 1) and not bounds.certain(sympy.Eq(U, 8))


@pytest.mark.parametrize("condition", [U >= 0, sympy.Le(0, U), sympy.And(U >= 0, V <= 3)])
def test_what_is_assumed_of_signs_makes_expressions_shorter_but_is_not_forgotten(condition: sympy.Basic) -> None:
    bounds = Bounds(facts(condition))
    assert bounds.of_signs(sympy.Max(0, U)) == U
    assert bounds.of_signs(condition) == condition
    assert bounds.of_signs(sympy.Max(0, V)) == sympy.Max(0, V)


def test_a_limit_that_is_never_met_is_left_out() -> None:
    assert Bounds(facts(U <= 5)).simplified(sympy.Min(8, U)) == U
    assert Bounds(facts(U <= 9)).simplified(sympy.Min(8, U)) == sympy.Min(8, U)


def unbounded(x: Tensor, t: Tensor) -> Tensor:
    count = int(t)
    return torch.ones(count).sum() + x


def checked(x: Tensor, t: Tensor) -> Tensor:
    length = t.item()
    torch._check(length <= 16)
    return torch.ones(length).sum() + x


def from_its_use(x: Tensor, t: Tensor) -> Tensor:
    return (torch.ones(int(t)) * x[: int(t)]).sum()


def test_a_length_without_a_bound_is_named_with_what_to_pass() -> None:
    with pytest.raises(passes.Unremovable) as raised:
        rewritten(unbounded, torch.ones(4), torch.tensor(3))
    line = unbounded.__code__.co_firstlineno
    assert raised.value.operator == "size" and raised.value.site == (__file__, line + 2)
    assert raised.value.remedy == f'Pass bounds={{"test_bounds.py:{line + 1}": the largest value}}'
    assert "has no upper bound" in str(raised.value) and f"at {__file__}:{line + 2}" in str(raised.value)


@pytest.mark.parametrize("name", ["count", f"test_bounds.py:{unbounded.__code__.co_firstlineno + 1}"])
def test_a_promise_by_name_or_line_is_a_bound_and_is_checked(name: str) -> None:
    graph = rewritten(unbounded, torch.ones(4), torch.tensor(3), bounds={name: 6})
    for length in range(10):
        held = check(graph, unbounded, torch.ones(4), torch.tensor(length), may_break=True)
        assert held == (length <= 6)


def test_a_promise_that_the_step_itself_breaks_is_named() -> None:
    with pytest.raises(passes.Unremovable, match="does not keep to u0 <= 2") as raised:
        rewritten(unbounded, torch.ones(4), torch.tensor(3), bounds={"count": 2})
    assert raised.value.site == (__file__, unbounded.__code__.co_firstlineno + 1)


def test_a_promise_for_another_name_is_none() -> None:
    with pytest.raises(passes.Unremovable, match="no upper bound"):
        rewritten(unbounded, torch.ones(4), torch.tensor(3), bounds={"counts": 6, "x": 4})


@pytest.mark.parametrize(("step", "largest"), [(checked, 16), (from_its_use, 4)])
def test_a_bound_comes_from_what_the_step_requires(step: Callable[..., Tensor], largest: int) -> None:
    graph = rewritten(step, torch.ones(4), torch.tensor(3))
    for length in range(20):
        assert check(graph, step, torch.ones(4), torch.tensor(length), may_break=True) == (length <= largest)
