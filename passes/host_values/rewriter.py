"""Rebuilding an ATen graph node by node, with host values as 0-d tensors and data-dependent lengths as bounds.

A rule is given a node and its arguments as they are in the new graph, and returns what stands for it there. Four things
travel with the nodes of the new graph: the fake value (``meta["val"]``), the user's line (``meta["site"]``), and for
padded tensors the true lengths of their dimensions (``meta["lengths"]``, expressions by dimension). What lies beyond a
true length is undefined, unless ``meta["zeros"]`` says that it is zero (``"exactly"``, or in rows that are not all NaN); a
rule that mixes rows replaces it by the neutral element of what it computes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._sympy import functions as sympy_functions

from passes.core.aliasing import Aliases, returns_view, silently_written
from passes.core.facts import Assumption
from passes.core.names import PASS_CONSTANT, fresh_name
from passes.core.predicates import BranchArm, Iteration
from passes.core.source_location import Site
from passes.core.symbols import SYMBOLS, expression_of, is_symbol
from passes.core.traced_step import TracedStep
from passes.core.values.legal_operands import PARTIAL
from passes.errors import Unremovable
from passes.host_values.forcing import Marks, read_here, with_tensor
from passes.host_values.predicated_writes import predicated_write
from passes.host_values.scalars import Scalars
from passes.host_values.upper_bounds import Bounds

Tensor = torch.Tensor
aten = torch.ops.aten
ITEM = aten._local_scalar_dense.default
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


def symbolic_sizes(node: Node) -> list[Any]:
    """The sizes of a traced result that are symbols."""
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    sizes: list[Any] = [size for value in leaves if isinstance(value, Tensor) for size in value.shape]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


class Rewriter:
    """One walk over the graph of ``module``.

    Attributes:
        changes: printed nodes before and after.
        exact: symbols that are taken at their hint, as an assumption, because some operator has no rule.
        guarded: whether indices are kept inside their tensors, with an assumption where they are not certain to be.
        trusted: whether an index was left for its operator to check; only where not ``guarded``.
        checks: 0-d flags that have to be true besides what the graph assumes of host values.
        marks: where given, the tensors that host values are read from are marked; see `passes.host_values.forcing`.
    """

    def __init__(
        self,
        traced: TracedStep,
        rules: Mapping[Any, Rule],
        default: Rule | None = None,
        bounds: Mapping[str, int] | None = None,
        exact: frozenset[sympy.Symbol] = frozenset(),
        finish: Callable[[Rewriter, list[Any]], list[Any]] | None = None,
        guarded: bool = True,
        checked: bool = False,
        marks: Marks | None = None,
    ) -> None:
        self.module, self.rules, self.default, self.exact, self.finish = traced.module, rules, default, exact, finish
        self.facts = traced.facts
        self.bounds = Bounds(self.facts, bounds)
        self.graph = Graph(owning_module=traced.module)
        self.env: dict[Node, Any] = {}
        self.site: Site = ("", 0)
        self.trips: tuple[Iteration | BranchArm, ...] = ()
        self.guarded, self.trusted, self._checked = guarded, False, checked
        self.changes: list[tuple[str, str]] = []
        self.marks = marks
        self.checks: list[Node] = []
        self._cache: dict[Any, Node] = {}
        self.aliases = Aliases(self)
        self._scalars = Scalars(self)

    def run(self) -> Graph:
        """Build the new graph.

        Raises:
            Unremovable: a rule cannot do its work.
        """
        for node in self.module.graph.nodes:
            self.site, self.trips = node.meta.get("site", self.site), tuple(node.meta.get("trips", ()))
            self.env[node] = self._visit(node)
        return self.graph

    def _visit(self, node: Node) -> Any:
        args, kwargs = self._together(node, *self._loaded(node))
        if self.marks is not None and (forcing := self.marks.of(node)) is not None:
            args = with_tensor(args, forcing.positions[str(node.target)], functools.partial(self._marked, number=forcing.number))
        if node.op == "output":
            return self._output(node, args[0])
        if node.op == "call_function":
            made = self._by_rule(node, args, kwargs)
            if made is not None:
                self.changes.append((_text(node), _text(made)))
                if isinstance(made, Node) and _keeps_zeros(made, args[:1]):
                    made.meta["zeros"] = args[0].meta["zeros"]
                return made
        schema = getattr(node.target, "_schema", None)
        conditional = self.trips and (schema.is_mutable or node.target in PARTIAL) if schema is not None else False
        if schema is not None and (self.sized_by_symbols(node) or conditional):
            return self.call(node.target, *args, **kwargs)  # symbols that turned out to be constants; what has a condition
        if self.trips and silently_written(node.target, args, kwargs):  # type: ignore[arg-type]
            raise Unremovable("it writes statistics in a way that has no condition", str(node.target), self.site)
        copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)  # type: ignore[arg-type]
        copied.meta = dict(node.meta)
        self.aliases.made(copied)
        if node.target is ITEM:
            self._read(node, args[0])
        return copied

    def _marked(self, value: Any, number: int) -> Any:
        made = self.graph.call_function(read_here, (value, number))
        made.meta = {key: item for key, item in value.meta.items() if key not in ("predicate", "limits")}
        return made

    def _by_rule(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the rule of an operator makes of it, or the default where that has nothing to say."""
        rule = self.rules.get(node.target)
        made = rule(self, node, args, kwargs) if rule is not None else None
        return self.default(self, node, args, kwargs) if made is None and self.default is not None else made

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
        """Arguments on one device: an operator takes a 0-d tensor of the host's as a number, which would be frozen.

        What was all on the host meets values here that were left on the device, and moves to them.
        """
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Node)]
        tensors = [a for a in tensors if isinstance(a.meta.get("val"), Tensor)]
        devices = {a.meta["val"].device for a in tensors}
        away = next((device for device in devices if device.type != "cpu"), None)
        if len(devices) < 2 or away is None or node.target in _MOVES:
            return args, kwargs
        traced = {n.meta["val"].device for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)}
        host = [a for a in tensors if a.meta["val"].device.type == "cpu" and (not a.meta["val"].dim() or len(traced) == 1)]

        def moved(value: Any) -> Any:
            if isinstance(value, Node) and value in host:
                return self.call(aten._to_copy.default, value, device=away)
            if isinstance(value, (tuple, list)):
                return type(value)(moved(item) for item in value)
            return value

        return tuple(map(moved, args)), {key: moved(value) for key, value in kwargs.items()}

    def _read(self, node: Node, tensor: Node) -> None:
        """Keep what the host read here: the tensor may be written before the value is used."""
        if self.aliases.is_written(node.args[0]):  # type: ignore[arg-type]
            tensor = self.call(aten.clone.default, tensor)
        self.changes.append((_text(node), _text(tensor)))
        self.define(node.meta["val"], tensor)

    def _output(self, node: Node, values: Any) -> Node:
        for value in values:
            if is_symbol(value):
                raise Unremovable(
                    "the step returns a number that only the device knows", "output", self.site, "Return the tensor"
                )
            symbols = {s for length in self.lengths(value).values() for s in self.facts.resolve(length).free_symbols}
            if symbols:
                raise NoRule("the step returns a tensor whose size depends on data", "output", self.site, symbols)
        self._scalars.check_definitions()
        if self.finish is not None:
            values = self.finish(self, list(values))
        made = self.graph.output(values)
        made.meta = dict(node.meta)
        return made

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, with its fake value. A write inside a trip of a loop takes place if the trip does."""
        if self.trips and target._schema.is_mutable and not self._is_local(args[0]):
            return predicated_write(self, target, args, kwargs)
        return self.plain(target, *args, **kwargs)

    def _is_local(self, tensor: Node) -> bool:
        """Whether a tensor was made by the trip that runs now."""
        root = self.aliases.root(tensor)
        return isinstance(root, Node) and tuple(root.meta.get("trips", ()))[: len(self.trips)] == self.trips

    def running(self) -> Any:
        """Whether the trips and sides that the current node belongs to take place: a 0-d flag, or True where they must."""
        return self.number(sympy.And(*[trip.predicate for trip in self.trips]))

    def plain(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, with its fake value. One that refuses some values says when that matters."""
        runs = self.running() if self.trips and target in PARTIAL else None
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(site=self.site, trips=self.trips, predicate=runs)
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            with self.facts.mode, torch.no_grad():
                node.meta["val"] = target(*values[0], **values[1])
        except Unremovable as reason:  # a size that is still a symbol
            raise Unremovable(reason.detail, str(target), self.site) from reason
        self.aliases.made(node)
        return node

    def constant(self, value: Tensor) -> Node:
        """A tensor that every run of the graph reads."""
        name = fresh_name(self.module, PASS_CONSTANT)
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

    def kept_within(self, index: Node, size: int) -> Node:
        """A 0-d index as one from the front of ``size`` rows, whatever it is; made once."""
        key = ("within", index, size)
        if key not in self._cache:
            self._cache[key] = self.call(aten.remainder.Scalar, index, size)
        return self._cache[key]

    # host values as 0-d tensors

    def define(self, value: Any, tensor: Node) -> None:
        """Say that the 0-d ``tensor`` holds the symbol of ``value``."""
        self._scalars.define(value, tensor)

    def scalar(self, value: Any) -> Any:
        """A number as it is, or the 0-d tensor (int64, float64 or bool) that stands for a symbol."""
        return self._scalars.of(value)

    def number(self, expression: sympy.Basic) -> Any:
        """An integer or boolean expression as a number, or as a 0-d tensor."""
        return self._scalars.number(expression)

    def home(self, device: torch.device, *numbers: Any) -> torch.device:
        """Where to make a tensor that the step makes on ``device`` from ``numbers``: the host does not wait for them."""
        held = [self.scalar(number) for number in numbers]
        found = [value.meta["val"].device for value in held if isinstance(value, Node)]
        return next((away for away in found if away.type != "cpu"), device) if device.type == "cpu" else device

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

    def item(self, node: Node, index: int) -> Node:
        """One of several results."""
        made = self.graph.call_function(operator.getitem, (node, index))
        made.meta.update(val=node.meta["val"][index], site=self.site)
        return made

    def front(self, node: Node, dim: int, count: int) -> Node:
        """``node`` with no more than ``count`` rows of a dimension, of which the true ones are among the first."""
        if node.meta["val"].shape[dim] <= count:
            return node
        return self.padded(self.call(aten.slice.Tensor, node, dim, 0, count), self.lengths(node))

    def replaced(self, symbol: sympy.Symbol, value: int) -> None:
        """Take a symbol, whose tensor is known, for a number from here on: an assumption that the graph checks."""
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
                raise Unremovable("the size depends on a value that the eager run did not read", "size", self.site)
            self.assume(sympy.Eq(expression, hint))
            return int(hint)
        largest = self.bounds.of(expression)
        if largest is None:
            sites = [self.facts.sources.get(symbol, self.site) for symbol in sorted(expression.free_symbols, key=str)]
            name = f"{sites[0][0].rsplit('/', 1)[-1]}:{sites[0][1]}" if sites else "name"
            remedy = f'Pass bounds={{"{name}": the largest value}}'
            raise Unremovable(f"a length ({expression}) has no upper bound", "size", self.site, remedy)
        self.assume(expression <= largest)
        return largest

    def size(self, value: Any) -> int:
        """A size argument of an operator as a static number."""
        return self.bound(expression_of(value)) if is_symbol(value) else int(value)

    def is_uncertain(self, decision: Assumption) -> bool:
        """Whether the graph has to check what it assumes."""
        return not self.bounds.certain(self.bounds.of_signs(self.facts.resolve(decision.condition)))

    def assume(self, condition: sympy.Basic) -> None:
        """Add a condition to what the graph assumes; in a trip of a loop or a side of a branch it matters if that takes place."""
        self.facts.decide(sympy.Or(*[sympy.Not(trip.predicate) for trip in self.trips], condition), True, self.site)

    def require(self, holds: Node, expression: sympy.Basic | None = None, *, here: bool = False) -> None:
        """Raise the flag in runs where a 0-d flag is false: there eager raises, or goes a way of its own.

        Args:
            expression: the same as a condition on host values, where it is one.
            here: whether that matters only if the trips and sides take place that the current node belongs to.

        Raises:
            Unremovable: nothing checks the flag, or it is false in the traced run.
        """
        if not self._checked:
            remedy = 'Add "branches" to the passes, which check this in every run'
            raise Unremovable("the step raises for some values, which nothing would check", "scalar", self.site, remedy)
        if expression is not None and self.facts.hint(expression) == sympy.false:
            raise Unremovable(f"the step itself does not keep to {expression}", "scalar", self.site)
        runs = self.running() if here and self.trips else True
        if isinstance(runs, Node):
            holds = self.call(aten.logical_or.default, self.call(aten.logical_not.default, runs), holds)
        self.checks.append(holds)

    @property
    def can_check(self) -> bool:
        """Whether what the current operator relies on can be checked by the graph, for all of its runs."""
        return self._checked and not self.trips

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
                if isinstance(part, SYMBOLS):
                    found |= self.facts.resolve(part.node.expr).free_symbols
        return found

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


def _keeps_zeros(made: Node, first: Sequence[Any]) -> bool:
    """Whether what was made from a node has zeros where that has."""
    if made.op != "call_function" or not all(isinstance(value, Node) and value.meta.get("zeros") for value in first):
        return False
    return bool(first) and (returns_view(made.target) or made.target is aten._to_copy.default)


_MOVES = (aten._to_copy.default, aten.copy_.default)
