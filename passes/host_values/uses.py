"""What became of each value that the host read: the record that a rewriting keeps, for those who tell the user.

A number is used where a rule asks for it: as a 0-d tensor, as a static size, or as the value of the eager run, which is then
an assumption. These are few places of the rewriter. They note the symbols here, with the pass whose rule asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import sympy
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from passes.core.facts import Facts
from passes.core.source_location import Site
from passes.core.symbols import SYMBOLS, expression_of, is_symbol
from passes.core.values.host_reads import Read
from passes.errors import Unremovable


class Use(NamedTuple):
    """A use of a host value that a pass took.

    Attributes:
        by: the pass: ``"addressing"``, ``"arithmetic"``, ``"bounded"``, or ``"branches"`` where Python's way depends on the
            value, or the graph assumes it.
        operator: what it was given to; empty for Python itself.
        site: the user's line.
    """

    by: str
    operator: str = ""
    site: Site = ("", 0)


@dataclass(frozen=True)
class HostValue:
    """A value that the host read in the eager run, and what the passes did with it.

    Attributes:
        read: the read; of a whole tensor, that of one of its numbers.
        uses: those that were taken, of the same number read elsewhere too; empty where nothing uses it, or none was.
        refusal: why a use could not be taken; None where all were.
    """

    read: Read
    uses: tuple[Use, ...]
    refusal: Unremovable | None = None


class Uses:
    """The uses of the symbols of one graph."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._rule = ""  # the pass whose rule is at work, and on which operator
        self._node: Node | None = None
        self._taken: dict[sympy.Basic, dict[Use, None]] = {}
        self._refused: dict[sympy.Basic, Unremovable] = {}

    @contextlib.contextmanager
    def under(self, by: str, node: Node) -> Iterator[None]:
        """While a rule of a pass is at work on a node."""
        self._rule, self._node = by, node
        try:
            yield
        finally:
            self._rule, self._node = "", None

    def take(self, by: str, expression: sympy.Basic) -> None:
        """Note that a pass takes the symbols of an expression."""
        node = self._node
        use = Use(by, str(node.target), node.meta.get("site", ("", 0))) if node is not None else Use(by)
        if node is not None and node.meta.get("joins") is not None:  # not the step's, but what joins the sides of a branch
            use = use._replace(by="branches")
        if node is None or not node.meta.get("naming"):  # it gives a number a name; what uses that is to be noted
            for symbol in self._sources([expression]):
                self._taken.setdefault(symbol, {})[use] = None

    def take_given(self, expression: sympy.Basic) -> None:
        """The same of numbers that the operator at hand is given, by the pass at work; others are lengths it masks by."""
        if self._node is not None:
            given = set().union(*(self._facts.resolve(number).free_symbols for number in _numbers(self._node)))
            for symbol in self._facts.resolve(expression).free_symbols & given:
                self.take(self._rule, symbol)

    def refuse(self, node: Node, reason: Unremovable) -> None:
        """Note that no pass takes the numbers that an operator is given, and the sizes of its results."""
        self.refuse_all([*_numbers(node), *_sizes(node)], reason)

    def refuse_all(self, expressions: Iterable[sympy.Basic], reason: Unremovable) -> None:
        """The same of the numbers that expressions are made of."""
        for symbol in self._sources(expressions):
            self._refused.setdefault(symbol, reason)

    def host_values(self) -> tuple[HostValue, ...]:
        """What was noted of each value that the host read, in the order of the reads."""
        for asked in self._facts.asked:
            self.take("branches", asked)
        found: dict[object, tuple[Read, list[sympy.Symbol]]] = {}
        for symbol, reads in (*self._facts.reads.items(), *self._facts.read_again.items()):
            for read in reads:
                found.setdefault((read.operator, read.site, read.call), (read, []))[1].append(symbol)
        return tuple(self._value(*one) for one in sorted(found.values(), key=lambda one: one[0].call))

    def _value(self, read: Read, symbols: list[sympy.Symbol]) -> HostValue:
        """One value, or all numbers of one tensor."""
        uses = dict.fromkeys(use for symbol in symbols for use in self._taken.get(symbol, ()))
        refusal = next((self._refused[symbol] for symbol in symbols if symbol in self._refused), None)
        return HostValue(read, tuple(uses), refusal)

    def _sources(self, expressions: Iterable[sympy.Basic]) -> set[sympy.Basic]:
        """The symbols that expressions are made of, with those that operators of the graph made them of."""
        found: set[sympy.Basic] = set()
        waiting = [*expressions]
        while waiting:
            for symbol in self._facts.resolve(waiting.pop()).free_symbols - found:
                found.add(symbol)
                computed = self._facts.computed.get(symbol)  # type: ignore[call-overload]
                waiting += [operand for operand, _ in computed.operands] if computed is not None else []
        return found


def _numbers(node: Node) -> Iterator[sympy.Basic]:
    """The numbers that only the device knows among what an operator is given."""
    return (expression_of(number) for number in tree_leaves((node.args, node.kwargs)) if is_symbol(number))


def _sizes(node: Node) -> Iterator[sympy.Basic]:
    """The sizes of its results that only the device knows."""
    results = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return (expression_of(size) for value in results for size in value.shape if isinstance(size, SYMBOLS))
