"""`passes.host_values.rules.arithmetic` against eager, bit for bit: every operator, dtype and value, in Python and on tensors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import passes
from tests.passes.steps import OLDER, Rewritten, check, printed, rewritten, traced

Body = Callable[[Tensor, Any], Any]
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE = (torch.int64, torch.int32, torch.uint8)
DTYPES = (*FLOATING, *WHOLE, torch.bool)

BINARY: dict[str, Body] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "gt", "le", "eq", "ne")},
    "sub from": lambda x, u: u - x,
    "divide": lambda x, u: u / x,
    "divide down": lambda x, u: torch.div(x, u, rounding_mode="floor"),
    "divide towards zero": lambda x, u: torch.div(x, u, rounding_mode="trunc"),
    "fmod": lambda x, u: torch.fmod(x, u),
    "add in place": lambda x, u: x.add_(u),
    "multiply in place": lambda x, u: x.mul_(u),
    "divide in place": lambda x, u: x.div_(u),
    "scaled sum": lambda x, u: torch.add(x, x, alpha=u),
    "scaled difference in place": lambda x, u: x.sub_(x.clone(), alpha=u),
    "clamp": lambda x, u: x.clamp(max=u),
    "clamp both": lambda x, u: x.clamp(u, 3),
    "fill": lambda x, u: x.fill_(u),
    "full": lambda x, u: torch.full((3,), u, dtype=x.dtype),
    "full of its own dtype": lambda x, u: torch.full((3,), u),
    "full like": lambda x, u: torch.full_like(x, u),
    "a tensor of it": lambda x, u: torch.tensor(u) + x,
    "a tensor of a list": lambda x, u: torch.tensor([u, 1]) * 2,
    "where": lambda x, u: torch.where(x > 0, u, x),
    "where not": lambda x, u: torch.where(x > 0, x, u),
    "masked fill": lambda x, u: x.masked_fill(x > 0, u),
    "masked fill in place": lambda x, u: x.masked_fill_(x > 0, u),
    "compared by a tensor": lambda x, u: torch.eq(x, u) | torch.ge(x, u),
    "largest": lambda x, u: torch.maximum(x, torch.full_like(x, u)),
}
ROUNDED_TWICE = ("scaled sum", "scaled difference in place")
"""In float64, for which there is nothing wider that the sum could be done in."""
PYTHON: dict[str, Body] = {
    "sum": lambda x, u: x * (u + 1),
    "difference": lambda x, u: x * (3 - u),
    "product": lambda x, u: x * (u * u),
    "quotient": lambda x, u: x * (u / 3),
    "quotient of one": lambda x, u: x + 1 / u,
    "whole quotient": lambda x, u: x * (u // 3),
    "remainder": lambda x, u: x * (u % 3),
    "negative": lambda x, u: x * -u,
    "absolute": lambda x, u: x * abs(u),
    "least": lambda x, u: x * min(u, 2),
    "largest": lambda x, u: x * max(1, u),
    "as a float": lambda x, u: x * float(u),
    "conversion and back": lambda x, u: x * float(int(float(u) * 2)),
    "truth": lambda x, u: x * (u > 1),
    "chain": lambda x, u: x * ((u + 3) * 2 - u) / 7,
}


BRANCHES = ("truth", "least", "largest")
"""Where the type of the result, or a flag that is used as a number, depends on the value: there is a way for each."""


def step_of(body: Body) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, t: body(x, t.item())


@functools.cache
def rewritten_once(
    body: Body, dtype: torch.dtype, of: torch.dtype, hint: float = 1
) -> tuple[Callable[..., Any], Rewritten] | None:
    """The step and its graph; None where eager does not take these dtypes."""
    step, arguments = step_of(body), (torch.ones(64, dtype=dtype), torch.full((), hint, dtype=of))
    try:
        step(*(argument.clone() for argument in arguments))
        return step, rewritten(step, *arguments)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    except passes.Unremovable:
        if dtype != torch.bool:  # torch asks for the number itself when it makes a flag of it
            raise
        return None


def fits(number: Any, dtype: torch.dtype) -> bool:
    """Whether torch takes a number for a tensor of some dtype: it refuses to convert what is out of range."""
    try:
        return bool(torch.full((), number, dtype=dtype).isfinite() or math.isinf(number) or math.isnan(number))
    except RuntimeError:
        return False


def numbers(dtype: torch.dtype) -> st.SearchStrategy[Any]:
    if dtype == torch.bool:
        return st.booleans()
    if dtype == torch.uint8:
        return st.integers(0, 255)
    if not dtype.is_floating_point:
        return st.integers(-70, 70) | st.integers(1 - (1 << 31), (1 << 31) - 1)
    special = st.sampled_from([0.0, -0.0, 0.1, 1 / 3, 65504.0, 1e-7, 3.0])
    return special | st.floats(-1e4, 1e4) | st.sampled_from([math.inf, -math.inf, math.nan])


values = st.sampled_from(DTYPES).flatmap(lambda d: st.tuples(st.just(d), st.lists(numbers(d), min_size=4, max_size=4)))
scalars = st.sampled_from([*FLOATING[:2], torch.float64, torch.int64, torch.bool]).flatmap(
    lambda d: st.tuples(st.just(d), numbers(d))
)


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=120, deadline=None)
@given(values, scalars)
def test_an_operator_rounds_and_promotes_as_with_the_number(name: str, given_x: Any, given_u: Any) -> None:
    made = rewritten_once(BINARY[name], given_x[0], given_u[0])
    assume(made is not None)
    assert made is not None
    step, graph = made
    x, t = torch.tensor(given_x[1], dtype=given_x[0]).repeat(16), torch.tensor(given_u[1], dtype=given_u[0])
    assume(not (OLDER and name == "clamp" and math.isnan(t)))  # where torch's own clamp takes no notice of such a limit
    assume(fits(t.item(), given_x[0]) and not (name in ROUNDED_TWICE and given_x[0] == torch.float64))
    check(graph, step, x, t, may_break=given_u[0] == torch.bool)  # torch asks flags for their value


@pytest.mark.parametrize("name", PYTHON)
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([torch.float32, torch.float64, torch.int64]), scalars)
def test_arithmetic_of_python_is_done_as_python_does_it(name: str, dtype: torch.dtype, given_u: Any) -> None:
    assume(given_u[0] != torch.bool and math.isfinite(given_u[1]))
    made = rewritten_once(PYTHON[name], dtype, given_u[0])
    assume(made is not None)
    assert made is not None
    x, t = torch.tensor([1, 2, 3], dtype=dtype), torch.tensor(given_u[1], dtype=given_u[0])
    try:
        made[0](x.clone(), t)
    except (ZeroDivisionError, ValueError, OverflowError):
        assume(False)
    check(made[1], made[0], x, t, may_break=name in BRANCHES)


def divided(x: Tensor, t: Tensor) -> Tensor:
    return x / t.item() + (t * 2).item() * 3


BEFORE = """\
arg0_1 [2] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
_local_scalar_dense = _local_scalar_dense.default(arg1_1)
div [2] = div.Tensor(arg0_1, _local_scalar_dense)
mul [] = mul.Tensor(arg1_1, 2)
_local_scalar_dense_1 = _local_scalar_dense.default(mul)
scalar_tensor [] = scalar_tensor.default(_local_scalar_dense_1, dtype=torch.float64, device=cpu, pin_memory=False)
scalar_tensor_1 [] = scalar_tensor.default(3, dtype=torch.float64, device=cpu, pin_memory=False)
mul_1 [] = mul.Tensor(scalar_tensor, scalar_tensor_1)
_local_scalar_dense_2 = _local_scalar_dense.default(mul_1)
add [2] = add.Tensor(div, _local_scalar_dense_2)
return [add]"""
AFTER = """\
arg0_1 [2] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
div_tensor [2] = div.Tensor(arg0_1, arg1_1)
mul [] = mul.Tensor(arg1_1, 2)
_to_copy_default_1 [] = _to_copy.default(mul, dtype=torch.float64)
clone_default [] = clone.default(_to_copy_default_1)
scalar_tensor_1 [] = scalar_tensor.default(3, dtype=torch.float64, device=cpu, pin_memory=False)
mul_1 [] = mul.Tensor(clone_default, scalar_tensor_1)
_to_copy_default_2 [] = _to_copy.default(mul_1, dtype=torch.float32)
add_tensor [2] = add.Tensor(div_tensor, _to_copy_default_2)
return [add_tensor]"""


def test_the_graphs_before_and_after() -> None:
    arguments = torch.ones(2), torch.tensor(2.5)
    assert printed(traced(divided, *arguments)) == BEFORE
    graph = rewritten(divided, *arguments, only=["arithmetic"])
    assert printed(graph.module) == AFTER and not graph.assumes
    again = rewritten(divided, *arguments, only=["arithmetic"])
    assert printed(again.module) == AFTER and again.changes == graph.changes
    assert all("_local_scalar_dense" in before or "Tensor" in before for before, _ in graph.changes)


@pytest.mark.parametrize("hint", [1.0, 2.0, 0.5, 3.0, -1.0, 1.7])
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.5, -0.5, -1.0, 1.7, 2.5])
)
def test_an_exponent_has_the_kernel_of_its_own(hint: float, x: list[float], exponent: float) -> None:
    made = rewritten_once(operator.pow, torch.float32, torch.float32, hint)
    assert made is not None
    held = check(made[1], made[0], torch.tensor(x).repeat(16), torch.tensor(exponent), may_break=True)
    general = (1.7, 2.5)
    assert held == (exponent == hint or (exponent in general and hint in general))


def test_a_number_that_no_operator_takes_from_the_device_is_a_way_of_its_own() -> None:
    step = step_of(torch.nn.functional.leaky_relu)
    graph = rewritten(step, torch.randn(4), torch.tensor(0.25))
    assert check(graph, step, torch.randn(4), torch.tensor(0.25))
    assert not check(graph, step, torch.randn(4), torch.tensor(0.5), may_break=True)


def test_arithmetic_that_no_operator_does_is_named() -> None:
    step = step_of(lambda x, u: x * math.gamma(u))
    with pytest.raises(passes.Unremovable, match="Python needs the number itself"):
        rewritten(step, torch.ones(3), torch.tensor(2.5))
