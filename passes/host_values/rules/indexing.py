"""Lookups and writes by index, with masks for indices or with lists of bounded length."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from passes.core.symbols import expression_of
from passes.host_values.rewriter import Rewriter, Rule
from passes.host_values.rules.scatters import into_padded
from passes.host_values.rules.sources import true_rows

aten = torch.ops.aten
_MASKS = (torch.bool, torch.uint8)


def _safe(rw: Rewriter, index: Node) -> Node:
    """An index list whose padding points at row 0."""
    return rw.neutral(index, 0)


def _expanded(rw: Rewriter, indices: list[Any], size: Any) -> list[Any]:
    """Indices with every mask replaced by the lists of its true places."""
    made: list[Any] = []
    for index in indices:
        if isinstance(index, Node) and index.meta["val"].dtype in _MASKS:
            rows, length = true_rows(rw, index, size)
            lengths = {0: length} if length.free_symbols else {}
            for dim in range(index.meta["val"].dim()):
                made.append(rw.padded(rw.call(aten.select.int, rows, 1, dim), lengths))
                made[-1].meta["zeros"] = "exactly"
        else:
            made.append(index)
    return made


def _has_mask(indices: list[Any]) -> bool:
    return any(isinstance(index, Node) and index.meta["val"].dtype in _MASKS for index in indices)


def index(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x[indices]``."""
    x, indices = args[0], list(args[1])
    masked = _has_mask(indices)
    if not masked and not rw.lengths(x) and not any(rw.lengths(i) for i in indices):
        return None
    if masked:
        size = next((s for s in node.meta["val"].shape if isinstance(s, torch.SymInt)), None)
        if size is None:
            size = _count_of(node)
        indices = _expanded(rw, indices, size)
    indices = [_safe(rw, i) if isinstance(i, Node) else i for i in indices]
    for dim, position in enumerate(indices):
        if position is not None and dim in rw.lengths(x):
            indices[dim] = _from_front(rw, position, rw.lengths(x)[dim])
    made = rw.call(aten.index.Tensor, x, indices)
    return rw.padded(made, _broadcast_lengths(rw, node, made))


def _count_of(node: Node) -> Any:
    raise AssertionError(f"{node} has a mask and no dynamic size")


def _from_front(rw: Rewriter, position: Node, length: sympy.Basic) -> Node:
    """Indices below zero count from the true end."""
    total = rw.number(length)
    below = rw.call(aten.lt.Scalar, position, 0)
    return rw.padded(rw.call(aten.where.self, below, rw.call(aten.add.Tensor, position, total), position), rw.lengths(position))


def _broadcast_lengths(rw: Rewriter, node: Node, made: Node) -> dict[int, sympy.Basic]:
    return {dim: e for dim, e in rw.expected(node).items() if dim < made.meta["val"].dim()}


def index_select(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.index_select(dim, rows)``."""
    x, dim, rows = args
    if not rw.lengths(x) and not rw.lengths(rows):
        return None
    return rw.padded(rw.call(aten.index_select.default, x, dim, _safe(rw, rows)), rw.expected(node))


def gather(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.gather(dim, index)``."""
    x, dim, rows = args[:3]
    if not rw.lengths(x) and not rw.lengths(rows):
        return None
    for other in range(x.meta["val"].dim()):
        if other != dim % x.meta["val"].dim():
            rows = rw.front(rows, other, x.meta["val"].shape[other])
    return rw.padded(rw.call(aten.gather.default, x, dim, _safe(rw, rows)), rw.expected(node))


def embedding(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``embedding(weight, tokens)``."""
    if not rw.lengths(args[1]):
        return None
    return rw.padded(rw.call(node.target, args[0], _safe(rw, args[1]), *args[2:], **kwargs), rw.expected(node))


def index_put(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x[indices] = values``, in place or not."""
    x, indices, values = args[0], list(args[1]), args[2]
    add = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    masked = _has_mask(indices)
    if not masked and not rw.lengths(values) and not any(rw.lengths(i) for i in indices):
        if rw.lengths(x):
            rw.no_rule("a write by index into a padded tensor", node)
        return None
    if node.target not in (aten.index_put_.default, aten._index_put_impl_.default):
        x = rw.padded(rw.call(aten.clone.default, x), rw.lengths(x))
    if masked and not add and len(indices) == 1 and _fits_everywhere(indices[0], x, values):
        return _masked_write(rw, x, indices[0], values)
    if masked:
        indices = _expanded(rw, indices, _true_count(rw, node, indices))
    _of_one_length(rw, [i for i in indices if i is not None], x, values)
    return _write_rows(rw, node, x, indices, values, add)


def _fits_everywhere(mask: Node, x: Node, values: Node) -> bool:
    """Whether ``values`` is the same for each true element of the mask."""
    trailing = x.meta["val"].dim() - mask.meta["val"].dim()
    shape = values.meta["val"].shape
    return values.meta["val"].dim() <= trailing or all(size == 1 for size in shape[: len(shape) - trailing])


def _masked_write(rw: Rewriter, x: Node, mask: Node, values: Node) -> Node:
    value = x.meta["val"]
    trailing = value.dim() - mask.meta["val"].dim()
    mask = rw.neutral(mask, 0)
    wide = rw.call(aten.view.default, mask, [*mask.meta["val"].shape, *[1] * trailing]) if trailing else mask
    shape = values.meta["val"].shape
    if values.meta["val"].dim() > trailing:
        values = rw.call(aten.reshape.default, values, list(shape[len(shape) - trailing :]))
    if values.meta["val"].dtype != value.dtype:
        values = rw.call(aten._to_copy.default, values, dtype=value.dtype)
    return rw.padded(rw.call(aten.copy_.default, x, rw.call(aten.where.self, wide, values, x)), rw.lengths(x))


def _true_count(rw: Rewriter, node: Node, indices: list[Any]) -> Any:
    """The traced number of true elements of a mask: the first size of the values if they were picked by it, else a new symbol."""
    size = next(iter(node.args[2].meta["val"].shape), None)  # type: ignore[union-attr]
    if isinstance(size, torch.SymInt):
        counted = rw.number(expression_of(size))
        masks = [index for index in indices if isinstance(index, Node) and index.meta["val"].dtype in _MASKS]
        if isinstance(counted, Node) and counted.target is aten.sum.default and [counted.args[0]] == masks:
            return size
    return rw.fresh_length(node)


def _of_one_length(rw: Rewriter, lists: list[Any], x: Node, values: Node) -> None:
    """Assume that lists of places, and the values for them, are as many as each other, or one: eager refuses others."""
    rows = [*lists, *([values] if values.meta["val"].dim() > x.meta["val"].dim() - len(lists) else [])]
    sized = [node for node in rows if node.meta["val"].dim() > 0]
    lengths = [rw.lengths(node).get(0, sympy.Integer(node.meta["val"].shape[0])) for node in sized]
    first, *others = [rw.facts.resolve(length) for length in lengths if length != 1] or [sympy.Integer(1)]
    for length in others:
        rw.assume(sympy.Eq(first, length))


def _write_rows(rw: Rewriter, node: Node, x: Node, indices: list[Any], values: Node, add: bool) -> Node:
    lists = [i for i in indices if i is not None]
    count = max(i.meta["val"].shape[0] if i.meta["val"].dim() else 1 for i in lists)
    if values.meta["val"].dim() > x.meta["val"].dim() - len(lists) and (rw.lengths(values) or values.meta["val"].shape[0] != 1):
        count = min(count, values.meta["val"].shape[0])  # there are as many
    length = next((rw.lengths(i)[0] for i in (*lists, values) if 0 in rw.lengths(i)), None)
    flat = all(i.meta["val"].dim() <= 1 for i in lists)
    if not flat or length is None or any(i is None for i in indices[: len(lists)]):
        rw.no_rule("a write by several index tensors of a length that only the device knows", node)
    lists = [_column(rw, i, count) for i in lists]
    trailing = list(x.meta["val"].shape[len(lists) :])
    rows = _rows_of(rw, values, count, trailing)
    if add:
        kept = rw.call(aten.masked_fill.Scalar, rows, rw.beyond(length, count, x.meta["val"].device, len(trailing)), 0)
        made = rw.call(aten.index_put_.default, x, [_safe(rw, i) for i in lists], kept, True)
        return rw.padded(made, rw.lengths(x))
    device = x.meta["val"].device
    valid = rw.call(aten.masked_fill.Scalar, rw.iota(count, device), rw.beyond(length, count, device), 0)
    some = rw.call(aten.gt.Scalar, rw.number(length), 0)
    none = rw.call(aten.logical_not.default, some)
    places = [rw.call(aten.masked_fill.Scalar, rw.call(aten.index_select.default, i, 0, valid), none, 0) for i in lists]
    chosen = rw.call(aten.index_select.default, rows, 0, valid)
    present = rw.call(aten.index.Tensor, x, places)
    made = rw.call(aten.index_put_.default, x, places, rw.call(aten.where.self, some, chosen, present))
    return rw.padded(made, rw.lengths(x))


def _column(rw: Rewriter, index: Node, count: int) -> Node:
    value = index.meta["val"]
    if value.dim() == 0 or value.shape[0] != count:
        return rw.call(aten.expand.default, index, [count]) if value.numel() == 1 else rw.front(index, 0, count)
    return index


def _rows_of(rw: Rewriter, values: Node, count: int, trailing: list[int]) -> Node:
    value = values.meta["val"]
    if value.dim() == len(trailing) + 1:
        values = rw.front(values, 0, count)
    return rw.call(aten.expand.default, values, [count, *trailing])


def index_add(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.index_add_(dim, index, source)``: padding adds zero to row 0."""
    x, dim, rows, source = args[:4]
    if not rw.lengths(rows) and not rw.lengths(source):
        return into_padded(rw, node, args, kwargs)
    dim %= x.meta["val"].dim()
    count = min(rows.meta["val"].shape[0], source.meta["val"].shape[dim])
    rows, source = rw.front(rows, 0, count), rw.front(source, dim, count)
    length = rw.lengths(rows).get(0, rw.lengths(source).get(dim))
    value = source.meta["val"]
    beyond = rw.beyond(length, count, value.device, value.dim() - dim - 1)  # type: ignore[arg-type]
    kept = rw.call(aten.masked_fill.Scalar, source, beyond, 0)
    return rw.padded(rw.call(node.target, x, dim, _safe(rw, rows), kept, *args[4:], **kwargs), rw.lengths(x))


def scatter_add(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.scatter_add_(dim, index, source)``: padding adds zero to row 0."""
    x, dim, rows, source = args[:4]
    if not rw.lengths(rows) and not rw.lengths(source):
        return into_padded(rw, node, args, kwargs)
    mask = rw.mask(rows) if rw.lengths(rows) else rw.mask(source)
    kept = rw.call(aten.masked_fill.Scalar, source, rw.call(aten.logical_not.default, mask), 0)
    return rw.padded(rw.call(node.target, x, dim, _safe(rw, rows), kept), rw.lengths(x))


def index_copy(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.index_copy_(dim, index, source)``."""
    x, dim, rows, source = args[:4]
    if not rw.lengths(rows) and not rw.lengths(source):
        return None
    if rw.lengths(x):
        rw.no_rule("a write by index into a padded tensor", node)
    from passes.host_values.rules.addressing import write_rows

    length = rw.lengths(rows).get(0, rw.lengths(source).get(dim))
    if node.target is aten.index_copy.default:
        x = rw.call(aten.clone.default, x)
    write_rows(rw, x, dim, rows, source, length)  # type: ignore[arg-type]
    return x


def masked_scatter(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.masked_scatter(mask, source)``: the n-th true element takes the n-th of the source."""
    x, mask, source = args[:3]
    if not any(rw.lengths(a) for a in args[:3]):
        return None
    shape = list(x.meta["val"].shape)
    wide = rw.call(aten.expand.default, rw.neutral(mask, 0), shape)
    flat = rw.call(aten.reshape.default, wide, [-1])
    position = rw.call(aten.sub.Tensor, rw.call(aten.cumsum.default, flat, 0), 1)
    count = source.meta["val"].numel()
    rows = rw.call(aten.clamp.default, position, 0, max(count - 1, 0))
    taken = rw.call(aten.index_select.default, rw.call(aten.reshape.default, source, [-1]), 0, rows)
    made = rw.call(aten.where.self, wide, rw.call(aten.reshape.default, taken, shape), x)
    if node.target is aten.masked_scatter_.default:
        made = rw.call(aten.copy_.default, x, made)
    return rw.padded(made, rw.lengths(x))


RULES: dict[Any, Rule] = {
    aten.masked_scatter.default: masked_scatter,
    aten.masked_scatter_.default: masked_scatter,
    aten.index.Tensor: index,
    aten.index_select.default: index_select,
    aten.gather.default: gather,
    aten.embedding.default: embedding,
    aten.index_put_.default: index_put,
    aten.index_put.default: index_put,
    aten._index_put_impl_.default: index_put,
    aten.index_add_.default: index_add,
    aten.index_add.default: index_add,
    aten.scatter_add_.default: scatter_add,
    aten.scatter_add.default: scatter_add,
    aten.index_copy_.default: index_copy,
    aten.index_copy.default: index_copy,
}
