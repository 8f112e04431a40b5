"""Padded tensors of a graph under construction: lengths that only the device knows, as bounds and masks.

The true lengths of a padded tensor's dimensions travel with its node (``meta["lengths"]``, expressions by dimension). What lies
beyond a true length is undefined, unless ``meta["zeros"]`` says that it is zero (``"exactly"``, or in rows that are not all
NaN); a rule that mixes rows replaces it by the neutral element of what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import sympy
import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves
from torch.utils._sympy import functions as sympy_functions

from passes.core.symbols import SYMBOLS, expression_of, is_symbol
from passes.core.traced_step import TracedStep
from passes.errors import Unremovable
from passes.host_values.construction import Construction

Tensor = torch.Tensor
aten = torch.ops.aten
Lengths = dict[int, sympy.Basic]


class NoBound(Unremovable):
    """A length has no static size that could stand for it."""


class NoRule(NoBound):
    """An operator has no rule for a padded argument; it can still run where the lengths are taken at their hints."""


def symbolic_sizes(node: Node) -> list[Any]:
    """The sizes of a traced result that are symbols."""
    leaves = tree_leaves(node.meta.get("val"))
    sizes: list[Any] = [size for value in leaves if isinstance(value, Tensor) for size in value.shape]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


class PaddedConstruction(Construction):
    """A graph under construction in which tensors may be padded.

    Attributes:
        exact: symbols that are taken at their hint, as an assumption, because some operator has no rule.
    """

    def __init__(
        self, traced: TracedStep, bounds: Mapping[str, int] | None, checked: bool, exact: frozenset[sympy.Symbol]
    ) -> None:
        super().__init__(traced, bounds, checked)
        self.exact = exact

    def lengths(self, node: Any) -> Lengths:
        """The true lengths of a padded tensor's dimensions, by dimension; empty for a tensor that is not padded."""
        return node.meta.get("lengths", {}) if isinstance(node, Node) else {}

    def expected(self, node: Node, index: int | None = None) -> Lengths:
        """The lengths that the result of an old node has, from its traced value."""
        value = node.meta["val"] if index is None else node.meta["val"][index]
        return {
            dim: self.facts.resolve(size.node.expr)
            for dim, size in enumerate(value.shape)
            if isinstance(size, torch.SymInt) and self.facts.resolve(size.node.expr).free_symbols
        }

    def padded(self, node: Node, lengths: Lengths) -> Node:
        """Mark ``node`` as padded; a length that is taken at its hint is no length."""
        kept = {dim: e for dim, e in lengths.items() if not self.is_exact(e)}
        if kept:
            node.meta["lengths"] = kept
        return node

    def has_dynamic_result(self, node: Node) -> bool:
        """Whether a traced result has a size that only the device knows."""
        sizes = [self.facts.resolve(size.node.expr) for size in symbolic_sizes(node)]
        return any(size.free_symbols and not self.is_exact(size) for size in sizes)

    def sized_by_symbols(self, node: Node) -> bool:
        """Whether a traced result has symbols for sizes, be they constants."""
        return bool(symbolic_sizes(node))

    def results(self, node: Node, made: Node) -> Any:
        """``made`` with the lengths of the old node's result, or a tuple where there are several."""
        if isinstance(made.meta["val"], Tensor):
            return self.padded(made, self.expected(node))
        count = len(made.meta["val"])
        return tuple(self.padded(self.item(made, index), self.expected(node, index)) for index in range(count))

    def front(self, node: Node, dim: int, count: int) -> Node:
        """``node`` with no more than ``count`` rows of a dimension, of which the true ones are among the first."""
        if node.meta["val"].shape[dim] <= count:
            return node
        return self.padded(self.call(aten.slice.Tensor, node, dim, 0, count), self.lengths(node))

    def replaced(self, symbol: sympy.Symbol, value: int) -> None:
        """Take a symbol, whose tensor is known, for a number from here on: an assumption that the graph checks."""
        self.uses.take("branches", symbol)
        self.facts.replacements[symbol] = sympy.Integer(value)

    def fresh_length(self, node: Node) -> torch.SymInt:
        """A new symbol, for a count that the traced graph has no name for; its hint is not known."""
        with self.facts.mode:
            return self.facts.mode.shape_env.create_unbacked_symint()  # type: ignore[union-attr]

    def is_exact(self, expression: sympy.Basic) -> bool:
        """Whether a length is taken at its hint."""
        return bool(self.facts.resolve(expression).free_symbols & self.exact)

    def bound(self, expression: Any) -> int:
        """The static size that stands for a length; the hint itself for exact ones, as an assumption.

        Raises:
            Unremovable: nothing bounds it.
        """
        expression = self.facts.resolve(sympy.sympify(expression))
        if expression.is_Integer:
            return int(expression)
        if self.is_exact(expression):
            hint = self.facts.hint(expression)
            if hint is None:
                raise NoBound("the size depends on a value that the eager run did not read", "size", self.site)
            self.assume_value(expression, hint)
            return int(hint)
        largest = self.bounds.of(expression)
        if largest is None:
            sites = [self.facts.sources.get(symbol, self.site) for symbol in sorted(expression.free_symbols, key=str)]
            name = f"{sites[0][0].rsplit('/', 1)[-1]}:{sites[0][1]}" if sites else "name"
            remedy = f'Pass bounds={{"{name}": the largest value}}'
            raise NoBound(f"a length ({expression}) has no upper bound", "size", self.site, remedy)
        self.uses.take("bounded", expression)
        self.assume(expression <= largest)
        return largest

    def size(self, value: Any) -> int:
        """A size argument of an operator as a static number."""
        return self.bound(expression_of(value)) if is_symbol(value) else int(value)

    def mask(self, node: Node, dims: list[int] | None = None) -> Node | None:
        """A boolean mask, broadcastable to ``node``, of what lies within its true lengths (of ``dims``, or of all)."""
        value, total = node.meta["val"], None
        for dim, expression in self.lengths(node).items():
            if dims is not None and dim not in dims:
                continue
            part = self.within(expression, value.shape[dim], value.device, value.dim() - dim - 1)
            total = part if total is None else self.call(aten.logical_and.default, total, part)
        return total

    def within(self, expression: sympy.Basic, count: int, device: torch.device, trailing: int = 0) -> Node:
        """``arange(count) < expression``, with ``trailing`` dimensions of size one behind."""
        return self._compared(aten.lt, expression, count, device, trailing)

    def beyond(self, expression: sympy.Basic, count: int, device: torch.device, trailing: int = 0) -> Node:
        """The opposite of `within`."""
        return self._compared(aten.ge, expression, count, device, trailing)

    def _compared(self, how: Any, expression: sympy.Basic, count: int, device: torch.device, trailing: int) -> Node:
        expression = self.bounds.simplified(self.facts.resolve(expression))
        expression = _in_range(expression, count)
        key = (how, expression, count, device)
        if key not in self._cache:
            length = self.number(expression)
            made = self.call(how.Tensor if isinstance(length, Node) else how.Scalar, self.iota(count, device), length)
            self._cache[key] = made
        return self.call(aten.view.default, self._cache[key], [count] + [1] * trailing) if trailing else self._cache[key]

    def keep(self, target: Node, new: Node) -> Node:
        """What to write to ``target``: ``new`` within its true lengths, what is there beyond them."""
        mask = self.mask(target)
        return new if mask is None else self.call(aten.where.self, mask, new, target)

    def neutral(self, node: Node, fill: float | bool, dims: list[int] | None = None) -> Node:
        """``node`` with ``fill`` beyond its true lengths."""
        value, made = node.meta["val"], node
        if node.meta.get("zeros") == "exactly" and fill == 0:
            return node
        for dim, expression in self.lengths(node).items():
            if dims is None or dim in dims:
                beyond = self.beyond(expression, value.shape[dim], value.device, value.dim() - dim - 1)
                made = self.call(aten.masked_fill.Scalar, made, beyond, fill)
        return self.padded(made, self.lengths(node))

    def no_rule(self, detail: str, node: Node) -> NoReturn:
        """Give up on the lengths that a node meets.

        Raises:
            NoRule: always.
        """
        symbols = {
            s for value in tree_leaves((node.args, node.kwargs, node)) if isinstance(value, Node) for s in self._symbols_of(value)
        }
        raise NoRule(detail, str(node.target), self.site, symbols=symbols)

    def _symbols_of(self, node: Node) -> set[sympy.Symbol]:
        found: set[sympy.Symbol] = set()
        for value in tree_leaves(node.meta.get("val")):
            for part in value.shape if isinstance(value, Tensor) else (value,):
                if isinstance(part, SYMBOLS):
                    found |= self.facts.resolve(part.node.expr).free_symbols
        return found


def _in_range(expression: sympy.Basic, count: int) -> sympy.Basic:
    """A limit of rows written shorter: no row of ``count`` lies behind a larger number, or before zero."""
    for kinds, is_idle in (
        ((sympy.Max, sympy_functions.Max), lambda part: part.is_Integer and part <= 0),
        ((sympy.Min, sympy_functions.Min), lambda part: part.is_Integer and part >= count),
        ((sympy.Max, sympy_functions.Max), lambda part: part.is_Integer and part <= 0),
    ):
        if isinstance(expression, kinds):
            kept = [part for part in expression.args if not is_idle(part)]
            expression = type(expression)(*kept) if kept else expression
    return expression
