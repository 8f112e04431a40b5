"""Small exact operators gathered into regions that a compiler turns into few kernels.

Before::

    %length : add.Scalar(%position, 1)
    %beyond : ge.Tensor(%iota, %length)
    %start  : clamp.default(%length, 0, 63)
    %rows   : index.Tensor(%order, [%start])
    %scores : masked_fill.Scalar(%product, %beyond, -inf)    # large: stays

After::

    %exact_0 : exact_0(%position, %iota, %order)              # a module that holds the four
    %beyond  : getitem(%exact_0, 0)
    %rows    : getitem(%exact_0, 1)
    %scores  : masked_fill.Scalar(%product, %beyond, -inf)

The places, lengths, masks and conditions that other passes make of host values are chains of operators on a handful of
numbers, each a launch that costs more than its work. Exact operators (`bit_exact`) give the same bits however they are
compiled, so that nothing changes but the number of kernels.

A region reads no memory that the graph writes, so its operators may run as early as their arguments are there.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from passes.core.aliasing import Aliases, is_pure
from passes.core.names import REGION, fresh_name
from passes.core.schema import returns_view
from passes.optimize.bit_exact import exact_operators

FEWEST = 2
"""Operators below which a region is left as it is."""
WORTH = 8
"""Operators in all regions below which none is worth compiling."""


def fuse_exact(module: GraphModule, make: Callable[[GraphModule], torch.nn.Module]) -> list[tuple[str, str]]:
    """Rewrite ``module`` in place; returns the nodes of each region, with what stands for them.

    Args:
        make: compiles a region: a graph of tensors that returns a tuple of tensors. It is called once per region.
    """
    pure = _unwritten(module)
    exact = exact_operators(module, pure, {node: node.meta.get("val") for node in module.graph.nodes})
    views = {node for node in pure if returns_view(node.target)}
    held = {node for node in module.graph.nodes if node.op == "get_attr"}
    order = _early(module, exact | views | held)
    regions = [region for region in _regions(order, exact, views) if len(region) >= FEWEST]
    return _Rebuilt(module, regions, order).changes(make) if sum(map(len, regions)) >= WORTH else []


def _unwritten(module: GraphModule) -> set[Node]:
    """Operators of torch's own that depend on their arguments alone, and none of whose memory, read or made, is written."""
    aliases = Aliases.of(module)
    return {
        node for node in module.graph.nodes if is_pure(node) and not any(map(aliases.is_written, (node, *node.all_input_nodes)))
    }


def _early(module: GraphModule, movable: set[Node]) -> list[Node]:
    """The nodes in an order in which those of ``movable`` run as soon as they can, and the others as they did."""
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    missing = {node: len(node.all_input_nodes) for node in movable}
    ready = [place[node] for node, count in missing.items() if not count]
    heapq.heapify(ready)
    nodes, order = list(place), list[Node]()

    def run(node: Node) -> None:
        order.append(node)
        for user in node.users:
            if user in missing:
                missing[user] -= 1
                if not missing[user]:
                    heapq.heappush(ready, place[user])

    for node in nodes:
        while ready and node.op != "placeholder":
            run(nodes[heapq.heappop(ready)])
        if node not in movable:
            run(node)
    return order


def _regions(order: Sequence[Node], exact: set[Node], views: set[Node]) -> list[list[Node]]:
    """Runs of exact operators, each closed by the first other operator that needs one of them."""
    regions: list[list[Node]] = [[]]
    inside: set[Node] = set()
    for node in order:
        if node in exact:
            regions[-1].append(node)
            inside.add(node)
        elif node in views:
            if not inside.isdisjoint(node.all_input_nodes):
                inside.add(node)  # made again wherever it is needed
        elif not inside.isdisjoint(node.all_input_nodes):
            regions.append([])
            inside = set()
    return regions


class _Rebuilt:
    """A graph with modules in the place of regions.

    A region is put where the last of its operators was; what reads it, views of its results among it, comes after.
    """

    def __init__(self, module: GraphModule, regions: Sequence[Sequence[Node]], order: Sequence[Node]) -> None:
        self._module, self._regions, self._order = module, regions, order
        self._region_of = {node: index for index, region in enumerate(regions) for node in region}

    def changes(self, make: Callable[[GraphModule], torch.nn.Module]) -> list[tuple[str, str]]:
        """Rebuild the graph and say what changed."""
        graph = Graph(owning_module=self._module)
        made: dict[Node, Node] = {}
        late: list[Node] = []  # views of results of the region that is being passed
        changes = []
        for node in self._order:
            index = self._region_of.get(node)
            if index is None and not all(one in made for one in node.all_input_nodes):
                late.append(node)
            elif index is None:
                made[node] = graph.node_copy(node, made.__getitem__)
            elif node is self._regions[index][-1]:
                changes.append(self._call(graph, made, index, make))
                for view in late:
                    if all(one in made for one in view.all_input_nodes):  # else nothing outside of the region reads it
                        made[view] = graph.node_copy(view, made.__getitem__)
                late.clear()
        self._module.graph = graph
        return changes

    def _call(
        self, graph: Graph, made: dict[Node, Node], index: int, make: Callable[[GraphModule], torch.nn.Module]
    ) -> tuple[str, str]:
        """Put the call of a region's module into the graph."""
        region = self._regions[index]
        results = [node for node in region if any(self._leaves(user, index) for user in node.users)]
        body, inputs = _body(region, results)
        name = fresh_name(self._module, REGION)
        self._module.add_submodule(name, make(GraphModule(self._module, body)))
        call = graph.call_module(name, tuple(made[node] for node in inputs))
        for position, node in enumerate(results):
            made[node] = graph.call_function(operator.getitem, (call, position))
            made[node].meta = dict(node.meta)
        return "; ".join(map(str, region)), str(call)

    def _leaves(self, user: Node, index: int) -> bool:
        """Whether something outside of a region reads a result through ``user``, which may be a view of it."""
        if self._region_of.get(user) == index:
            return False
        return not returns_view(user.target) or any(self._leaves(other, index) for other in user.users)


def _body(region: Sequence[Node], results: Iterable[Node]) -> tuple[Graph, list[Node]]:
    """The graph of a region, with the views that it reads its own results by, and what it is given."""
    graph, made = Graph(), dict[Node, Node]()
    inputs: list[Node] = []
    members = set(region)

    def copy(node: Node) -> Node:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), load)
        return graph.create_node(node.op, node.target, args, kwargs, f"value_{len(made)}")  # so that equal regions print alike

    def is_own(node: Node) -> bool:
        """Whether a node is a result of the region, or a view of one."""
        while node not in members and returns_view(node.target) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node in members

    def load(node: Node) -> Node:
        if node not in made and not is_own(node):
            made[node] = graph.placeholder(f"input_{len(inputs)}")
            inputs.append(node)
        elif node not in made:
            made[node] = copy(node)
        return made[node]

    for node in region:
        made[node] = copy(node)
    graph.output(tuple(made[node] for node in results))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(placeholders):
        next(iter(graph.nodes)).prepend(node)
    return graph, inputs
