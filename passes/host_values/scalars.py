"""Numbers that only the device knows, computed there: each expression of symbols becomes 0-d tensors.

Whole numbers are int64, fractions float64 and flags bool, as Python computes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch.fx import Node
from torch.utils._sympy import functions as sympy_functions

from passes.core.symbols import expression_of, is_symbol
from passes.errors import Unremovable
from passes.host_values.device_arithmetic import CLAMPS, DeviceArithmetic
from passes.host_values.emitter import Emitter
from passes.host_values.integer_widths import limit_of

aten = torch.ops.aten


def _fits(number: sympy.Basic) -> bool:
    return bool(-(2**63) <= number < 2**63)


class Scalars(DeviceArithmetic):
    """The 0-d tensors of the graph that an `Emitter` builds; each expression is computed once."""

    def __init__(self, emitter: Emitter) -> None:
        super().__init__(emitter)
        self._symbols: dict[sympy.Symbol, Node] = {}
        self._made: dict[Any, Any] = {}

    def define(self, value: Any, tensor: Node) -> None:
        """Say that the 0-d ``tensor`` holds the symbol of ``value``."""
        expression = expression_of(value)
        if isinstance(expression, sympy.Eq):  # a flag is Eq(symbol, 1)
            expression = next(iter(expression.free_symbols))
        if isinstance(expression, sympy.Symbol) and expression not in self._symbols:
            self._symbols[expression] = tensor
            self._made.pop(expression, None)

    def check_definitions(self) -> None:
        """Have the graph check that the symbols it reads are what they are taken for: an operator insists on it.

        Of a split, the last size is taken for what the others leave.
        """
        for symbol, tensor in self._symbols.items():
            definition = self._emitter.facts.replacements.get(symbol)
            if definition is None:
                continue
            facts, expected = self._emitter.facts, self.number(definition)
            held = self._zero_dim(tensor)
            if symbol in facts.hints and facts.hint(sympy.Eq(facts.hints[symbol], definition)) == sympy.false:
                raise self._missing(f"the step itself does not keep to {symbol} == {definition}")
            compare = aten.eq.Tensor if isinstance(expected, Node) else aten.eq.Scalar
            self._emitter.require(self._call(compare, held, expected))

    def of(self, value: Any) -> Any:
        """A number as it is, or the 0-d tensor (int64, float64 or bool) that stands for a symbol."""
        if not is_symbol(value):
            return value
        if isinstance(value.meta["val"], torch.SymFloat):
            return self._floating(value)
        return self.number(expression_of(value))

    def number(self, expression: sympy.Basic) -> Any:
        """An integer or boolean expression as a number, or as a 0-d tensor.

        Raises:
            Unremovable: no operator computes it.
        """
        expression = self._emitter.facts.resolve(expression)
        if expression.is_Integer:
            if not _fits(expression):
                raise self._missing(f"{expression} has more than 64 bits")
            return int(expression)
        if expression in (sympy.true, sympy.false):
            return bool(expression)
        if expression.is_Number:
            return float(expression)
        if expression not in self._made:
            self._made[expression] = self._emit(expression)
        return self._made[expression]

    def _emit(self, expression: sympy.Basic) -> Any:
        if isinstance(expression, sympy.Symbol):
            if expression not in self._symbols:
                raise self._missing(f"nothing in the graph holds the value of {expression}")
            return self._zero_dim(self._symbols[expression])
        if isinstance(expression, _GROWING):
            self._stay_within(expression)
        if isinstance(expression, Relational) and (known := self._beyond(expression)) is not None:
            return known
        special = _SPECIAL.get(type(expression))
        if special is not None:
            return special(self, expression)
        if isinstance(expression, (sympy.Eq, sympy.Ne)) and (flag := self._flag(*expression.args)) is not None:
            return flag if isinstance(expression, sympy.Eq) else self._call(aten.logical_not.default, flag)
        packet = _OPERATIONS.get(type(expression))
        if packet is None:
            raise self._missing(f"{type(expression).__name__} has no operator for it")
        if len(expression.args) > 2 and type(expression) in _LONG:  # a sum begins with one that other sums begin with too
            first = self.number(type(expression)(*expression.args[:-1]))
            return self._combined(type(expression), packet, first, self.number(expression.args[-1]))
        values = [self.number(part) for part in expression.args]
        if packet in _DIVISIONS and isinstance(values[1], Node):
            self._emitter.assume(sympy.Ne(expression.args[1], 0))
        if len(values) == 1:
            return self._call(packet.default, *values)
        total = values[0]
        for value in values[1:]:
            total = self._combined(type(expression), packet, total, value)
        return total

    def _stay_within(self, expression: sympy.Basic) -> None:
        """Assume of the numbers of a product or power that it has 64 bits, unless that is certain."""
        symbols = expression.free_symbols
        if not all(symbol.is_integer for symbol in symbols):
            return
        bounds = {symbol: self._emitter.bounds.of(symbol) for symbol in sorted(symbols, key=str)}
        try:
            limit = limit_of(expression, bounds)
        except OverflowError as error:
            raise self._missing(str(error)) from error
        if limit is None:
            return
        for symbol, bound in bounds.items():
            if bound is None or bound > limit:
                self._emitter.assume(sympy.And(symbol <= limit, symbol >= -limit))

    def _beyond(self, expression: Relational) -> Node | None:
        """The truth of a comparison of a symbol with a number that no symbol of 64 bits can be; None for any other."""
        symbol = next((part for part in expression.args if part in self._symbols), None)
        if symbol is None or not symbol.is_integer or self._symbols[symbol].meta["val"].dtype == torch.uint64:
            return None
        if all(part == symbol or not part.is_Integer or _fits(part) for part in expression.args):
            return None
        return self.filled(bool(expression.subs(symbol, 0)), self.number(symbol), torch.bool)

    def _flag(self, symbol: sympy.Basic, value: sympy.Basic) -> Node | None:
        """The tensor behind ``symbol == 1``, if it is one of flags."""
        held = self._symbols.get(symbol) if value == 1 else None
        if held is None or held.meta["val"].dtype != torch.bool:
            return None
        return held if held.meta["val"].dim() == 0 else self._call(aten.view.default, held, [])

    def _combined(self, kind: type, packet: Any, a: Any, b: Any) -> Any:
        """One operator over two values, of which at least one is a tensor."""
        if not isinstance(a, Node) and not isinstance(b, Node):
            raise self._missing(f"{kind.__name__} of two numbers is left over")
        if not isinstance(a, Node) and kind in _SWAPPED:
            a, b, packet = b, a, _SWAPPED[kind] or packet
        if not isinstance(a, Node):
            a = self.filled(a, b)
        if isinstance(b, Node) and packet in _DIVISIONS:
            b = self._call(aten.masked_fill.Scalar, b, self._call(aten.eq.Scalar, b, 0), 1)  # by zero: assumed not to be
        if isinstance(b, Node):
            return self._call(getattr(packet, "Tensor", packet.default) if hasattr(packet, "Tensor") else packet.default, a, b)
        if packet in CLAMPS:
            return self._call(CLAMPS[packet], a, b)
        if packet in (aten.logical_and, aten.logical_or):
            return a if b == (packet is aten.logical_and) else self.filled(b, a, torch.bool)
        return self._call(getattr(packet, "Scalar", None) or packet.Tensor, a, b)

    def _floating(self, node: Node) -> Any:
        """A float symbol, operation by operation in float64, as Python computes it."""
        if node not in self._made:
            self._made[node] = self._of_operation(node)
        return self._made[node]

    def _of_operation(self, node: Node) -> Node:
        if node.target is aten._local_scalar_dense.default:
            return self._zero_dim(node.args[0])  # type: ignore[arg-type]
        if node.target is torch.sym_float:
            return self.cast(self.of(node.args[0]), torch.float64)
        if node.target is torch.sym_ite:
            return self._choice(*(self.of(argument) for argument in node.args))
        if node.target in (operator.mod, operator.truediv):
            self._not_zero(node.args[1])
        if node.target is operator.mod:
            return self._remainder(*self.doubles([self.of(argument) for argument in node.args]))
        if node.target is operator.pow:
            return self._finite(self._computed(_PYTHON[node.target], [self.of(argument) for argument in node.args]))
        if node.target in _PYTHON:
            return self._computed(_PYTHON[node.target], [self.of(argument) for argument in node.args])
        raise Unremovable("no operator computes this from a value on the device", str(node.target), self._emitter.site)

    def _not_zero(self, divisor: Any) -> None:
        """Python raises where a tensor is infinite: a number divided by zero."""
        value = self.of(divisor)
        if isinstance(value, Node):
            self._emitter.require(self._call(aten.ne.Scalar, value, 0), sympy.Ne(expression_of(divisor), 0))

    def divided(self, expression: sympy.Basic) -> Node:
        """A true division of integers or floats, in float64 as Python does it."""
        a, b = (self.number(part) for part in expression.args)
        if isinstance(b, Node):
            self._emitter.require(self._call(aten.ne.Scalar, b, 0), sympy.Ne(expression.args[1], 0))
        return self._call(aten.div.Tensor, *self.doubles([a, b]))

    def chosen(self, expression: sympy.Basic) -> Any:
        """A piecewise expression: the first value whose condition holds."""
        *cases, last = expression.args
        if last.args[1] != sympy.true:
            cases, last = list(expression.args), expression.args[-1]
        made = self.number(last.args[0])
        for value, condition in reversed([case.args for case in cases]):
            made = self._choice(self.number(condition), self.number(value), made)
        return made

    def power(self, expression: sympy.Basic) -> Node:
        """A whole number to the power of one that is not below zero."""
        base, exponent = (self.number(part) for part in expression.args)
        if not isinstance(exponent, Node) and exponent < 0:
            raise self._missing("a power below zero is no whole number")
        if isinstance(exponent, Node):
            self._emitter.require(self._call(aten.ge.Scalar, exponent, 0), sympy.Ge(expression.args[1], 0))
        if isinstance(base, Node) and not isinstance(exponent, Node):
            return self._call(aten.pow.Tensor_Scalar, base, exponent)
        return self._call(aten.pow.Tensor_Tensor if isinstance(base, Node) else aten.pow.Scalar, base, exponent)


def _rounded(rounding: Any) -> Callable[[Scalars, sympy.Basic], Node]:
    def emit(scalars: Scalars, expression: sympy.Basic) -> Node:
        value = scalars._finite(scalars.number(expression.args[0]), 2.0**63)
        return scalars.cast(scalars._call(rounding, value), torch.int64)

    return emit


_OPERATIONS: dict[type, Any] = {
    sympy.Add: aten.add,
    sympy.Mul: aten.mul,
    sympy_functions.FloorDiv: aten.floor_divide,
    sympy_functions.CleanDiv: aten.floor_divide,
    sympy_functions.Mod: aten.remainder,
    sympy_functions.PythonMod: aten.remainder,
    sympy.Max: aten.maximum,
    sympy.Min: aten.minimum,
    sympy_functions.Max: aten.maximum,
    sympy_functions.Min: aten.minimum,
    sympy.Abs: aten.abs,
    sympy.Eq: aten.eq,
    sympy.Ne: aten.ne,
    sympy.Lt: aten.lt,
    sympy.Le: aten.le,
    sympy.Gt: aten.gt,
    sympy.Ge: aten.ge,
    sympy.And: aten.logical_and,
    sympy.Or: aten.logical_or,
    sympy.Not: aten.logical_not,
}
_GROWING = (sympy.Mul, sympy.Pow, sympy_functions.PowByNatural)
_LONG = (sympy.Add, sympy.And, sympy.Or)
_DIVISIONS = (aten.floor_divide, aten.remainder)
"""Operators that divide: by zero Python raises, a CPU ends the run, and a GPU returns anything."""
_SPECIAL: dict[type, Callable[[Scalars, sympy.Basic], Any]] = {
    sympy_functions.ToFloat: lambda scalars, expression: scalars.cast(scalars.number(expression.args[0]), torch.float64),
    sympy_functions.TruncToInt: _rounded(aten.trunc.default),
    sympy_functions.FloorToInt: _rounded(aten.floor.default),
    sympy_functions.CeilToInt: _rounded(aten.ceil.default),
    sympy_functions.RoundToInt: _rounded(aten.round.default),
    sympy_functions.IntTrueDiv: Scalars.divided,
    sympy_functions.FloatTrueDiv: Scalars.divided,
    sympy_functions.PowByNatural: Scalars.power,
    sympy.Pow: Scalars.power,
    sympy.Piecewise: Scalars.chosen,
}
_SWAPPED: dict[type, Any] = {
    **dict.fromkeys((sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy_functions.Max, sympy_functions.Min)),
    **dict.fromkeys((sympy.And, sympy.Or, sympy.Eq, sympy.Ne)),
    sympy.Lt: aten.gt,
    sympy.Le: aten.ge,
    sympy.Gt: aten.lt,
    sympy.Ge: aten.le,
}
"""What operator takes its arguments the other way round; None for the same."""
_PYTHON = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.pow: aten.pow.Tensor_Tensor,
    operator.neg: aten.neg.default,
    operator.abs: aten.abs.default,
    torch.sym_max: aten.maximum.default,
    torch.sym_min: aten.minimum.default,
}
