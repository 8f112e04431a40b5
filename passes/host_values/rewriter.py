"""Rebuilding an ATen graph node by node, with host values as 0-d tensors and data-dependent lengths as bounds.

A rule is given a node and its arguments as they are in the new graph, and returns what stands for it there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from passes.core.schema import is_mutable, returns_view, silently_written
from passes.core.symbols import is_symbol
from passes.core.traced_step import TracedStep
from passes.core.values.legal_operands import PARTIAL
from passes.errors import Unremovable
from passes.host_values.forced.forcing import ITEM, Marks, read_here, with_tensor
from passes.host_values.lengths import NoRule, PaddedConstruction

Tensor = torch.Tensor
aten = torch.ops.aten
Rule = Callable[["Rewriter", Node, tuple[Any, ...], dict[str, Any]], Any]
"""Takes the rewriter, the old node, and its arguments in the new graph; returns the new value, or None to have it copied."""
_MOVES = (aten._to_copy.default, aten.copy_.default)


class Rewriter(PaddedConstruction):
    """One walk over the graph of a traced step.

    Attributes:
        changes: printed nodes before and after.
        guarded: whether indices are kept inside their tensors, with an assumption where they are not certain to be.
        trusted: whether an index was left for its operator to check; only where not ``guarded``.
        marks: where given, the tensors that host values are read from are marked; see `passes.host_values.forced.forcing`.
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
        super().__init__(traced, bounds, checked, exact)
        self.rules, self.default, self.finish, self.marks = rules, default, finish, marks
        self.guarded, self.trusted = guarded, False
        self.env: dict[Node, Any] = {}
        self.changes: list[tuple[str, str]] = []

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
        is_operator = getattr(node.target, "_schema", None) is not None
        conditional = is_operator and self.trips and (is_mutable(node.target) or node.target in PARTIAL)
        if is_operator and (self.sized_by_symbols(node) or conditional):
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
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Node)]
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


def _keeps_zeros(made: Node, first: Sequence[Any]) -> bool:
    """Whether what was made from a node has zeros where that has."""
    if made.op != "call_function" or not all(isinstance(value, Node) and value.meta.get("zeros") for value in first):
        return False
    return bool(first) and (returns_view(made.target) or made.target is aten._to_copy.default)


def _text(value: Any) -> str:
    return (value.format_node() or str(value)) if isinstance(value, Node) else str(value)
