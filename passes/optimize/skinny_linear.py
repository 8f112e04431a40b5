"""Products of few rows with one activation become one operator, which reads the weights where they are.

Before::

    %t : permute(args = (%weight, [1, 0]))
    %mm : mm(args = (%x, %t))                # queries; keys and values likewise
    %t_1 : permute(args = (%weight_1, [1, 0]))
    %mm_1 : mm(args = (%x, %t_1))

After, for ``operator`` = ``graphs.skinny_linear``::

    %skinny_linear : skinny_linear(args = (%x, [%weight, %weight_1]))
    %getitem : getitem(args = (%skinny_linear, 0))
    %getitem_1 : getitem(args = (%skinny_linear, 1))

The weights stay the parameters that they are: nothing is concatenated, held twice or frozen.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_DTYPES = (torch.bfloat16, torch.float16)


def skinny_products(
    module: GraphModule, *, operator: Any, fits: Callable[[int, int, int], Any], alone: bool = True
) -> list[tuple[str, str]]:
    """Replace ``mm`` of an activation with a transposed weight; those that share their activation together.

    Args:
        operator: called as ``operator(x [M, K], weights [N, K]...)``, it returns ``x @ w.T`` for each.
        fits: whether it takes ``(M, N, K)``; a product for which this is false is left as it is.
        alone: replace products that share their activation with no other, too.
    """
    shared: dict[tuple[Node, torch.Size], list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten.mm.default and _is_skinny(node, fits):
            shared.setdefault((_source(node.args[0]), node.args[0].meta["val"].shape), []).append(node)
    return [change for nodes in shared.values() if alone or len(nodes) > 1 for change in _merged(module, nodes, operator)]


def _is_skinny(node: Node, fits: Callable[[int, int, int], Any]) -> bool:
    x, turned = node.args
    weight = _transposed(turned)
    if not isinstance(x, Node) or weight is None:
        return False
    rows, held = x.meta.get("val"), weight.meta.get("val")
    if not isinstance(rows, torch.Tensor) or not isinstance(held, torch.Tensor) or rows.dtype not in _DTYPES:
        return False
    sizes = (*rows.shape, *held.shape)
    return all(isinstance(size, int) for size in sizes) and held.is_contiguous() and bool(fits(sizes[0], sizes[2], sizes[1]))


def _transposed(node: Any) -> Node | None:
    """The input of the graph that ``node`` is the transpose of: there before anything else of the graph is."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    turns = {
        aten.permute.default: [[1, 0]],
        aten.transpose.int: [0, 1],
        aten.t.default: [],
    }
    source = node.args[0]
    if node.target not in turns or list(node.args[1:]) != turns[node.target] or source.op not in ("placeholder", "get_attr"):
        return None
    return source


def _source(node: Any) -> Node:
    """What ``node`` is the reshaped form of: linear layers flatten their common activation one by one."""
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]
    return node


def _merged(module: GraphModule, nodes: list[Node], operator: Any) -> list[tuple[str, str]]:
    graph = module.graph
    weights = [_transposed(node.args[1]) for node in nodes]
    with graph.inserting_before(nodes[0]):
        made = graph.call_function(operator, (nodes[0].args[0], weights))
        made.meta["val"] = [node.meta["val"] for node in nodes]
        results = [graph.call_function(python.getitem, (made, index)) for index in range(len(nodes))]
    after = made.format_node() or str(made)
    changes = []
    for node, result in zip(nodes, results, strict=True):
        result.meta = dict(node.meta)
        changes.append((node.format_node() or str(node), after))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return changes
