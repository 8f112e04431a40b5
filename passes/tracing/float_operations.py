"""Arithmetic and comparisons of fractions that only the device knows, each a symbol of its own while a step is traced.

Torch leaves expressions of symbols to sympy, for which they are real numbers: ``f != f`` is false, ``f - f`` zero, and
``(f + 1) - 1`` is ``f``. Python's floats have NaN, infinities and rounding. So each of these operations becomes an operator on
0-d float64 tensors, whose result is read as a new symbol that sympy knows nothing of.

Some operations of Python raise for some numbers: a division by zero, a power of zero, `int` of NaN. Whether they do is asked
where they stand, so that it is part of what the graph assumes even if nobody uses the result.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import sympy
import torch

from passes.control_flow.branches import Branches
from passes.core.facts import Computed, Facts
from passes.core.source_location import user_site
from passes.core.symbols import SYMBOLS, expression_of
from passes.errors import Unremovable

_active = threading.local()
_WHOLE = 2.0**63
"""Fractions from here on, of either sign, are no whole numbers of 64 bits."""
_ABSENT = object()


def _reversed(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


_DIVISIONS = {"floordiv": operator.floordiv, "mod": operator.mod}
_DIVIDING = (*_DIVISIONS, "truediv")
_SHIFTING = ("lshift", "rshift")
_SECOND = {
    **{f"__{name}__": 1 for name in (*_DIVIDING, *_SHIFTING, "pow")},
    **{f"__r{name}__": 0 for name in (*_DIVIDING, *_SHIFTING, "pow")},
}
"""Which of ``(self, other)`` is the divisor, the count or the exponent, for operations that raise for some."""
_ROUNDING = ("__trunc__", "__floor__", "__ceil__", "__round__")
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
    names = dict.fromkeys((*_OPERATORS, *_SECOND, *_ROUNDING))
    before = [(kind, name, vars(kind).get(name, _ABSENT)) for kind in (torch.SymFloat, torch.SymInt) for name in names]
    outer = getattr(_active, "trace", None)
    _active.trace = facts, branches
    try:
        for kind, name, method in before:
            if method is not _ABSENT:
                setattr(kind, name, (_rounding if name in _ROUNDING else _method)(name, method))
        yield
    finally:
        _active.trace = outer
        for kind, name, method in before:
            if method is not _ABSENT:
                setattr(kind, name, method)


def _method(name: str, original: Any) -> Callable[[Any, Any], Any]:
    def chosen(self: Any, other: Any) -> Any:
        trace = _trace_of(sys._getframe(1))
        if trace is None or not isinstance(other, (bool, int, float, *SYMBOLS)):
            return original(self, other)
        if name in _SECOND:
            _raise_for(name, self, other, trace[0])
        fractions = isinstance(self, torch.SymFloat) or isinstance(other, (float, torch.SymFloat))
        if name in _OPERATORS and fractions and not isinstance(other, torch.SymBool):
            return _computed(_OPERATORS[name], self, other, *trace)
        made = original(self, other)
        if "pow" in name and isinstance(made, torch.SymFloat):
            _raises(trace[0], _computed(_is_not_below, _size_of(made), math.inf, *trace))  # Python: where it overflows
        return made

    return chosen


def _rounding(name: str, original: Any) -> Callable[..., Any]:
    def chosen(self: Any, *digits: Any) -> Any:
        trace = _trace_of(sys._getframe(1))
        whole = isinstance(self, torch.SymFloat) and digits in ((), (None,))
        if trace is not None and whole and _raises(trace[0], _computed(_is_not_below, _size_of(self), _WHOLE, *trace)):
            raise ValueError("no whole number of 64 bits is near to it")
        return original(self, *digits)

    return chosen


def _trace_of(frame: FrameType) -> tuple[Facts, Branches] | None:
    """What is traced in this thread, unless it is torch that computes in ``frame``."""
    caller = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return getattr(_active, "trace", None) if caller not in ("torch", "sympy") else None


def _raise_for(name: str, self: Any, other: Any, facts: Facts) -> None:
    """Raise as Python does for a divisor of zero, a negative count, a negative power of zero: a branch of the step's line.

    Raises:
        ZeroDivisionError, ValueError: the eager run had such a number.
    """
    position = _SECOND[name]
    first, second = (self, other) if position else (other, self)
    if "shift" in name:
        if _raises(facts, second < 0):
            raise ValueError("negative shift count")
    elif "pow" in name:
        if not isinstance(second, torch.SymFloat) and _raises(facts, second < 0, first == 0):
            raise ZeroDivisionError("zero to a negative power")
    elif (not second) if isinstance(second, torch.SymBool) else _raises(facts, second == 0):
        raise ZeroDivisionError("division by zero")


def _raises(facts: Facts, *conditions: Any) -> bool:
    """Whether Python raises here, where all of ``conditions`` hold.

    On a side that the eager run did not take, it is assumed not to, for the data with which that side is taken.
    """
    asked = [one for one in conditions if isinstance(one, SYMBOLS)]
    if not asked or facts.executed():
        return all(map(bool, conditions))
    if all(one for one in conditions if not isinstance(one, SYMBOLS)):
        truths = [one.node.expr if isinstance(one, torch.SymBool) else sympy.Ne(one.node.expr, 0) for one in asked]
        facts.decide(sympy.And(*truths), False, user_site())
    return False


def _size_of(value: Any) -> Any:
    """A symbol without its sign."""
    return abs(value)


def _is_not_below(a: Any, b: Any) -> Any:
    """``not a < b``, of numbers and tensors: NaN is not below anything."""
    return (a < b) == 0


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
