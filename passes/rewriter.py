"""Rebuilding an ATen graph node by node, with host values as 0-d tensors and data-dependent lengths as bounds.

A rule is given a node and its arguments as they are in the new graph, and returns what stands for it there. Three things
travel with the nodes of the new graph: the fake value (``meta["val"]``), the user's line (``meta["site"]``), and for
padded tensors the true lengths of their dimensions (``meta["lengths"]``, expressions by dimension). What lies beyond a
true length is undefined; a rule that mixes rows replaces it by the neutral element of what it computes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy import functions as sympy_functions

from passes.aliases import Aliases
from passes.bounds import Bounds
from passes.errors import Unremovable
from passes.sites import Site
from passes.tracing import Facts

Tensor = torch.Tensor
aten = torch.ops.aten
ITEM = aten._local_scalar_dense.default
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
Lengths = dict[int, sympy.Basic]
Rule = Callable[["Rewriter", Node, tuple[Any, ...], dict[str, Any]], Any]
"""Takes the rewriter, the old node, and its arguments in the new graph; returns the new value, or None to have it copied."""


class NoRule(Unremovable):
    """An operator has no rule for a padded argument; it can still run where the lengths are taken at their hints."""

    def __init__(self, detail: str, operator: str, site: Site, symbols: Iterable[sympy.Symbol]) -> None:
        super().__init__(detail, operator, site)
        self.symbols = frozenset(symbols)


def _text(value: Any) -> str:
    return (value.format_node() or str(value)) if isinstance(value, Node) else str(value)


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
        finish: Callable[[Rewriter, list[Any]], list[Any]] | None = None,
    ) -> None:
        self.module, self.rules, self.default, self.exact, self.finish = module, rules, default, exact, finish
        self.facts: Facts = module.meta["facts"]
        self.bounds = Bounds(self.facts, bounds)
        self.graph = Graph(owning_module=module)
        self.env: dict[Node, Any] = {}
        self.site: Site = ("", 0)
        self.changes: list[tuple[str, str]] = []
        self._symbols: dict[sympy.Symbol, Node] = {}
        self._cache: dict[Any, Node] = {}
        self._constants = 0
        self.aliases = Aliases(self)

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
        args, kwargs = self._together(node, *self._loaded(node))
        if node.op == "output":
            return self._output(node, args[0])
        if node.op == "call_function":
            rule = self.rules.get(node.target, self.default)
            made = rule(self, node, args, kwargs) if rule is not None else None
            if made is not None:
                self.changes.append((_text(node), _text(made)))
                return made
        if node.op == "call_function" and hasattr(node.target, "_schema") and self.sized_by_symbols(node):
            return self.call(node.target, *args, **kwargs)  # symbols that turned out to be constants
        copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)  # type: ignore[arg-type]
        copied.meta = dict(node.meta)
        self.aliases.made(copied)
        if node.target is ITEM:
            self._read(node, args[0])
        return copied

    def _loaded(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an old node in the new graph."""

        def load(value: Any) -> Any:
            if isinstance(value, Node):
                made = self.env[value]
                return self.aliases.fresh(made) if isinstance(made, Node) else made
            if isinstance(value, (tuple, list)):
                return type(value)(load(item) for item in value)
            return {key: load(item) for key, item in value.items()} if isinstance(value, dict) else value

        return tuple(load(value) for value in node.args), {key: load(value) for key, value in node.kwargs.items()}

    def _together(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments on one device: an operator takes a 0-d tensor of the host's as a number, which would be frozen."""
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Node)]
        tensors = [a for a in tensors if isinstance(a.meta.get("val"), Tensor)]
        devices = {a.meta["val"].device for a in tensors}
        away = next((device for device in devices if device.type != "cpu"), None)
        if len(devices) < 2 or away is None or node.target in _MOVES:
            return args, kwargs

        def moved(value: Any) -> Any:
            if isinstance(value, Node) and value in tensors and value.meta["val"].device.type == "cpu" and not value.meta["val"].dim():
                return self.call(aten._to_copy.default, value, device=away)
            if isinstance(value, (tuple, list)):
                return type(value)(moved(item) for item in value)
            return value

        return tuple(map(moved, args)), {key: moved(value) for key, value in kwargs.items()}

    def _read(self, node: Node, tensor: Node) -> None:
        """Keep what the host read here: the tensor may be written before the value is used."""
        if self.aliases.is_written_later(tensor):
            tensor = self.call(aten.clone.default, tensor)
        self.changes.append((_text(node), _text(tensor)))
        self.define(node.meta["val"], tensor)

    def _output(self, node: Node, values: Any) -> Node:
        for value in values:
            if is_symbol(value):
                raise Unremovable("the step returns a number that only the device knows", "output", self.site, "Return the tensor")
            symbols = {s for length in self.lengths(value).values() for s in self.facts.resolve(length).free_symbols}
            if symbols:
                raise NoRule("the step returns a tensor whose size depends on data", "output", self.site, symbols)
        if self.finish is not None:
            values = self.finish(self, list(values))
        made = self.graph.output(values)
        made.meta = dict(node.meta)
        return made

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["site"] = self.site
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.facts.mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        self.aliases.made(node)
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
        special = _SPECIAL.get(type(expression))
        if special is not None:
            return special(self, expression)
        made = _OPERATIONS.get(type(expression))
        if made is None:
            raise Unremovable(f"{type(expression).__name__} has no operator for it", "scalar", self.site)
        values = [self.number(part) for part in expression.args]
        if len(values) == 1:
            return self.call(made.default, *values)
        total = values[0]
        for value in values[1:]:
            total = self._combined(type(expression), made, total, value)
        return total

    def _combined(self, kind: type, packet: Any, a: Any, b: Any) -> Any:
        """One operator over two values, of which at least one is a tensor."""
        if not isinstance(a, Node) and not isinstance(b, Node):
            raise Unremovable(f"{kind.__name__} of two numbers is left over", "scalar", self.site)
        if not isinstance(a, Node) and kind in _SWAPPED:
            a, b, packet = b, a, _SWAPPED[kind] or packet
        if not isinstance(a, Node):
            a = self._filled(a, b)
        if isinstance(b, Node):
            return self.call(getattr(packet, "Tensor", packet.default) if hasattr(packet, "Tensor") else packet.default, a, b)
        if packet in _CLAMPS:
            return self.call(_CLAMPS[packet], a, b)
        if packet in (aten.logical_and, aten.logical_or):
            return a if b == (packet is aten.logical_and) else self._filled(b, a, torch.bool)
        return self.call(getattr(packet, "Scalar", None) or packet.Tensor, a, b)

    def _filled(self, number: Any, like: Any, dtype: torch.dtype | None = None) -> Node:
        dtype = dtype or (torch.float64 if isinstance(number, float) else torch.int64)
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

    def has_dynamic_result(self, node: Node) -> bool:
        """Whether a traced result has a size that only the device knows."""
        leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
        sizes = [size for value in leaves if isinstance(value, Tensor) for size in value.shape]
        return any(self.facts.resolve(size.node.expr).free_symbols for size in sizes if isinstance(size, torch.SymInt))

    def sized_by_symbols(self, node: Node) -> bool:
        """Whether a traced result has symbols for sizes, be they constants."""
        leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
        return any(isinstance(size, torch.SymInt) for value in leaves if isinstance(value, Tensor) for size in value.shape)

    def results(self, node: Node, made: Node) -> Any:
        """``made`` with the lengths of the old node's result, or a tuple where there are several."""
        if isinstance(made.meta["val"], Tensor):
            return self.padded(made, self.expected(node))
        count = len(made.meta["val"])
        return tuple(self.padded(self.item(made, index), self.expected(node, index)) for index in range(count))

    def item(self, node: Node, index: int) -> Node:
        """One of several results."""
        made = self.graph.call_function(operator.getitem, (node, index))
        made.meta.update(val=node.meta["val"][index], site=self.site)
        return made

    def replaced(self, symbol: sympy.Symbol, value: int) -> None:
        """Take a symbol for a number from here on, because the graph assumes it."""
        self.facts.definitions[symbol] = sympy.Integer(value)

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
        return self._compared(aten.lt, expression, count, device, trailing)

    def beyond(self, expression: sympy.Basic, count: int, device: torch.device, trailing: int = 0) -> Node:
        """The opposite of `within`."""
        return self._compared(aten.ge, expression, count, device, trailing)

    def _compared(self, how: Any, expression: sympy.Basic, count: int, device: torch.device, trailing: int) -> Node:
        key = (how, expression, count, device, trailing)
        if key not in self._cache:
            length = self.number(expression)
            made = self.call(how.Tensor if isinstance(length, Node) else how.Scalar, self.iota(count, device), length)
            self._cache[key] = self.call(aten.view.default, made, [count] + [1] * trailing) if trailing else made
        return self._cache[key]

    def keep(self, target: Node, new: Node) -> Node:
        """What to write to ``target``: ``new`` within its true lengths, what is there beyond them."""
        mask = self.mask(target)
        return new if mask is None else self.call(aten.where.self, mask, new, target)

    def no_rule(self, detail: str, node: Node) -> NoReturn:
        """Give up on the lengths that a node meets.

        Raises:
            NoRule: always.
        """
        symbols = {
            s
            for value in torch.utils._pytree.tree_leaves((node.args, node.kwargs, node))
            if isinstance(value, Node)
            for s in self._symbols_of(value)
        }
        raise NoRule(detail, str(node.target), self.site, symbols)

    def _symbols_of(self, node: Node) -> set[sympy.Symbol]:
        found: set[sympy.Symbol] = set()
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            for part in value.shape if isinstance(value, Tensor) else (value,):
                if isinstance(part, _SYMBOLIC):
                    found |= self.facts.resolve(part.node.expr).free_symbols
        return found

    def neutral(self, node: Node, fill: float | bool, dims: list[int] | None = None) -> Node:
        """``node`` with ``fill`` beyond its true lengths."""
        value, made = node.meta["val"], node
        for dim, expression in self.lengths(node).items():
            if dims is None or dim in dims:
                beyond = self.beyond(expression, value.shape[dim], value.device, value.dim() - dim - 1)
                made = self.call(aten.masked_fill.Scalar, made, beyond, fill)
        return self.padded(made, self.lengths(node))


_MOVES = (aten._to_copy.default, aten.copy_.default)
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


def _to_double(rw: Rewriter, expression: sympy.Basic) -> Any:
    return rw.call(aten._to_copy.default, rw.number(expression.args[0]), dtype=torch.float64)


def _to_whole(rounding: Any) -> Callable[[Rewriter, sympy.Basic], Any]:
    def emit(rw: Rewriter, expression: sympy.Basic) -> Any:
        return rw.call(aten._to_copy.default, rw.call(rounding, rw.number(expression.args[0])), dtype=torch.int64)

    return emit


def _divided(rw: Rewriter, expression: sympy.Basic) -> Any:
    """A true division of integers or floats, in float64 as Python does it."""
    a, b = (rw.number(part) for part in expression.args)
    like = a if isinstance(a, Node) else b
    doubles = [
        rw.call(aten._to_copy.default, v, dtype=torch.float64) if isinstance(v, Node) else rw._filled(float(v), like) for v in (a, b)
    ]
    return rw.call(aten.div.Tensor, *doubles)


def _chosen(rw: Rewriter, expression: sympy.Basic) -> Any:
    """A piecewise expression: the first value whose condition holds."""
    *cases, last = expression.args
    if last.args[1] != sympy.true:
        cases, last = list(expression.args), expression.args[-1]
    made = rw.number(last.args[0])
    for value, condition in reversed([case.args for case in cases]):
        holds = rw.number(condition)
        if isinstance(holds, bool):
            made = rw.number(value) if holds else made
            continue
        sides = [side if isinstance(side, Node) else rw._filled(side, holds) for side in (rw.number(value), made)]
        made = rw.call(aten.where.self, holds, *sides)
    return made


def _power(rw: Rewriter, expression: sympy.Basic) -> Any:
    base, exponent = (rw.number(part) for part in expression.args)
    if isinstance(base, Node) and not isinstance(exponent, Node):
        return rw.call(aten.pow.Tensor_Scalar, base, exponent)
    if isinstance(base, Node):
        return rw.call(aten.pow.Tensor_Tensor, base, exponent)
    return rw.call(aten.pow.Scalar, base, exponent)


_SPECIAL: dict[type, Callable[[Rewriter, sympy.Basic], Any]] = {
    sympy_functions.ToFloat: _to_double,
    sympy_functions.TruncToInt: _to_whole(aten.trunc.default),
    sympy_functions.FloorToInt: _to_whole(aten.floor.default),
    sympy_functions.CeilToInt: _to_whole(aten.ceil.default),
    sympy_functions.RoundToInt: _to_whole(aten.round.default),
    sympy_functions.IntTrueDiv: _divided,
    sympy_functions.FloatTrueDiv: _divided,
    sympy_functions.PowByNatural: _power,
    sympy.Piecewise: _chosen,
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
_CLAMPS = {aten.maximum: aten.clamp_min.default, aten.minimum: aten.clamp_max.default}
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
