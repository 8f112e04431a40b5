"""What the outputs of a graph are views of, by how the graph makes them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from graphs.state.storage import tensors_in

Tensor = torch.Tensor


def view_sources(module: GraphModule) -> list[frozenset[int | Tensor]]:
    """For each output of a graph of Dynamo's, whose memory it may be.

    Where inputs happen to lie in one storage, as the rows of a packed buffer do, storages tell only that an output is
    memory of one of them, and the next call may have them elsewhere. What each operator was given tells which.

    Returns:
        Positions of inputs, and tensors of the graph's own. More than one where an operator that returns memory it was given
        was given several that share it; none for what is new.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    found: dict[Node, frozenset[int | Tensor]] = {node: frozenset([index]) for index, node in enumerate(inputs)}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found[node] = frozenset(tensors_in(_attribute(module, str(node.target))))
        elif node.op not in ("placeholder", "output"):
            found[node] = frozenset().union(*(found[given] for given in _lenders(node)))
    outputs = module.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    return [found[value] if isinstance(value, Node) else frozenset() for value in outputs]


def _lenders(node: Node) -> list[Node]:
    """Which of the nodes that an operator is given it may return memory of."""
    given, own = node.all_input_nodes, node.meta.get("example_value")
    same = [other for other in given if isinstance(own, Tensor) and other.meta.get("example_value") is own]
    return same or [other for other in given if not _storages(node).isdisjoint(_storages(other))]


def _storages(node: Node) -> set[int]:
    """Storages of the fake tensors that Dynamo traced a node with."""
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(node.meta.get("example_value"))}


def _attribute(module: GraphModule, target: str) -> object:
    value: object = module
    for name in target.split("."):
        value = getattr(value, name)
    return value
