"""Arithmetic and comparisons of fractions that only the device knows, each a symbol of its own while a step is traced.

Torch leaves expressions of symbols to sympy, for which they are real numbers: ``f != f`` is false, ``f - f`` zero, and
``(f + 1) - 1`` is ``f``. Python's floats have NaN, infinities and rounding. So each of these operations becomes an operator on
0-d float64 tensors, whose result is read as a new symbol that sympy knows nothing of.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch

from passes.control_flow.branches import Branches
from passes.core.facts import Computed, Facts
from passes.core.source_location import user_site
from passes.core.symbols import SYMBOLS, expression_of
from passes.errors import Unremovable

_active = threading.local()
_ABSENT = object()


def _reversed(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


_DIVISIONS = {"floordiv": operator.floordiv, "mod": operator.mod}
_DIVISORS = {**{f"__{name}__": 1 for name in _DIVISIONS}, **{f"__r{name}__": 0 for name in _DIVISIONS}}
_ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, **_DIVISIONS}
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{f"__{name}__": function for name, function in _ARITHMETIC.items()},
    **{f"__r{name}__": _reversed(function) for name, function in _ARITHMETIC.items()},
    **{f"__{name}__": getattr(operator, name) for name in _COMPARISONS},
}


@contextlib.contextmanager
def opaque_floats(facts: Facts, branches: Branches) -> Iterator[None]:
    """Have the step's operations on fractions be operators of the graph, in this thread. Torch's own stay what they are."""
    before = [(kind, name, vars(kind).get(name, _ABSENT)) for kind in (torch.SymFloat, torch.SymInt) for name in _OPERATORS]
    outer = getattr(_active, "trace", None)
    _active.trace = facts, branches
    try:
        for kind, name, method in before:
            if method is not _ABSENT:
                setattr(kind, name, _method(name, method))
        yield
    finally:
        _active.trace = outer
        for kind, name, method in before:
            if method is not _ABSENT:
                setattr(kind, name, method)


def _method(name: str, original: Any) -> Callable[[Any, Any], Any]:
    def chosen(self: Any, other: Any) -> Any:
        trace = getattr(_active, "trace", None)
        fractions = isinstance(self, torch.SymFloat) or isinstance(other, (float, torch.SymFloat))
        numbers = isinstance(other, (bool, int, float, *SYMBOLS)) and not isinstance(other, torch.SymBool)
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        if trace is None or not fractions or not numbers or caller in ("torch", "sympy"):
            return original(self, other)
        if name in _DIVISORS and (self, other)[_DIVISORS[name]] == 0:
            raise ZeroDivisionError("a fraction is divided by zero")  # as Python does; a branch of the step's line
        return _computed(_OPERATORS[name], self, other, *trace)

    return chosen


def _computed(function: Callable[[Any, Any], Any], a: Any, b: Any, facts: Facts, branches: Branches) -> Any:
    """``function(a, b)`` in float64 on the device, as a number of its own."""
    outer, branches.naming = branches.naming, True  # a read that the eager run did not make
    try:
        made = function(*(torch.scalar_tensor(_as_float(value), dtype=torch.float64) for value in (a, b))).item()
    finally:
        branches.naming = outer
    (symbol,) = made.node.expr.free_symbols
    facts.computed[symbol] = computed = Computed(function, (_operand(a), _operand(b)))
    hint = computed.value(facts.hint)
    if hint is not None:
        facts.hints[symbol] = hint
    return made


def _as_float(value: Any) -> Any:
    """A number; a whole one that has more than 64 bits, and that Python compares as it is, as the fraction that it equals.

    Raises:
        Unremovable: there is none.
    """
    if type(value) is not int or -(2**63) <= value < 2**63:
        return value
    if abs(value) > sys.float_info.max or int(float(value)) != value:
        raise Unremovable(f"{value} has more than 64 bits", "scalar", user_site())
    return float(value)


def _operand(value: Any) -> tuple[sympy.Basic, type]:
    if isinstance(value, SYMBOLS):
        return expression_of(value), float if isinstance(value, torch.SymFloat) else int
    return sympy.sympify(value), float if isinstance(value, float) else int
