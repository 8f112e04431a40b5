"""Operators that mix the elements of a dimension: padding becomes the neutral element first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from passes.core.symbols import expression_of, is_symbol
from passes.host_values.rewriter import Rewriter, Rule
from passes.host_values.rules.sources import last_in_order

aten = torch.ops.aten


def _dims(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "dim") -> list[int]:
    """The dimensions that an operator reduces, from the front."""
    rank = args[0].meta["val"].dim()
    position = next((i for i, a in enumerate(node.target._schema.arguments) if a.name == name), None)  # type: ignore[union-attr]
    value = args[position] if position is not None and position < len(args) else kwargs.get(name)
    if position is not None and value is None and name not in kwargs and position >= len(args):
        value = node.target._schema.arguments[position].default_value  # type: ignore[union-attr]
    if value is None or value == []:
        return list(range(rank))
    return [d % rank for d in (value if isinstance(value, (list, tuple)) else [value])] if rank else []


def _lowest(dtype: torch.dtype) -> float | int | bool:
    return -math.inf if dtype.is_floating_point else False if dtype == torch.bool else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float | int | bool:
    return math.inf if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max


def _zero(dtype: torch.dtype) -> int:
    return 0


def _one(dtype: torch.dtype) -> int:
    return 1


def _reduction(fill: Callable[[torch.dtype], float]) -> Rule:
    def rule(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if not rw.lengths(x):
            return None
        dims = _dims(node, args, kwargs)
        if node.target in _NEEDS_ELEMENTS:
            for dim in dims:
                if dim in rw.lengths(x):
                    rw.assume(sympy.Ge(rw.lengths(x)[dim], 1))
        made = rw.call(node.target, rw.neutral(x, fill(x.meta["val"].dtype), dims), *args[1:], **kwargs)
        return rw.results(node, made)

    return rule


_NEEDS_ELEMENTS = (aten.max.default, aten.max.dim, aten.min.default, aten.min.dim)
"""Reductions that refuse a dimension of length zero, other than those that ask for its length themselves."""


def argmax(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.argmax()``, ``x.argmin()``: a place in the flattened tensor holds only if padding comes behind everything true."""
    x = args[0]
    everything = len(_dims(node, args, kwargs)) == x.meta["val"].dim() > 1
    if everything and any(size != 1 for dim in rw.lengths(x) for size in x.meta["val"].shape[:dim]):
        rw.no_rule("a place in a tensor with padding between its rows", node)
    return _reduction(_lowest if node.target is aten.argmax.default else _highest)(rw, node, args, kwargs)


def vector_norm(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.linalg.vector_norm(x, ord)``: what does not count has no size, or is infinitely large where the smallest count."""
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    return _reduction((lambda dtype: math.inf) if order < 0 else _zero)(rw, node, args, kwargs)


def mean(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.mean(dim)``: the sum over the true number of elements."""
    x = args[0]
    if not rw.lengths(x):
        return None
    dims = _dims(node, args, kwargs)
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    total = rw.call(aten.sum.dim_IntList, rw.neutral(x, 0, dims), dims, keep, dtype=kwargs.get("dtype"))
    count: sympy.Basic = sympy.Integer(1)
    for dim in dims:
        count *= rw.lengths(x).get(dim, sympy.Integer(x.meta["val"].shape[dim]))
    number = rw.number(count)
    value = total.meta["val"]
    if isinstance(number, Node):
        wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        number = rw.call(aten._to_copy.default, number, dtype=wide)
        total = total if value.dtype == wide else rw.call(aten._to_copy.default, total, dtype=wide)
    made = rw.call(aten.div.Tensor, total, number)
    made = made if made.meta["val"].dtype == value.dtype else rw.call(aten._to_copy.default, made, dtype=value.dtype)
    return rw.padded(made, rw.expected(node))


def softmax(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """Padding has no share: -inf before the exponential."""
    x = args[0]
    if not rw.lengths(x):
        return None
    dim = args[1] % x.meta["val"].dim()
    made = rw.padded(rw.call(node.target, rw.neutral(x, -math.inf, [dim]), *args[1:], **kwargs), rw.expected(node))
    if node.target is not aten._log_softmax.default and set(rw.lengths(x)) == {dim} and not rw.aliases.is_written(node):
        made.meta["zeros"] = "or NaN"  # beyond the true length; of a row that has none everything is NaN
    return made


def cumulative(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Running sums and maxima: padding comes last and reaches nothing before it."""
    if not rw.lengths(args[0]):
        return None
    return rw.results(node, rw.call(node.target, *args, **kwargs))


def topk(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.topk(min(k, n))``: the bound of k of them.

    Which of equal elements are taken is the kernel's choice. A GPU takes the first ones, whatever comes behind; on a CPU that
    depends on the length, so short tensors are looked at in each length that they can have. Long ones are sorted.
    """
    x, k = args[:2]
    if not rw.lengths(x) and not is_symbol(k):
        return None
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) % x.meta["val"].dim()
    largest = args[3] if len(args) > 3 else kwargs.get("largest", True)
    value = x.meta["val"]
    count = min(rw.bound(expression_of(k)) if is_symbol(k) else k, value.shape[dim])
    if dim not in rw.lengths(x):
        made = rw.call(aten.topk.default, x, count, dim, largest, *args[4:])
        parts = [rw.item(made, index) for index in range(2)]
    elif value.device.type == "cpu" and value.shape[dim] <= _SHORT:
        parts = _top_of_each_length(rw, x, count, dim, (largest, *args[4:]))
    elif value.device.type != "cpu" and value.dtype.is_floating_point:
        fill = (_lowest if largest else last_in_order)(value.dtype)
        made = rw.call(aten.topk.default, rw.neutral(x, fill, [dim]), count, dim, largest, *args[4:])
        parts = [rw.item(made, index) for index in range(2)]
    else:
        made = _ordered(rw, x, dim, descending=largest)
        parts = [rw.call(aten.slice.Tensor, rw.item(made, index), dim, 0, count) for index in range(2)]
    return tuple(rw.padded(part, rw.expected(node, index)) for index, part in enumerate(parts))


_SHORT = 64
"""Elements up to which a top-k on a CPU is done in every length."""


def _top_of_each_length(rw: Rewriter, x: Node, count: int, dim: int, how: tuple[Any, ...]) -> list[Node]:
    """Values and places of the largest elements, from the length that is the true one."""
    value, length = x.meta["val"], rw.lengths(x)[dim]
    found: list[list[Node]] = [[], []]
    for size in range(1, value.shape[dim] + 1):
        made = rw.call(aten.topk.default, rw.call(aten.slice.Tensor, x, dim, 0, size), min(count, size), dim, *how)
        rest = [0] * (2 * (value.dim() - dim - 1)) + [0, count - min(count, size)]
        for index in range(2):
            found[index].append(rw.call(aten.constant_pad_nd.default, rw.item(made, index), rest))
    which = rw.call(aten.view.default, rw.number(sympy.Max(length - 1, 0)), [1])
    return [
        rw.call(aten.squeeze.dim, rw.call(aten.index_select.default, rw.call(aten.stack.default, part), 0, which), 0)
        for part in found
    ]


def _ordered(rw: Rewriter, x: Node, dim: int, *, descending: bool) -> Node:
    """Values and places in order, padding last. NaN counts as the largest, so that nothing comes behind it."""
    fill = (_lowest if descending else last_in_order)(x.meta["val"].dtype)
    return rw.call(aten.sort.stable, rw.neutral(x, fill, [dim]), stable=True, dim=dim, descending=descending)


def sort(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.sort(dim)``: padding last."""
    x = args[0]
    if not rw.lengths(x):
        return None
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(schema, args, strict=False)), **kwargs}
    made = _ordered(rw, x, given.get("dim", -1) % x.meta["val"].dim(), descending=bool(given.get("descending", False)))
    if node.target is aten.argsort.default:
        return rw.padded(rw.item(made, 1), rw.expected(node))
    return tuple(rw.padded(rw.item(made, index), rw.expected(node, index)) for index in range(2))


def layer_norm(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Normalisation over dimensions that are not padded."""
    if not rw.lengths(args[0]):
        return None
    rank, normalised = args[0].meta["val"].dim(), len(args[1])
    if any(dim >= rank - normalised for dim in rw.lengths(args[0])):
        rw.no_rule("normalisation over a length that only the device knows", node)
    return rw.results(node, rw.call(node.target, *args, **kwargs))


_NEUTRAL: dict[Any, tuple[Any, ...]] = {
    _zero: (
        *(aten.sum.default, aten.sum.dim_IntList, aten.nansum.default),
        *(aten.count_nonzero.default, aten.count_nonzero.dim_IntList, aten.any.default, aten.any.dim, aten.any.dims),
    ),
    _one: (aten.prod.default, aten.prod.dim_int, aten.all.default, aten.all.dim, aten.all.dims),
    _lowest: (aten.max.default, aten.max.dim, aten.amax.default, aten.logsumexp.default),
    _highest: (aten.min.default, aten.min.dim, aten.amin.default),
}
"""Reductions by the element that changes nothing in them."""

RULES: dict[Any, Rule] = {
    aten.argmax.default: argmax,
    aten.argmin.default: argmax,
    aten.linalg_vector_norm.default: vector_norm,
    aten.mean.default: mean,
    aten.mean.dim: mean,
    aten._softmax.default: softmax,
    aten._log_softmax.default: softmax,
    aten.softmax.int: softmax,
    aten.cumsum.default: cumulative,
    aten.topk.default: topk,
    aten.sort.default: sort,
    aten.sort.stable: sort,
    aten.argsort.default: sort,
    aten.native_layer_norm.default: layer_norm,
    **{target: _reduction(fill) for fill, targets in _NEUTRAL.items() for target in targets},
}
