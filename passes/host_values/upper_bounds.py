"""Upper bounds of lengths that only the device knows.

A length is bounded by what the step itself requires of it (a slice of a cache is no longer than the cache, an index list
no longer than what it was taken from), by ``torch._check``, and by what the caller promises by name. Each of these is a
condition that the graph checks while it runs, so a bound may be relied on.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Mapping

import sympy
from torch.utils._sympy.functions import Min
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from passes.core.facts import Facts
from passes.core.source_location import Site

_LIMIT = 1 << 24  # rows: a larger bound is none


class Bounds:
    """The bounds of one graph.

    Args:
        facts: its assumptions, of which every one holds whenever the graph's results are used.
        promised: largest values by name: the variable that the line assigns (``n = int(t)``: ``"n"``), or ``"file.py:12"``.
    """

    def __init__(self, facts: Facts, promised: Mapping[str, int] | None = None) -> None:
        self._facts = facts
        self._promised = dict(promised or {})
        self._ranges: dict[sympy.Symbol, tuple[sympy.Basic, sympy.Basic]] = {}
        self._limits: dict[sympy.Basic, int] = {}
        self._sizes: dict[sympy.Symbol, int] = {}
        for symbol, site in facts.sources.items():
            name = self._promise(site)
            if name is not None:
                self.limit(symbol, self._promised[name])
                facts.decide(symbol <= self._promised[name], True, site)
        for symbol, path in facts.names.items():
            name = next((n for n in (path, path.rpartition(".")[2]) if n in self._promised), None)
            if name is not None:
                self.limit(symbol, self._promised[name])
                facts.decide(symbol <= self._promised[name], True, ("", 0))
        self._natural = {
            s for d in facts.assumptions for part in _conjuncts(d.condition) if (s := _not_below_zero(part)) is not None
        }
        for _ in range(2):  # an equality may carry a bound that was learned after it
            for condition in facts.assumptions:
                for part in _conjuncts(condition.condition):
                    self._learn(self.simplified(part))

    def simplified(self, expression: sympy.Basic) -> sympy.Basic:
        """An expression written shorter with what the graph assumes: numbers not below zero, limits that are never met."""
        made = self.of_signs(expression)
        least = [part for part in made.atoms(sympy.Min, Min) if len(part.args) == 2 and part.args[0].is_Integer]
        return made.xreplace({part: part.args[1] for part in least if self._upper(part.args[1]) <= part.args[0]})

    def of_signs(self, expression: sympy.Basic) -> sympy.Basic:
        """An expression written shorter for the numbers that the graph assumes to be zero or more, unless it says so itself."""
        if isinstance(expression, sympy.And):
            return sympy.And(*map(self.of_signs, expression.args))
        if _not_below_zero(expression) is not None:
            return expression
        symbols = frozenset(expression.free_symbols & self._natural)
        if not symbols:
            return expression
        key = (expression, symbols)
        if key not in self._facts.shorter:
            known = self._facts.naturals  # one for each symbol: sympy remembers what it found out of it
            stand_ins = {s: known.setdefault(s, sympy.Dummy(s.name, integer=True, nonnegative=True)) for s in symbols}
            made = expression.xreplace(stand_ins)
            self._facts.shorter[key] = made.xreplace({stand_in: symbol for symbol, stand_in in stand_ins.items()})
        return self._facts.shorter[key]

    def _upper(self, expression: sympy.Basic) -> sympy.Basic:
        ranges = {s: ValueRanges(*self._ranges.get(s, (0, sympy.oo))) for s in expression.free_symbols}
        return bound_sympy(expression, ranges).upper  # type: ignore[arg-type]

    def limit(self, expression: sympy.Basic, largest: int, smallest: int = 0) -> None:
        """Say that ``smallest <= expression <= largest``."""
        self._limits[expression] = min(largest, self._limits.get(expression, largest))
        if isinstance(expression, sympy.Symbol):
            low, high = self._ranges.get(expression, (sympy.Integer(smallest), sympy.Integer(largest)))
            high = sympy.Min(high, largest)
            self._ranges[expression] = (sympy.Min(sympy.Max(low, smallest), high), high)  # a length, unless it is below zero

    def count(self, symbol: sympy.Symbol, largest: int) -> None:
        """Say that a symbol counts something of which there are ``largest``: no assumption is needed for it."""
        self._sizes[symbol] = largest
        self.limit(symbol, largest)

    def certain(self, condition: sympy.Basic) -> bool:
        """Whether a condition holds whatever the data: counts lie between zero and what is counted."""
        if isinstance(condition, sympy.And):
            return all(map(self.certain, condition.args))
        if not isinstance(condition, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
            return bool(condition == sympy.true)
        small, large = condition.lts, condition.gts
        ranges = {
            s: ValueRanges(0, self._sizes[s]) if s in self._sizes else ValueRanges.unknown_int() for s in condition.free_symbols
        }
        if any(not s.is_integer for s in condition.free_symbols):
            return False
        high = bound_sympy(small, ranges).upper  # type: ignore[arg-type]
        low = bound_sympy(large, ranges).lower  # type: ignore[arg-type]
        strict = isinstance(condition, (sympy.Lt, sympy.Gt))
        return bool(high < low if strict else high <= low)

    def of(self, expression: sympy.Basic) -> int | None:
        """The largest value of an expression, or None where nothing bounds it."""
        expression = self.simplified(self._facts.resolve(expression))
        if expression.is_Integer:
            return int(expression)
        upper = self._upper(expression)
        known = [self._limits[e] for e in (expression,) if e in self._limits]
        if upper.is_Integer:
            known.append(int(upper))
        largest = min(known, default=_LIMIT + 1)
        return max(largest, 0) if largest <= _LIMIT else None

    def _promise(self, site: Site) -> str | None:
        file, line = site
        assigned = re.match(r"\s*(\w+)\s*(?::[^=]+)?=[^=]", linecache.getline(file, line))
        names = [f"{file.rsplit('/', 1)[-1]}:{line}", *([assigned.group(1)] if assigned else [])]
        return next((name for name in names if name in self._promised), None)

    def _learn(self, condition: sympy.Basic) -> None:
        if isinstance(condition, sympy.Eq):
            for a, b in (condition.args, condition.args[::-1]):
                largest = self.of(b)
                if largest is not None and a.free_symbols:
                    self._at_most(a, largest)
        elif isinstance(condition, (sympy.Le, sympy.Lt)):
            self._compare(condition.lhs, condition.rhs, isinstance(condition, sympy.Lt))
        elif isinstance(condition, (sympy.Ge, sympy.Gt)):
            self._compare(condition.rhs, condition.lhs, isinstance(condition, sympy.Gt))

    def _compare(self, small: sympy.Basic, large: sympy.Basic, strict: bool) -> None:
        largest = self.of(large)
        if largest is not None and small.free_symbols:
            self._at_most(small, largest - strict)

    def _at_most(self, expression: sympy.Basic, largest: int) -> None:
        """Learn ``expression <= largest``, and what that says of the one symbol of a linear expression."""
        self._limits[expression] = min(largest, self._limits.get(expression, largest))
        symbols = expression.free_symbols
        if len(symbols) != 1:
            return
        (symbol,) = symbols
        slope = expression.coeff(symbol, 1) if expression.is_polynomial(symbol) else sympy.Integer(0)
        rest = expression - slope * symbol
        if slope.is_Integer and slope > 0 and rest.is_Integer:
            self.limit(symbol, (largest - int(rest)) // int(slope))


def _not_below_zero(condition: sympy.Basic) -> sympy.Symbol | None:
    """The symbol that a condition says is zero or more."""
    if isinstance(condition, (sympy.Ge, sympy.Le)) and condition.lts == 0 and isinstance(condition.gts, sympy.Symbol):
        return condition.gts
    return None


def _conjuncts(condition: sympy.Basic) -> Iterator[sympy.Basic]:
    if isinstance(condition, sympy.And):
        for part in condition.args:
            yield from _conjuncts(part)
    else:
        yield condition
