"""What the nodes of a graph are views of, found by running view operators on tensors without data.

A view operator says everything about itself by the strides it gives a contiguous tensor. So no operator is known by name
here: what PyTorch's own schemas call a view is run, under whatever name the graph uses (function, method, ATen operator),
and described by its layout. Unknown sizes are stood in for by prime numbers, which divide nothing by accident.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from passes.core.node_calls import attribute, call, name_of
from passes.core.schema import COPIES, NEW, PHYSICAL, is_view, may_write
from passes.projections.layouts import Layout, compose, identity, layout_of

Tensor = torch.Tensor
_FOLDED = (*COPIES, "stack", "cat")
_ANALYSIS_FAILS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)  # an operator that is no such view
Source = Node | str
"""A node, or the qualified name of a parameter that a submodule reads."""


class View(NamedTuple):
    """A node as a view of ``root``."""

    root: Source
    layout: Layout


class GraphViews:
    """The views of one graph.

    Args:
        module: the graph with its parameters.
        constants: tensors that never change, besides parameters, by the name or target of the node that reads them.
        inputs: example inputs, for a graph whose nodes carry no metadata.
    """

    def __init__(self, module: GraphModule, constants: Mapping[str, Tensor], inputs: Sequence[Any] | None) -> None:
        self.module = module
        self.constants = constants
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        self.writes = [index for node, index in self.order.items() if may_write(node, module)]
        self._nodes = list(self.order)
        self._parents: dict[Node, Node] = {}
        self._memory: dict[Node, frozenset[Node]] = {}
        self.untraced = inputs is not None
        self._propagated = _propagated(module, inputs) if inputs is not None else {}
        self._primes: dict[Any, int] = {}
        self._views: dict[Source, list[View]] = {}

    def value(self, node: Node) -> Any:
        """What ``node`` evaluates to: fake tensors, sizes, numbers; None where that is not known."""
        if node in self._propagated:
            return self._propagated[node]
        if node.op == "get_attr":
            return attribute(self.module, str(node.target))
        return node.meta.get("val", node.meta.get("example_value"))

    def shape(self, source: Source) -> tuple[int, ...] | None:
        """The sizes of a tensor, unknown ones as primes; None for what is not known to be a strided tensor."""
        value = attribute(self.module, source) if isinstance(source, str) else self.value(source)
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        return tuple(self.number(size) for size in value.shape)

    def number(self, value: Any) -> Any:
        """``value`` with every symbolic integer in it replaced by a number."""
        if isinstance(value, torch.SymInt):
            expression = value.node.expr
            for symbol in expression.free_symbols - self._primes.keys():
                self._primes[symbol] = next(_primes_above(max(self._primes.values(), default=10_000)))
            return int(expression.xreplace({symbol: self._primes[symbol] for symbol in expression.free_symbols}))
        if isinstance(value, (tuple, list)):
            return type(value)([self.number(item) for item in value])
        return value

    def views(self, source: Source) -> list[View]:
        """``source`` as a view of itself, of what it is a view of, and so on: the farthest last."""
        if source not in self._views:
            shape = self.shape(source)
            found = [] if shape is None else [View(source, identity(shape))]
            taken = self._taken_from(source) if found and isinstance(source, Node) else None
            if taken is not None:
                parent, inner = taken
                self._parents[source] = parent  # type: ignore[index]
                composed = [View(root, whole) for root, outer in self.views(parent) if (whole := compose(outer, inner))]
                found += [view for view in composed if view.layout.shape == shape]
            self._views[source] = found
        return self._views[source]

    def _taken_from(self, node: Node) -> tuple[Node, Layout] | None:
        """The tensor that ``node`` is made from by one view operator or copy, and the layout of that step."""
        try:
            parent, stand_in, made = self._run(node)
        except _ANALYSIS_FAILS:
            return None
        if parent is None or not isinstance(made, Tensor) or made.dtype != stand_in.dtype or made.is_neg() or made.is_conj():
            return None
        if made.untyped_storage()._cdata == stand_in.untyped_storage()._cdata:
            return parent, layout_of(made)
        if name_of(node) in COPIES and made.shape == stand_in.shape and self._same_device(node, parent):
            return parent, identity(made.shape)
        return None

    def _run(self, node: Node) -> tuple[Node | None, Tensor, Any]:
        """Run a view operator on a stand-in for its first argument. Returns that argument, the stand-in and the result."""
        nothing = torch.empty(0, device="meta")
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or not is_view(name_of(node)) or may_write(node, self.module):
            return None, nothing, None
        if isinstance(self.value(source), (tuple, list)):  # an element of what unbind, chunk or split returned
            parent, stand_in, parts = self._run(source)
            return parent, stand_in, parts[int(node.args[1])] if isinstance(parts, (tuple, list)) else None  # type: ignore[arg-type]
        stand_in = self._stand_in(source)
        given = map_arg((node.args, node.kwargs), lambda n: stand_in if n is source else self._argument(n))
        return source, stand_in, call(node, *self.number(given))  # type: ignore[arg-type]

    def _argument(self, node: Node) -> Any:
        return self._stand_in(node) if isinstance(self.value(node), Tensor) else self.number(self.value(node))

    def _stand_in(self, node: Node) -> Tensor:
        shape = self.shape(node)
        if shape is None:
            raise TypeError(f"{node} is not known to be a tensor")
        return torch.empty(shape, dtype=self.value(node).dtype, device="meta")

    def _same_device(self, node: Node, other: Node) -> bool:
        return bool(self.value(node).device == self.value(other).device)

    def constant(self, source: Source) -> Callable[[], Tensor] | None:
        """How to compute ``source`` now, if it depends on nothing but parameters and constants; else None."""
        if isinstance(source, str):
            return lambda: attribute(self.module, source)
        name = str(source.target)
        if source.op in ("get_attr", "placeholder"):
            given = self.constants.get(source.name, self.constants.get(name))
            value = attribute(self.module, name) if given is None and source.op == "get_attr" else given
            lasting = given is not None or isinstance(value, torch.nn.Parameter)
            return (lambda: value) if lasting and isinstance(value, Tensor) and not self._is_written(source) else None
        if not (name_of(source) in _FOLDED or is_view(name_of(source))) or not self._foldable(source):
            return None
        return lambda: self._fold(source)

    def _foldable(self, node: Node) -> bool:
        known = [self.constant(n) is not None or type(self.value(n)) in (int, torch.Size) for n in node.all_input_nodes]
        return all(known) and not may_write(node, self.module)

    def _fold(self, node: Node) -> Tensor:
        def known(source: Node) -> Any:
            compute = self.constant(source)
            return self.value(source) if compute is None else compute()

        args, kwargs = map_arg((node.args, node.kwargs), known)  # type: ignore[misc]
        with torch.no_grad():
            return call(node, args, kwargs)

    def _is_written(self, source: Node) -> bool:
        """Whether the graph writes to the tensor of ``source``, under any of the nodes that read it."""
        same = [node for node in self.order if (node.op, node.target) == (source.op, source.target)]
        return any(self.memory(argument) & {*same} for index in self.writes for argument in self._nodes[index].all_input_nodes)

    def lineage(self, node: Source, root: Source) -> list[Node]:
        """The nodes from ``node`` up to ``root``, which it is a view of."""
        found: list[Node] = []
        while isinstance(node, Node):
            found.append(node)
            if node is root or node not in self._parents:
                break
            node = self._parents[node]
        return found

    def memory(self, node: Node) -> frozenset[Node]:
        """``node`` and what it may share memory with, upwards."""
        if node not in self._memory:
            source = node.args[0] if node.args else None
            name = name_of(node)
            shares = (is_view(name) and name not in NEW) or name in PHYSICAL or may_write(node, self.module)
            above = self.memory(source) if isinstance(source, Node) and shares else frozenset[Node]()
            self._memory[node] = above | {node}
        return self._memory[node]

    def disturbed(self, nodes: Iterable[Node], first: Node, last: Node) -> bool:
        """Whether something after ``first`` and before ``last`` may write to the memory of ``nodes``."""
        start, end = self.order[first], self.order[last]
        writers = [self._nodes[index] for index in self.writes if start < index < end]
        mine = {shared for node in nodes for shared in self.memory(node)} if writers else set()
        return any(mine & self.memory(argument) for writer in writers for argument in writer.all_input_nodes)

    def parameters(self, source: Source) -> list[str]:
        """The names of the parameters and placeholders that a constant is computed from."""
        if isinstance(source, str) or source.op in ("get_attr", "placeholder"):
            return [source if isinstance(source, str) else str(source.target)]
        return [found for node in source.all_input_nodes for found in self.parameters(node) if self.constant(node)]

    def identity(self, source: Source) -> Any:
        """Equal for two constants that are the same tensor."""
        plain = isinstance(source, str) or source.op in ("get_attr", "placeholder")
        compute = self.constant(source) if plain else None
        return source if compute is None else id(compute())

    def dtype(self, source: Source) -> torch.dtype | None:
        """The dtype of a tensor."""
        value = attribute(self.module, source) if isinstance(source, str) else self.value(source)
        return value.dtype if isinstance(value, Tensor) else None

    def is_free(self, root: Node) -> bool:
        """Whether the graph serves several sizes of ``root``."""
        return self.untraced or any(isinstance(size, torch.SymInt) for size in self.value(root).shape)

    def replaced(self, old: Node, new: Node) -> None:
        """Take over what is known of ``old`` for the node that stands in its place."""
        self.order[new] = self.order[old]
        if old in self._propagated:
            self._propagated[new] = self._propagated[old]
        self._memory[new] = self.memory(old)
        self._views.clear()


class _Propagation(Interpreter):
    """Keeps what every node evaluates to."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _propagated(module: GraphModule, inputs: Sequence[Any]) -> dict[Node, Any]:
    """Run the graph on fake tensors: no data is touched and nothing is computed.

    A size of 1 is taken for a number of rows, and replaced by one that shows where it goes, if the graph runs with that.
    """
    free = next(_primes_above(9_000))
    for size in (free, 1):
        propagation, mode = _Propagation(module), FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with mode, torch.no_grad():
                propagation.run(*(_fake(x, mode, size) if isinstance(x, Tensor) else x for x in inputs))
            break
        except _ANALYSIS_FAILS:
            if size == 1 or all(1 not in x.shape for x in inputs if isinstance(x, Tensor)):
                raise
    return propagation.values


def _fake(tensor: Tensor, mode: FakeTensorMode, single: int) -> Tensor:
    if 1 not in tensor.shape:
        return mode.from_tensor(tensor)
    return torch.empty([single if size == 1 else size for size in tensor.shape], dtype=tensor.dtype, device=tensor.device)


def _primes_above(number: int) -> Iterator[int]:
    return (n for n in itertools.count(number + 1) if all(n % d for d in range(2, math.isqrt(n) + 1)))
