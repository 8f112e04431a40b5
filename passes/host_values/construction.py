"""The graph that host values are taken out of, while it is built: its nodes, and on what conditions it holds.

Four things travel with a node: its fake value (``meta["val"]``), the user's line (``meta["site"]``), the iterations and branch
arms it belongs to (``meta["trips"]``), and for an operator that refuses some values when that matters (``meta["predicate"]``).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from passes.core.aliasing import Aliases
from passes.core.facts import Assumption
from passes.core.names import PASS_CONSTANT, fresh_name
from passes.core.predicates import BranchArm, Iteration
from passes.core.schema import is_mutable
from passes.core.source_location import Site
from passes.core.traced_step import TracedStep
from passes.core.values.legal_operands import PARTIAL
from passes.errors import Unremovable
from passes.host_values.predicated_writes import predicated_write
from passes.host_values.scalars import Scalars
from passes.host_values.upper_bounds import Bounds

Tensor = torch.Tensor
aten = torch.ops.aten


class Construction:
    """A graph under construction, with host values as 0-d tensors; an `Emitter`.

    Attributes:
        module: the traced graph.
        graph: the new one.
        facts, bounds: what is known of the symbols, and their largest values.
        site, trips: the user's line, and the iterations and branch arms, that new nodes belong to.
        aliases: which nodes of the new graph share memory.
        checks: 0-d flags that have to be true besides what the graph assumes of host values.
    """

    def __init__(self, traced: TracedStep, bounds: Mapping[str, int] | None, checked: bool) -> None:
        self.module, self.facts = traced.module, traced.facts
        self.graph = Graph(owning_module=traced.module)
        self.bounds = Bounds(self.facts, bounds)
        self.site: Site = ("", 0)
        self.trips: tuple[Iteration | BranchArm, ...] = ()
        self.checks: list[Node] = []
        self._checked = checked
        self._cache: dict[Any, Node] = {}
        self.aliases = Aliases(self)
        self._scalars = Scalars(self)

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

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, with its fake value. A write inside an iteration takes place if the iteration does."""
        if self.trips and is_mutable(target) and not self._is_local(args[0]):
            return predicated_write(self, target, args, kwargs)
        return self.plain(target, *args, **kwargs)

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

    def _is_local(self, tensor: Node) -> bool:
        """Whether a tensor was made by the iteration that runs now."""
        root = self.aliases.root(tensor)
        return isinstance(root, Node) and tuple(root.meta.get("trips", ()))[: len(self.trips)] == self.trips

    def running(self) -> Any:
        """Whether the iterations and arms that the current node belongs to take place: a 0-d flag, or True where they must."""
        return self.number(sympy.And(*[trip.predicate for trip in self.trips]))

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

    def item(self, node: Node, index: int) -> Node:
        """One of several results."""
        made = self.graph.call_function(operator.getitem, (node, index))
        made.meta.update(val=node.meta["val"][index], site=self.site)
        return made

    def assume(self, condition: sympy.Basic) -> None:
        """Add a condition to what the graph assumes; in an iteration or an arm it matters if that takes place."""
        self.facts.decide(sympy.Or(*[sympy.Not(trip.predicate) for trip in self.trips], condition), True, self.site)

    def require(self, holds: Node, expression: sympy.Basic | None = None, *, here: bool = False) -> None:
        """Raise the flag in runs where a 0-d flag is false: there eager raises, or goes a way of its own.

        Args:
            expression: the same as a condition on host values, where it is one.
            here: whether that matters only if the iterations and arms take place that the current node belongs to.

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

    def is_uncertain(self, assumption: Assumption) -> bool:
        """Whether the graph has to check what it assumes."""
        return not self.bounds.certain(self.bounds.of_signs(self.facts.resolve(assumption.condition)))
