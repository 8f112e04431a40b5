"""What the nodes of a graph give, without data: nodes that are added to a finished graph say it too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.core.symbols import SYMBOLS

Tensor = torch.Tensor


def emit(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """A new node where ``graph`` inserts now, with its ``meta["val"]`` if the graph has such values without data."""
    node = graph.call_function(target, args, kwargs)
    mode = _mode_of(node.all_input_nodes) or _mode_of(graph.nodes)
    if mode is not None and all("val" in source.meta for source in node.all_input_nodes):
        node.meta["val"] = recomputed(node, mode)
    return node


def recomputed(node: Node, mode: FakeTensorMode | None = None) -> Any:
    """What an operator gives for what its arguments are, without data.

    Args:
        mode: the fake mode to compute it in; that of the arguments if it is not given.

    Raises:
        LookupError: an argument has no ``meta["val"]``, or none of them tells the mode.
    """
    mode = mode or _mode_of(node.all_input_nodes)
    if mode is None:
        raise LookupError(f"nothing that {node} is given has a value without data")
    values = torch.fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    args, kwargs = tree_map_only(Tensor, lambda tensor: _like(tensor, mode), values)
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def has_symbols(value: Any) -> bool:
    """Whether a value without data is, or is as large as, a number that only the device knows."""
    parts = [part for leaf in tree_leaves(value) for part in (leaf.shape if isinstance(leaf, Tensor) else (leaf,))]
    return any(isinstance(part, SYMBOLS) for part in parts)


def _mode_of(nodes: Iterable[Node]) -> FakeTensorMode | None:
    leaves = (leaf for node in nodes for leaf in tree_leaves(node.meta.get("val")))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


def _like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of a mode's own: what an operator does to the form of one does not reach ``meta["val"]``."""
    with mode:
        if tensor.layout is not torch.strided or has_symbols(tensor):
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
