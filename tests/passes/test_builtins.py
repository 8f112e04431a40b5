"""`passes.tracing.number_builtins`: Python's number builtins with ordinary arguments, with symbols, and put back afterwards."""

from __future__ import annotations

import builtins
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import passes
from passes.tracing.number_builtins import SYMBOLIC, symbolic_builtins
from tests.passes.steps import check, rewritten, traced

numbers = st.integers(-99, 99) | st.floats(-99, 99) | st.booleans()


@given(numbers, numbers.filter(bool))
def test_ordinary_numbers_are_what_they_were(a: Any, b: Any) -> None:
    for name in ("int", "float"):
        assert SYMBOLIC[name](a) == getattr(builtins, name)(a) and type(SYMBOLIC[name](a)) is getattr(builtins, name)
    for name in ("min", "max", "divmod"):
        mine, theirs = SYMBOLIC[name](a, b), getattr(builtins, name)(a, b)
        assert mine == theirs and type(mine) is type(theirs)


@pytest.mark.parametrize(
    "call",
    [
        lambda n: n["int"]("11", 2),
        lambda n: n["int"](),
        lambda n: n["float"]("nan") != n["float"]("nan"),
        lambda n: n["min"]([3, 1, 2]),
        lambda n: n["max"]("ab", "c", key=len),
        lambda n: n["min"]([], default=4),
        lambda n: n["len"]([1, 2]),
        lambda n: n["len"]({"a": 1}),
        lambda n: list(n["range"](2, 9, 3)),
        lambda n: isinstance(3, n["int"]) and not isinstance("3", n["int"]),
        lambda n: isinstance(True, n["int"]) and isinstance(1.5, n["float"]),
        lambda n: issubclass(bool, n["int"]),
        lambda n: {int: 1}[n["int"]],
        lambda n: n["int"].from_bytes(b"\x01\x00", "big"),
        lambda n: n["float"].fromhex("0x1p3"),
    ],
)
def test_other_uses_of_a_builtin_are_what_they_were(call: Any) -> None:
    assert call(SYMBOLIC) == call({name: getattr(builtins, name) for name in SYMBOLIC})


@pytest.mark.parametrize("call", [lambda n: n["int"]("x"), lambda n: n["float"]([]), lambda n: n["min"](), lambda n: n["len"](3)])
def test_other_uses_fail_as_they_did(call: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        call({name: getattr(builtins, name) for name in SYMBOLIC})
    with pytest.raises(type(theirs.value)):
        call(SYMBOLIC)


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    made = types.ModuleType("builtins_tests_module")
    sys.modules[made.__name__] = made
    exec("len = 'mine'\ndef convert(value): return int(value)", vars(made))
    yield made
    del sys.modules[made.__name__]


def test_names_are_hidden_in_the_named_modules_and_given_back(module: types.ModuleType) -> None:
    before = dict(vars(module))
    methods = [torch.SymInt.__format__, torch.SymInt.__hash__]
    with pytest.raises(KeyError), symbolic_builtins([module.__name__, module.__name__, "no_such_module"]):
        assert vars(module)["int"] is SYMBOLIC["int"] and vars(module)["len"] == "mine"
        assert "int" not in vars(sys.modules[__name__])
        raise KeyError
    assert vars(module) == before
    assert [torch.SymInt.__format__, torch.SymInt.__hash__] == methods


def whole(x: Tensor, t: Tensor) -> Tensor:
    return x * int(t * 3)


def conversions(x: Tensor, t: Tensor) -> Tensor:
    n = int(t.item()) + int(float(t))
    assert isinstance(n, int) and isinstance(float(n), float)
    a, b = divmod(n, 4)
    return x * max(min(a, 5), 1) + b


def rounded(x: Tensor, t: Tensor) -> Tensor:
    return x * (math.floor(t.item()) + math.ceil(t.item()) + math.trunc(t.item()))


@pytest.mark.parametrize("step", [whole, conversions, rounded])
def test_symbols_stay_symbols(step: Any) -> None:
    of = torch.tensor(1.5) if step is rounded else torch.tensor(2)
    graph = rewritten(step, torch.ones(3), of)
    for value in (0, 1, 3, 7, 30):
        assert check(graph, step, torch.ones(3), torch.tensor(value, dtype=of.dtype) * 1)


def test_text_of_a_value_is_named() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        names = {f"way {t.item()}": x}
        return names["way 2"] * 2

    with pytest.raises(passes.Unremovable, match="its text needs the value") as raised:
        traced(step, torch.ones(3), torch.tensor(2))
    assert raised.value.operator == "format" and raised.value.site == (__file__, step.__code__.co_firstlineno + 1)


def test_a_key_of_a_dictionary_is_an_assumption() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        return x * {1: 10, 2: 20}.get(t.item(), 0)

    graph = rewritten(step, torch.ones(3), torch.tensor(2))
    for value in (1, 2, 3):
        assert check(graph, step, torch.ones(3), torch.tensor(value), may_break=True) == (value == 2)


def test_a_loop_over_a_range_is_a_way_per_length() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        for i in range(t):  # type: ignore[call-overload]
            x = x * 2 + i
        return x

    graph = rewritten(step, torch.ones(3), torch.tensor(2))
    for value in (0, 2, 3):
        assert check(graph, step, torch.ones(3), torch.tensor(value), may_break=True) == (value == 2)
