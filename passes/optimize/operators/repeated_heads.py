"""Keys and values that several query heads share are read once, not copied for each head.

Models repeat them for a batched product of one matrix per query head. In a decode step the query has one row, so that the copy is
as many times the cache as there are query heads for one of keys. The rows of these heads are stacked instead.

Before, with ``H = G * R`` heads, ``R`` of which share::

    %repeated : expand(args = (%keys, [B, G, R, S, D]))      # from [B, G, 1, S, D]
    %heads : reshape(args = (%repeated, [B, H, S, D]))
    %turned : permute(args = (%heads, [0, 1, 3, 2]))         # or not
    %flat : reshape(args = (%turned, [B * H, D, S]))
    %bmm : bmm(args = (%rows, %flat))                        # rows [B * H, M, D]

After::

    %stacked : reshape(args = (%rows, [B * G, R * M, D]))
    %shared : reshape(args = (%keys, [B * G, S, D])), permuted
    %bmm : bmm(args = (%stacked, %shared))                   # [B * G, R * M, S], reshaped to [B * H, M, S]
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.optimize.operators.emitter import Emitter

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, aten.contiguous.default)
_MOST = 16  # rows of one head, beyond which a library's product has enough to do with one


def repeated_heads(module: GraphModule) -> list[tuple[str, str]]:
    """Replace ``bmm`` with a right operand that is repeated along its batch, where each head has few rows."""
    changes = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not aten.bmm.default:
            continue
        left, right = node.args
        found = _repeated(right)
        rows = left.meta.get("val")
        if found is None or not isinstance(rows, torch.Tensor) or rows.shape[1] > _MOST:
            continue
        changes.append(_stack(module, node, *found))
    return changes


def _repeated(node: Any) -> tuple[Any, bool] | None:
    """What is repeated, ``[B, G, 1, S, D]``, and whether its last two dimensions were exchanged behind it."""
    flat = _skip_copies(node)
    if flat.target not in _RESHAPES or _size(flat, 3) is None:
        return None
    heads = flat.args[0]
    shape = _size(_skip_copies(heads), 4)
    if shape is None or _size(flat, 3) != [shape[0] * shape[1], *shape[2:]]:
        return None
    return repeated_source(heads)


def repeated_source(heads: Any) -> tuple[Any, bool] | None:
    """Of ``[B, H, S, D]``, what is repeated for it, ``[B, G, 1, S, D]``, and whether its last two dimensions were exchanged.

    None where heads that follow each other do not have the same.
    """
    heads, turned = _skip_copies(heads), False
    while (inner := _untwisted(heads)) is not None:
        heads, turned = _skip_copies(inner), turned ^ (heads.target is not aten.expand.default)
    apart = _skip_copies(heads.args[0]) if heads.target in _RESHAPES else heads
    shape, whole = _size(heads, 4), _size(apart, 5)
    if shape is None or whole is None or shape != [whole[0], whole[1] * whole[2], *whole[3:]]:
        return None
    source = apart.args[0] if apart.target is aten.expand.default else None
    if not isinstance(source, Node) or whole[2] == 1 or 0 in whole or _size(source, 5) != [*whole[:2], 1, *whole[3:]]:
        return None
    return source, turned


def _untwisted(node: Any) -> Any:
    """The argument of a node that exchanges the last two dimensions, or that expands to the size that there is."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node) or _size(source, 4) is None:
        return None
    if node.target is aten.expand.default and _size(source, 4) == _size(node, 4):
        return source
    if node.target is aten.permute.default and list(node.args[1]) == [0, 1, 3, 2]:
        return source
    dims = sorted(dim % 4 for dim in node.args[1:3]) if node.target is aten.transpose.int else []
    return source if dims == [2, 3] else None


def _skip_copies(node: Any) -> Any:
    while node.op == "call_function" and node.target in _COPIES:
        node = node.args[0]
    return node


def _size(node: Any, dims: int) -> list[int] | None:
    """The shape of a tensor of so many dimensions, all of them known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != dims or not all(isinstance(size, int) for size in value.shape):
        return None
    return list(value.shape)


def _stack(module: GraphModule, node: Any, source: Any, turned: bool) -> tuple[str, str]:
    before, emit, shape = node.format_node() or str(node), Emitter(module, node.meta["val"]), node.meta["val"].shape
    left, (batch, groups, _, length, width) = node.args[0], source.meta["val"].shape
    rows, inner = left.meta["val"].shape[1:]
    with module.graph.inserting_before(node):
        stacked = emit(aten.reshape.default, left, [batch * groups, shape[0] // (batch * groups) * rows, inner])
        shared = emit(aten.reshape.default, source, [batch * groups, length, width])
        if turned:
            shared = emit(aten.permute.default, shared, [0, 2, 1])
        made = emit(aten.bmm.default, stacked, shared)
        result = emit(aten.reshape.default, made, list(shape))
    result.meta = {**node.meta, "val": result.meta["val"]}
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)
    return before, made.format_node() or str(made)
