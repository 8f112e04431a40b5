"""Products with weights that an index chose become one operator, which reads each weight where it is.

A decode step of few tokens with experts is written as a copy of the weight of every chosen expert and a batched product: the
copy is written and read again, so that three times as many bytes move as the weights have.

Before, with ``weights [E, N, K]`` or its transpose::

    %chosen : index(args = (%weights, [%experts]))           # [P, N, K]
    %column : unsqueeze(args = (%x, -1))                     # [P, K, 1]
    %bmm : bmm(args = (%chosen, %column))                    # [P, N, 1]

After, for ``operator`` = ``graphs.expert_linear``::

    %expert_linear : expert_linear(args = (%x, %weights, %experts))
    %result : unsqueeze(args = (%expert_linear, -1))

A row times a chosen weight, ``bmm([P, 1, K], [P, K, N])``, likewise, with the weight's last two dimensions exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.optimize.operators.emitter import Emitter

aten = torch.ops.aten
_DTYPES = (torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)


def expert_products(module: GraphModule, *, operator: Any) -> list[tuple[str, str]]:
    """Replace ``bmm`` of a gathered weight with one row for each.

    Args:
        operator: called as ``operator(x [P, K], weights [E, N, K], experts [P])``, it returns ``[P, N]``.
    """
    changes = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not aten.bmm.default:
            continue
        for position in (0, 1):
            found = _chosen(node.args[position], turned=position == 1)
            if found is not None and _is_one_row(node, position):
                changes.append(_replace(module, node, position, found, operator))
                break
    return changes


def _chosen(node: Any, *, turned: bool) -> tuple[Any, Any, bool] | None:
    """Weights, experts, and whether a weight's dimensions are to be exchanged to be ``[E, N, K]``."""
    while _is_transpose(node):
        node, turned = node.args[0], not turned
    if node.op != "call_function" or node.target is not aten.index.Tensor:
        return None
    weights, indices = node.args[:2]
    if not isinstance(weights, Node) or len(indices) != 1 or not isinstance(indices[0], Node):
        return None
    held, chosen = weights.meta.get("val"), indices[0].meta.get("val")
    if not isinstance(held, torch.Tensor) or not isinstance(chosen, torch.Tensor):
        return None
    legal = held.dim() == 3 and held.dtype in _DTYPES and chosen.dim() == 1 and chosen.dtype in _INTEGERS
    return (weights, indices[0], turned) if legal and held.device == chosen.device else None


def _is_transpose(node: Any) -> bool:
    """Whether the last two of three dimensions are exchanged."""
    turns = {aten.permute.default: [[0, 2, 1]], aten.transpose.int: [[1, 2], [2, 1], [-1, -2], [-2, -1]]}
    given = list(node.args[1:]) if node.target is aten.transpose.int else [*node.args[1:2]]
    known = turns.get(node.target, []) if node.op == "call_function" else []
    return (given[0] if node.target is aten.permute.default and given else given) in known


def _is_one_row(node: Any, position: int) -> bool:
    other = node.args[1 - position]
    value = other.meta.get("val") if isinstance(other, Node) else None
    return isinstance(value, torch.Tensor) and value.shape[2 if position == 0 else 1] == 1


def _replace(module: GraphModule, node: Any, position: int, found: tuple[Any, Any, bool], operator: Any) -> tuple[str, str]:
    (weights, experts, turned), one = found, 2 if position == 0 else 1
    before, emit = node.format_node() or str(node), Emitter(module, node.meta["val"])
    with module.graph.inserting_before(node):
        x = emit(aten.squeeze.dim, node.args[1 - position], one)
        if turned:
            weights = emit(aten.permute.default, weights, [0, 2, 1])
        made = emit(operator, x, weights, experts)
        result = emit(aten.unsqueeze.default, made, one)
    result.meta = {**node.meta, "val": result.meta["val"]}
    node.replace_all_uses_with(result)
    copied = node.args[position]
    module.graph.erase_node(node)
    while not copied.users and copied.target is not aten.index.Tensor:
        unused, copied = copied, copied.args[0]
        module.graph.erase_node(unused)
    if not copied.users:  # the operator looks at the experts in its place
        module.graph.erase_node(copied)
    return before, made.format_node() or str(made)
