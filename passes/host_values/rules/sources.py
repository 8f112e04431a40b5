"""Where lengths come from: operators whose result is as long as the data says."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch.fx import Node

from passes.core.symbols import expression_of, is_symbol
from passes.host_values.rewriter import Rewriter, Rule

aten = torch.ops.aten


def last_in_order(dtype: torch.dtype) -> float:
    """A value that nothing is sorted behind."""
    return math.nan if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max


def true_rows(rw: Rewriter, mask: Node, symbol_of: Any) -> tuple[Node, sympy.Basic]:
    """Indices ``[bound, dimensions]`` of the nonzero elements of ``mask``, and how many there are.

    Args:
        symbol_of: the traced size that stands for the count.
    """
    mask = rw.neutral(mask, 0)
    value = mask.meta["val"]
    flags = mask if value.dtype == torch.bool else rw.call(aten.ne.Scalar, mask, 0)
    length = rw.facts.resolve(expression_of(symbol_of))
    if isinstance(length, sympy.Symbol):
        rw.bounds.count(length, value.numel())
        rw.define(length, rw.call(aten.sum.default, flags))
    rows = rw.call(aten.nonzero_static.default, flags, size=rw.bound(length), fill_value=0)
    return rows, length


def nonzero(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``x.nonzero()``."""
    rows, length = true_rows(rw, args[0], node.meta["val"].shape[0])
    if not length.free_symbols or rw.is_exact(length):  # all rows are true ones, so that the step may return them
        rows = _column_by_column(rw, rows)
    if not rw.aliases.is_written(node):
        rows.meta["zeros"] = "exactly"
    return rw.padded(rows, {0: length} if length.free_symbols else {})


def _column_by_column(rw: Rewriter, rows: Node) -> Node:
    """``rows`` in the layout of ``nonzero``, which has one column behind the other: strides ``(1, count)``."""
    columns = rw.call(aten.clone.default, rw.call(aten.t.default, rows), memory_format=torch.contiguous_format)
    return rw.call(aten.t.default, columns)


def masked_select(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``x.masked_select(mask)``."""
    shape = list(torch.broadcast_shapes(args[0].meta["val"].shape, args[1].meta["val"].shape))
    x, mask = (rw.padded(rw.call(aten.expand.default, a, shape), rw.lengths(a)) for a in args[:2])
    rows, length = true_rows(rw, mask, node.meta["val"].shape[0])
    picked = rw.call(aten.index.Tensor, x, [rw.call(aten.select.int, rows, 1, d) for d in range(len(shape))])
    return rw.padded(picked, {0: length} if length.free_symbols else {})


def repeat_interleave(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``repeat_interleave(repeats)``: how often each index is repeated is data."""
    repeats = rw.neutral(args[0], 0)
    length = rw.facts.resolve(expression_of(node.meta["val"].shape[0]))
    ends = rw.call(aten.cumsum.default, repeats, 0)
    if isinstance(length, sympy.Symbol):
        rw.define(length, rw.call(aten.select.int, ends, 0, -1))
    count = rw.bound(length)
    iota = rw.iota(count, repeats.meta["val"].device)
    made = rw.call(aten.searchsorted.Tensor, ends, iota, right=True)
    made = rw.call(aten.clamp.default, made, 0, repeats.meta["val"].shape[0] - 1)
    return rw.padded(made, {0: length} if length.free_symbols else {})


def bincount(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``torch.bincount(x, minlength=n)``: n bins, as long as nothing falls beyond them."""
    x = args[0]
    weights = args[1] if len(args) > 1 else kwargs.get("weights")
    least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
    size = node.meta["val"].shape[0]
    value = x.meta["val"]
    device = value.device
    mask = rw.mask(x)
    wide = rw.call(aten._to_copy.default, rw.neutral(x, 0), dtype=torch.int64)
    if value.numel():
        rw.require(rw.call(aten.all.default, rw.call(aten.ge.Scalar, wide, 0)), here=True)
    top = rw.call(aten.add.Tensor, rw.call(aten.amax.default, wide, [0]), 1) if value.numel() else None
    bins: sympy.Basic = rw.facts.resolve(expression_of(size))
    if isinstance(bins, sympy.Symbol) and top is not None:
        floor = rw.call(aten.full.default, [], int(least), dtype=torch.int64, device=device)
        rw.define(bins, rw.call(aten.maximum.default, top, floor))
        hint = rw.facts.hint(bins)
        if hint == least and least:
            rw.replaced(bins, int(hint))
            bins = sympy.Integer(int(hint))
    count = rw.bound(bins)
    if weights is None:
        ones = rw.call(aten.full.default, list(value.shape), 1, dtype=torch.int64, device=device)
    else:
        ones = rw.neutral(weights, 0)
    if mask is not None and weights is None:
        zero = rw.call(aten.full.default, [], 0, dtype=torch.int64, device=device)
        ones = rw.call(aten.where.self, mask, ones, zero)
    zeros = rw.call(aten.full.default, [count], 0, dtype=ones.meta["val"].dtype, device=device)
    inside = rw.call(aten.clamp.default, wide, 0, count - 1)
    made = rw.call(aten.scatter_add.default, zeros, 0, inside, ones)
    return rw.padded(made, {0: bins} if bins.free_symbols else {})


def unique2(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Node, Node, Node]:
    """``torch.unique(x)``: sorted, firsts of each run moved to the front."""
    x = args[0]
    value = x.meta["val"]
    if rw.lengths(x) and value.dim() != 1:
        rw.no_rule("unique of a padded tensor of several dimensions", node)
    count = value.numel()
    flat = rw.call(aten.reshape.default, x, [count])
    mask = rw.mask(x)
    if mask is not None:
        flat = rw.neutral(x, last_in_order(value.dtype))
    ordered = rw.call(aten.sort.stable, flat, stable=True)
    values, order = rw.item(ordered, 0), rw.item(ordered, 1)
    inverse, counts, first = _runs(rw, values)
    if mask is not None:
        first = rw.call(aten.logical_and.default, first, mask)
    size = node.meta["val"][0].shape[0]
    rows, length = true_rows(rw, first, size)
    picked = rw.call(aten.index_select.default, values, 0, rw.call(aten.select.int, rows, 1, 0))
    lengths = {0: length} if length.free_symbols else {}
    back = rw.call(aten.scatter.src, inverse, 0, order, inverse)
    back = rw.call(aten.reshape.default, back, list(value.shape))
    bound = picked.meta["val"].shape[0]
    zeros = rw.call(aten.full.default, [count], 0, dtype=torch.int64, device=value.device)
    ones = counts if mask is None else rw.call(aten.mul.Tensor, counts, mask)
    number = rw.call(aten.slice.Tensor, rw.call(aten.scatter_add.default, zeros, 0, inverse, ones), 0, 0, bound)
    return rw.padded(picked, lengths), rw.padded(back, rw.lengths(x)), rw.padded(number, lengths)


def _runs(rw: Rewriter, values: Node) -> tuple[Node, Node, Node]:
    """For a sorted tensor: the run that each element is in, ones, and whether it is the first of its run."""
    value = values.meta["val"]
    count = value.shape[0]
    ones = rw.call(aten.full.default, [count], 1, dtype=torch.int64, device=value.device)
    start = rw.call(aten.full.default, [1], True, dtype=torch.bool, device=value.device)
    if count > 1:
        changes = rw.call(
            aten.ne.Tensor, rw.call(aten.slice.Tensor, values, 0, 1, count), rw.call(aten.slice.Tensor, values, 0, 0, count - 1)
        )
        start = rw.call(aten.cat.default, [start, changes])
    runs = rw.call(aten.sub.Tensor, rw.call(aten.cumsum.default, start, 0), 1)
    return runs, ones, start


def unique_consecutive(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Node, Node, Node]:
    """``torch.unique_consecutive(x)``: firsts of each run moved to the front."""
    x = args[0]
    if rw.lengths(x) or (len(args) > 3 and args[3] is not None) or kwargs.get("dim") is not None:
        rw.no_rule("unique_consecutive of a padded tensor, or along a dimension", node)
    count = x.meta["val"].numel()
    flat = rw.call(aten.reshape.default, x, [count])
    runs, ones, first = _runs(rw, flat)
    rows, length = true_rows(rw, first, node.meta["val"][0].shape[0])
    picked = rw.call(aten.index_select.default, flat, 0, rw.call(aten.select.int, rows, 1, 0))
    zeros = rw.call(aten.full.default, [count], 0, dtype=torch.int64, device=x.meta["val"].device)
    number = rw.call(
        aten.slice.Tensor, rw.call(aten.scatter_add.default, zeros, 0, runs, ones), 0, 0, picked.meta["val"].shape[0]
    )
    lengths = {0: length} if length.free_symbols else {}
    inverse = rw.call(aten.reshape.default, runs, list(x.meta["val"].shape))
    return rw.padded(picked, lengths), inverse, rw.padded(number, lengths)


def assert_scalar(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[()]:
    """An assertion over host values: a condition of the graph."""
    if is_symbol(args[0]):
        rw.facts.decide(args[0].meta["val"].node.expr, True, rw.site)
    return ()


RULES: dict[Any, Rule] = {
    aten.nonzero.default: nonzero,
    aten.masked_select.default: masked_select,
    aten.repeat_interleave.Tensor: repeat_interleave,
    aten.bincount.default: bincount,
    aten._unique2.default: unique2,
    aten.unique_consecutive.default: unique_consecutive,
    aten._assert_scalar.default: assert_scalar,
    **{
        target: (lambda rw, node, args, kwargs: ())
        for target in (aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default)
    },
}
