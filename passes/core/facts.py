"""What is known of the numbers of a traced step that only the device knows: hints, definitions, and what the graph assumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import sympy
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.core.predicates import Loops
from passes.core.source_location import Branch, Place, Site
from passes.core.values.host_reads import Read


@dataclass(frozen=True)
class Assumption:
    """A predicate over host values and the outcome that the traced way depends on."""

    predicate: sympy.Basic
    outcome: bool
    site: Site

    @property
    def condition(self) -> sympy.Basic:
        """The condition under which the graph is the step."""
        return self.predicate if self.outcome else sympy.Not(self.predicate)


@dataclass(frozen=True)
class Computed:
    """A number that the graph computes of two others, in float64.

    Attributes:
        operands: expressions, with the type of Python that each is of.
    """

    function: Callable[[Any, Any], Any]
    operands: tuple[tuple[sympy.Basic, type], tuple[sympy.Basic, type]]

    def value(self, hint: Callable[[sympy.Basic], sympy.Basic | None]) -> float | int | None:
        """What it is if its operands are as ``hint`` says, 0 or 1 for a comparison; None where one is not known."""
        values = [hint(expression) for expression, _ in self.operands]
        if any(value is None for value in values):
            return None
        made = self.function(*(kind(value) for value, (_, kind) in zip(values, self.operands, strict=True)))
        return int(made) if isinstance(made, bool) else float(made)


@dataclass
class Facts:
    """What is known of the symbols of a graph; see `passes.core.traced_step.TracedStep`.

    Attributes:
        hints: the value of each symbol in the eager run.
        replacements: symbols that are functions of others (the length of a slice).
        assumptions: what the graph assumes.
        computed: symbols that operators of the graph make of others, in order.
        checked: the lines of those that a run has to check.
        sources: file and line that read each symbol.
        reads: the reads of the eager run that gave each symbol its hint.
        names: what symbols are called that stand for numbers of Python.
        limits: largest values of counts.
        loops, outcomes: the loops that are being traced, and which way branches inside of them went, by place.
        branches: the functions that ask for the truth of a symbol, by the place where they do.
        unmerged: why branches have only one of their sides in the graph.
        offsets: symbols that stand for places of views in their storage, which no value depends on.
        mode: the fake mode of the values in ``node.meta["val"]``.
    """

    mode: FakeTensorMode
    hints: dict[sympy.Symbol, int | float] = field(default_factory=dict)
    replacements: dict[sympy.Symbol, sympy.Basic] = field(default_factory=dict)
    computed: dict[sympy.Symbol, Computed] = field(default_factory=dict)
    assumptions: list[Assumption] = field(default_factory=list)
    checked: list[Site] = field(default_factory=list)
    sources: dict[sympy.Symbol, Site] = field(default_factory=dict)
    names: dict[sympy.Symbol, str] = field(default_factory=dict)
    offsets: set[sympy.Symbol] = field(default_factory=set)
    limits: dict[sympy.Symbol, int] = field(default_factory=dict)
    loops: Loops | None = None
    reads: dict[sympy.Symbol, list[Read]] = field(default_factory=dict)
    outcomes: dict[Place, bool] = field(default_factory=dict)
    branches: dict[Place, CodeType] = field(default_factory=dict)
    unmerged: dict[Branch, str] = field(default_factory=dict)
    naturals: dict[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)
    shorter: dict[Any, sympy.Basic] = field(
        default_factory=dict
    )  # of `passes.host_values.upper_bounds`, for which sympy takes long
    _resolved: dict[sympy.Basic, sympy.Basic] = field(default_factory=dict)
    _hinted: dict[sympy.Basic, sympy.Basic] = field(default_factory=dict)
    _known: set[sympy.Basic] = field(default_factory=set)

    def executed(self) -> bool:
        """Whether the eager run came to where the traced one is: into these iterations, and arms of branches."""
        trips = self.loops.trips if self.loops is not None else ()
        return all(self.hint(trip.predicate) == sympy.true for trip in trips)

    def resolve(self, expression: sympy.Basic) -> sympy.Basic:
        """``expression`` with defined symbols replaced by what they stand for."""
        made = self._resolved.get(expression)
        if made is None:
            made = expression.replace(sympy.ITE, _without_choice) if expression.has(sympy.ITE) else expression
        while any(symbol in self.replacements for symbol in made.free_symbols):
            made = made.xreplace(self.replacements)
        self._resolved[expression] = made
        return made

    def forget(self, assumptions: int, definitions: Mapping[sympy.Symbol, sympy.Basic]) -> None:
        """Go back to the first ``assumptions``, and to these definitions."""
        del self.assumptions[assumptions:]
        self.replacements = dict(definitions)
        self._resolved.clear()
        self._known = {assumption.condition for assumption in self.assumptions}

    def hint(self, expression: sympy.Basic) -> sympy.Basic | None:
        """The value of ``expression`` in the eager run, or None."""
        resolved = self.resolve(expression)
        symbols = resolved.free_symbols
        if any(symbol not in self.hints for symbol in symbols):
            value = resolved.xreplace({s: sympy.sympify(self.hints[s]) for s in symbols if s in self.hints})
        else:
            value = self._hinted.get(resolved)
            if value is None:
                value = self._hinted[resolved] = resolved.xreplace({s: sympy.sympify(self.hints[s]) for s in symbols})
        return value if not value.free_symbols else None

    def depending_on(self, symbols: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, Computed]:
        """The computed symbols that change if others do, in order."""
        found: dict[sympy.Symbol, Computed] = {}
        for symbol, made in self.computed.items():
            if any(self.resolve(a).free_symbols & {*symbols, *found} for a, _ in made.operands):
                found[symbol] = made
        return found

    def values_if(self, values: Mapping[sympy.Symbol, Any]) -> dict[sympy.Symbol, sympy.Basic]:
        """``values``, and those that the symbols computed of them have then, as far as they are known."""
        known = {symbol: sympy.sympify(value) for symbol, value in values.items()}
        for symbol, made in self.depending_on([*values]).items():
            value = made.value(lambda operand: self.hint(self.resolve(operand).xreplace(known)))
            if value is not None:
                known[symbol] = sympy.sympify(value)
        return known

    def decide(self, predicate: sympy.Basic, outcome: bool, site: Site, place: Place | None = None) -> None:
        """Add an assumption, unless it is there. ``place`` is where Python asks for the truth of the predicate."""
        assumption = Assumption(self.resolve(predicate), outcome, site)
        if self.loops is not None and self.loops.trips:  # what an iteration assumes matters if it takes place
            skipped = [sympy.Not(trip.predicate) for trip in self.loops.trips]
            if self.executed() and place is not None:
                self.outcomes[place] = bool(outcome)
            assumption = Assumption(sympy.Or(*skipped, assumption.condition), True, site)
        if assumption.condition not in self._known and assumption.condition != sympy.true:
            self._known.add(assumption.condition)
            self.assumptions.append(assumption)


def _without_choice(holds: sympy.Basic, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """One of two conditions, in terms that torch knows the bounds of."""
    return sympy.Or(sympy.And(holds, a), sympy.And(sympy.Not(holds), b))
