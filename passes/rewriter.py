"""Rebuilding an ATen graph node by node, with host values as 0-d tensors and data-dependent lengths as bounds.

A rule is given a node and its arguments as they are in the new graph, and returns what stands for it there. Three things
travel with the nodes of the new graph: the fake value (``meta["val"]``), the user's line (``meta["site"]``), and for
padded tensors the true lengths of their dimensions (``meta["lengths"]``, expressions by dimension). What lies beyond a
true length is undefined; a rule that mixes rows replaces it by the neutral element of what it computes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy import functions as sympy_functions

from passes.bounds import Bounds
from passes.errors import Unremovable
from passes.tracing import Facts, Site

Tensor = torch.Tensor
aten = torch.ops.aten
ITEM = aten._local_scalar_dense.default
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
Lengths = dict[int, sympy.Basic]
Rule = Callable[["Rewriter", Node, tuple[Any, ...], dict[str, Any]], Any]
"""Takes the rewriter, the old node, and its arguments in the new graph; returns the new value, or None to have it copied."""


def is_symbol(value: Any) -> bool:
    """Whether a value of a graph is a number that only the device knows."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), _SYMBOLIC)


def expression_of(value: Any) -> sympy.Basic:
    """The expression of a number, or of a node that stands for one."""
    value = value.meta["val"] if isinstance(value, Node) else value
    return value.node.expr if isinstance(value, _SYMBOLIC) else sympy.sympify(value)


class Rewriter:
    """One walk over the graph of ``module``.

    Attributes:
        changes: printed nodes before and after.
        exact: symbols that are taken at their hint, as an assumption, because some operator has no rule.
    """

    def __init__(
        self,
        module: GraphModule,
        rules: Mapping[Any, Rule],
        default: Rule | None = None,
        bounds: Mapping[str, int] | None = None,
        exact: frozenset[sympy.Symbol] = frozenset(),
    ) -> None:
        self.module, self.rules, self.default, self.exact = module, rules, default, exact
        self.facts: Facts = module.meta["facts"]
        self.bounds = Bounds(self.facts, bounds)
        self.graph = Graph(owning_module=module)
        self.env: dict[Node, Any] = {}
        self.site: Site = ("", 0)
        self.changes: list[tuple[str, str]] = []
        self._symbols: dict[sympy.Symbol, Node] = {}
        self._cache: dict[Any, Node] = {}
        self._constants = 0

    def run(self) -> Graph:
        """Build the new graph.

        Raises:
            Unremovable: a rule cannot do its work.
        """
        for node in self.module.graph.nodes:
            self.site = node.meta.get("site", self.site)
            self.env[node] = self._visit(node)
        return self.graph

    def _visit(self, node: Node) -> Any:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        if node.op == "call_function":
            rule = self.rules.get(node.target, self.default)
            made = rule(self, node, args, kwargs) if rule is not None else None
            if made is not None:
                self.changes.append((node.format_node() or str(node), str(made)))
                return made
        copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)  # type: ignore[arg-type]
        copied.meta = dict(node.meta)
        if node.target is ITEM:
            self.define(node.meta["val"], args[0])
        return copied

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["site"] = self.site
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.facts.mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def constant(self, value: Tensor) -> Node:
        """A tensor that every run of the graph reads."""
        while hasattr(self.module, f"_pass_constant_{self._constants}"):
            self._constants += 1
        name = f"_pass_constant_{self._constants}"
        self.module.register_buffer(name, value, persistent=False)
        node = self.graph.get_attr(name)
        node.meta.update(val=self.facts.mode.from_tensor(value, static_shapes=True), site=self.site)
        return node

    def iota(self, count: int, device: torch.device) -> Node:
        """``arange(count)``, made once."""
        key = ("iota", count, device)
        if key not in self._cache:
            self._cache[key] = self.constant(torch.arange(count, device=device))
        return self._cache[key]

    # host values as 0-d tensors

    def define(self, value: Any, tensor: Node) -> None:
        """Say that the 0-d ``tensor`` holds the symbol of ``value``."""
        expression = expression_of(value)
        if isinstance(expression, sympy.Eq):  # a flag is Eq(symbol, 1)
            expression = next(iter(expression.free_symbols))
        if isinstance(expression, sympy.Symbol) and expression not in self._symbols:
            self._symbols[expression] = tensor
            self._cache.pop(("scalar", expression), None)

    def scalar(self, value: Any) -> Any:
        """A number as it is, or the 0-d tensor (int64, float64 or bool) that stands for a symbol."""
        if not is_symbol(value):
            return value
        if isinstance(value.meta["val"], torch.SymFloat):
            return self._floating(value)
        return self.number(expression_of(value))

    def number(self, expression: sympy.Basic) -> Any:
        """An integer or boolean expression as a number, or as a 0-d tensor."""
        expression = self.facts.resolve(expression)
        if expression.is_Integer:
            return int(expression)
        if expression in (sympy.true, sympy.false):
            return bool(expression)
        if expression.is_Number:
            return float(expression)
        key = ("scalar", expression)
        if key not in self._cache:
            self._cache[key] = self._emit(expression)
        return self._cache[key]

    def _emit(self, expression: sympy.Basic) -> Any:
        if isinstance(expression, sympy.Symbol):
            if expression not in self._symbols:
                raise Unremovable(f"nothing in the graph holds the value of {expression}", "scalar", self.site)
            return self._zero_dim(self._symbols[expression])
        made = _OPERATIONS.get(type(expression))
        if made is None:
            raise Unremovable(f"{type(expression).__name__} has no operator for it", "scalar", self.site)
        values = [self.number(part) for part in expression.args]
        total = values[0]
        if len(values) == 1:
            return self.call(made, total)
        for value in values[1:]:
            if not isinstance(total, Node):
                total, value = (value, total) if type(expression) in _COMMUTING else (self._filled(total, value), value)
            if not isinstance(value, Node) and made in _OF_TENSORS:
                value = self._filled(value, total)
            total = self.call(made, total, value)
        return total

    def _filled(self, number: Any, like: Any) -> Node:
        dtype = torch.float64 if isinstance(number, float) else torch.int64
        return self.call(aten.full_like.default, like, number, dtype=dtype)

    def _zero_dim(self, tensor: Node) -> Node:
        value = tensor.meta["val"]
        kind = torch.float64 if value.dtype.is_floating_point else torch.int64
        made = tensor if value.dim() == 0 else self.call(aten.view.default, tensor, [])
        return made if value.dtype == kind else self.call(aten._to_copy.default, made, dtype=kind)

    def _floating(self, node: Node) -> Any:
        """A float symbol, operation by operation in float64, as Python computes it."""
        key = ("float", node)
        if key not in self._cache:
            if node.target is ITEM:
                made: Any = self._zero_dim(node.args[0])  # type: ignore[arg-type]
            elif node.target is torch.sym_float:
                made = self.call(aten._to_copy.default, self.scalar(node.args[0]), dtype=torch.float64)
            elif node.target in _PYTHON:
                values = [self.scalar(argument) for argument in node.args]
                made = self._python(_PYTHON[node.target], values)
            else:
                raise Unremovable("no operator computes this from a value on the device", str(node.target), self.site)
            self._cache[key] = made
        return self._cache[key]

    def _python(self, target: Any, values: list[Any]) -> Node:
        first = next(value for value in values if isinstance(value, Node))
        doubles = [
            self.call(aten._to_copy.default, v, dtype=torch.float64) if isinstance(v, Node) else self._filled(float(v), first)
            for v in values
        ]
        return self.call(target, *doubles)

    # lengths

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
                raise Unremovable("the size depends on a value that the eager run did not read", "size", self.site)
            self.facts.decide(sympy.Eq(expression, hint), True, self.site)
            return int(hint)
        largest = self.bounds.of(expression)
        if largest is None:
            name = next((f"{file.rsplit('/', 1)[-1]}:{line}" for s in expression.free_symbols for file, line in [self.facts.sources.get(s, self.site)]), "name")
            raise Unremovable(
                f"a length ({expression}) has no upper bound", "size", self.site, f'Pass bounds={{"{name}": the largest value}}'
            )
        self.facts.decide(expression <= largest, True, self.site)
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
        key = ("within", expression, count, device, trailing)
        if key not in self._cache:
            length = self.number(expression)
            compare = aten.lt.Tensor if isinstance(length, Node) else aten.lt.Scalar
            made = self.call(compare, self.iota(count, device), length)
            self._cache[key] = self.call(aten.view.default, made, [count] + [1] * trailing) if trailing else made
        return self._cache[key]

    def neutral(self, node: Node, fill: float | bool, dims: list[int] | None = None) -> Node:
        """``node`` with ``fill`` beyond its true lengths."""
        mask = self.mask(node, dims)
        if mask is None:
            return node
        value = node.meta["val"]
        other = self.call(aten.full.default, [], fill, dtype=value.dtype, device=value.device)
        return self.padded(self.call(aten.where.self, mask, node, other), self.lengths(node))


_COMMUTING = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.And, sympy.Or, sympy.Eq, sympy.Ne, sympy_functions.Max, sympy_functions.Min)
_OPERATIONS: dict[type, Any] = {
    sympy.Add: aten.add.Tensor,
    sympy.Mul: aten.mul.Tensor,
    sympy_functions.FloorDiv: aten.floor_divide.default,
    sympy_functions.CleanDiv: aten.floor_divide.default,
    sympy_functions.Mod: aten.remainder.Tensor,
    sympy_functions.PythonMod: aten.remainder.Tensor,
    sympy.Max: aten.maximum.default,
    sympy.Min: aten.minimum.default,
    sympy_functions.Max: aten.maximum.default,
    sympy_functions.Min: aten.minimum.default,
    sympy.Abs: aten.abs.default,
    sympy.Eq: aten.eq.Tensor,
    sympy.Ne: aten.ne.Tensor,
    sympy.Lt: aten.lt.Tensor,
    sympy.Le: aten.le.Tensor,
    sympy.Gt: aten.gt.Tensor,
    sympy.Ge: aten.ge.Tensor,
    sympy.And: aten.logical_and.default,
    sympy.Or: aten.logical_or.default,
    sympy.Not: aten.logical_not.default,
}
_OF_TENSORS = (aten.maximum.default, aten.minimum.default, aten.logical_and.default, aten.logical_or.default, aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.remainder.Tensor, aten.floor_divide.default)
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
