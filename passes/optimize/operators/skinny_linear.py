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

``addmm`` likewise, with its bias, and weights that are not transposed, which the operator is given as views. The weights stay the
parameters that they are: nothing is concatenated, held twice or frozen.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from passes.optimize.operators.emitter import Emitter

aten = torch.ops.aten
_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_DTYPES = (torch.bfloat16, torch.float16)
_THERE = ("placeholder", "get_attr")


class _Product(NamedTuple):
    """One product of an activation with a weight that is there before anything else of the graph.

    Attributes:
        turned: whether the weight lies as ``[K, N]``.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    turned: bool


def skinny_products(
    module: GraphModule, *, operator: Any, fits: Callable[[int, int, int], Any], alone: bool = True
) -> list[tuple[str, str]]:
    """Replace ``mm`` and ``addmm`` of an activation with a weight; those that share their activation together.

    Args:
        operator: called as ``operator(x [M, K], weights [N, K]..., biases [N]...)``, it returns ``x @ w.T + b`` for each.
        fits: whether it takes ``(M, N, K)``; a product for which this is false is left as it is.
        alone: replace products that share their activation with no other, too.
    """
    shared: dict[tuple[Node, torch.Size, bool], list[_Product]] = {}
    for node in module.graph.nodes:
        found = _skinny(node, fits) if node.op == "call_function" else None
        if found is not None:
            shared.setdefault((_source(found.x), found.x.meta["val"].shape, found.turned), []).append(found)
    return [change for found in shared.values() if alone or len(found) > 1 for change in _merged(module, found, operator)]


def _skinny(node: Node, fits: Callable[[int, int, int], Any]) -> _Product | None:
    bias: Any = None
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
    elif node.target is aten.mm.default:
        x, weight = node.args
    else:
        return None
    straight = _transposed(weight)
    held: Any = straight if straight is not None else weight
    if not isinstance(x, Node) or not isinstance(held, Node) or held.op not in _THERE:
        return None
    rows, values = x.meta.get("val"), held.meta.get("val")
    if not isinstance(rows, torch.Tensor) or not isinstance(values, torch.Tensor) or rows.dtype not in _DTYPES:
        return None
    if bias is not None and (bias.op not in _THERE or bias.meta["val"].dim() != 1 or bias.meta["val"].dtype is not rows.dtype):
        return None
    sizes = (*rows.shape, *values.shape)
    if not all(isinstance(size, int) for size in sizes) or not values.is_contiguous():
        return None
    columns = sizes[2] if straight is not None else sizes[3]
    legal = columns > 1 and fits(sizes[0], columns, sizes[1]) and (bias is None or len(bias.meta["val"]) == columns)
    return _Product(node, x, held, bias, straight is None) if legal else None


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


def _to_the_front(graph: torch.fx.Graph, held: list[Node | None]) -> None:
    """Constants are read before anything is computed: a graph may name them as late as their first use."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in held:
        if node is not None and node.op == "get_attr" and node is not first:
            first.prepend(node)


def _merged(module: GraphModule, products: list[_Product], operator: Any) -> list[tuple[str, str]]:
    graph, nodes, changes = module.graph, [product.node for product in products], []
    emit = Emitter(module, nodes[0].meta["val"])
    _to_the_front(graph, [held for product in products for held in (product.weight, product.bias)])
    with graph.inserting_before(nodes[0]):
        weights = [emit(aten.permute.default, one.weight, [1, 0]) if one.turned else one.weight for one in products]
        given: list[Any] = [products[0].x, weights]
        if any(product.bias is not None for product in products):
            given.append([product.bias for product in products])
        made = graph.call_function(operator, tuple(given))
        made.meta["val"] = [node.meta["val"] for node in nodes]
        results = [graph.call_function(python.getitem, (made, index)) for index in range(len(nodes))]
    after = made.format_node() or str(made)
    for node, result in zip(nodes, results, strict=True):
        result.meta = dict(node.meta)
        changes.append((node.format_node() or str(node), after))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return changes
