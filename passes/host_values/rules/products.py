"""Matrix products and attention: both sides of a padded contraction become zero, padded keys get no weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from passes.core.symbols import has_static_shape
from passes.host_values.rewriter import Rewriter, Rule

aten = torch.ops.aten


def _product(left: int, right: int, first: int = 0) -> Rule:
    """A product that contracts dimension ``left`` of one argument with dimension ``right`` of the next."""

    def rule(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
        a, b = args[first : first + 2]
        if not any(rw.lengths(x) for x in args if isinstance(x, Node)):
            return None
        dims = (left % a.meta["val"].dim(), right % b.meta["val"].dim())
        a, b = _same_size(rw, a, b, *dims)
        padded = dims[0] in rw.lengths(a) or dims[1] in rw.lengths(b)
        if padded:
            masks = {**{0: rw.lengths(a).get(dims[0])}, **{1: rw.lengths(b).get(dims[1])}}
            length = masks[0] if masks[0] is not None else masks[1]
            small = min((a, b), key=_bytes)
            trusted = rw.can_check and _outweighs(max((a, b), key=_bytes), node)
            sides = ((a, dims[0]), (b, dims[1]))
            a, b = (x if trusted and (x is not small or x.meta.get("zeros")) else _zeroed(rw, x, dim, length) for x, dim in sides)
        arguments = (*args[:first], a, b, *args[first + 2 :])
        made = rw.padded(rw.call(node.target, *arguments, **kwargs), rw.expected(node))
        if padded and trusted:
            rw.checks.append(_finite(rw, made))
        return made

    return rule


_LARGE = 1 << 20
"""Bytes above which a side of a product is not copied to have zeros in it."""


def _bytes(x: Node) -> int:
    value = x.meta["val"]
    return int(value.numel() * value.element_size())


def _outweighs(x: Node, node: Node) -> bool:
    """Whether a side of a product is large, and larger than the result: then looking at that is cheaper than copying this.

    Args:
        node: the result, or what has the size of it.
    """
    value = node.meta["val"]
    if not value.dtype.is_floating_point or not has_static_shape(value):
        return False
    return _bytes(x) >= max(_LARGE, 4 * _bytes(node))


def _finite(rw: Rewriter, result: Node) -> Node:
    """0-d flag: whether nothing came of what lies beyond the true rows, with no weight: NaN, for NaN and infinity."""
    total = rw.call(aten.sum.default, result)
    return rw.call(aten.eq.Tensor, total, total)


def _same_size(rw: Rewriter, a: Node, b: Node, left: int, right: int) -> tuple[Node, Node]:
    count = min(a.meta["val"].shape[left], b.meta["val"].shape[right])
    return rw.front(a, left, count), rw.front(b, right, count)


def _zeroed(rw: Rewriter, x: Node, dim: int, length: Any) -> Node:
    """``x`` with zeros from ``length`` on along ``dim``; true rows of the other dimensions stay what they are."""
    value = x.meta["val"]
    beyond = rw.beyond(length, value.shape[dim], value.device, value.dim() - dim - 1)
    return rw.padded(rw.call(aten.masked_fill.Scalar, x, beyond, 0), rw.lengths(x))


def attention(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Scaled dot-product attention over padded keys, or padded queries."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask", given.get("attn_bias"))
    if not any(rw.lengths(x) for x in (q, k, v)) and not (isinstance(mask, Node) and rw.lengths(mask)):
        return None
    if given.get("dropout_p") or given.get("is_causal"):
        rw.no_rule("causal or dropped-out attention over lengths that only the device knows", node)
    keys = next((rw.lengths(x)[2] for x in (k, v) if 2 in rw.lengths(x)), None)
    count = min(k.meta["val"].shape[2], v.meta["val"].shape[2])
    k, v = rw.front(k, 2, count), rw.front(v, 2, count)
    if isinstance(mask, Node):
        mask = rw.front(mask, mask.meta["val"].dim() - 1, count)
    trusted = keys is not None and rw.can_check and _outweighs(min((k, v), key=_bytes), q)
    if keys is not None:
        if not trusted:
            k, v = _zeroed(rw, k, 2, keys), _zeroed(rw, v, 2, keys)
        allowed = rw.within(keys, count, k.meta["val"].device)
        if mask is None:
            mask = rw.call(aten.view.default, allowed, [1, 1, 1, count])
        elif mask.meta["val"].dtype == torch.bool:
            mask = rw.call(aten.logical_and.default, mask, allowed)
        else:
            mask = rw.call(aten.masked_fill.Scalar, mask, rw.beyond(keys, count, mask.meta["val"].device), -math.inf)
    grouped = q.meta["val"].shape[1] != k.meta["val"].shape[1]
    made = rw.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, scale=given.get("scale"), enable_gqa=grouped
    )
    if trusted:
        rw.checks.append(_finite(rw, made))
    value = node.meta["val"]
    lengths = {0: rw.lengths(q)[0]} if 0 in rw.lengths(q) else {}
    lengths |= {2: rw.lengths(q)[2]} if 2 in rw.lengths(q) else {}
    made = rw.padded(made, lengths)
    return made if isinstance(value, torch.Tensor) else (made, *[None] * (len(value) - 1))


RULES: dict[Any, Rule] = {
    aten.mm.default: _product(1, 0),
    aten.bmm.default: _product(2, 1),
    aten.mv.default: _product(1, 0),
    aten.dot.default: _product(0, 0),
    aten.addmm.default: _product(1, 0, first=1),
    aten.baddbmm.default: _product(2, 1, first=1),
    aten.addmv.default: _product(1, 0, first=1),
    aten.linear.default: _product(-1, -1),
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
    aten._scaled_dot_product_flash_attention.default: attention,
    aten._scaled_dot_product_efficient_attention.default: attention,
    aten._scaled_dot_product_cudnn_attention.default: attention,
    aten._scaled_dot_product_attention_math.default: attention,
    aten.scaled_dot_product_attention.default: attention,
}
