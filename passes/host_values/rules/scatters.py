"""``scatter`` with an index of bounded length: what lies beyond it writes what is there anyway.

Before::

    %_ : scatter_.value(%x, 1, %index, 0.0)              # index [2, u0]

After, with four columns at most::

    %last : index_select.default(%index, 1, %valid)      # columns behind the last true one repeat it
    %present : gather.default(%x, 1, %last)
    %new : where.self(%some, %value, %present)           # a row without any keeps what it has
    %_ : scatter_.src(%x, 1, %last, %new)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from passes.core.symbols import is_symbol
from passes.host_values.rewriter import Rewriter, Rule

aten = torch.ops.aten
_IN_PLACE = (aten.scatter_.src, aten.scatter_.value)


def scatter(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.scatter(dim, index, source)``, in place or not; the source may be a number."""
    x, dim, index, source = args[:4]
    padded = [a for a in (x, index, source) if isinstance(a, Node) and rw.lengths(a)]
    if not padded or len(args) > 4 or kwargs:
        return None
    if is_symbol(source):
        rw.no_rule("a number on the device, scattered", node)
    rank = x.meta["val"].dim()
    dim %= rank
    index = _fitted(rw, x, dim, index, source, rank)
    if not rw.lengths(index):
        return rw.padded(rw.call(node.target, x, dim, index, source), rw.lengths(x))
    index, source = _last_repeated(rw, dim, index, source)
    value = x.meta["val"]
    if not isinstance(source, Node):
        source = rw.call(aten.full.default, [], source, dtype=value.dtype, device=value.device)
    present = rw.call(aten.gather.default, x, dim, index)
    new = rw.call(aten.where.self, _written(rw, dim, index), source, present)
    target = aten.scatter_.src if node.target in _IN_PLACE else aten.scatter.src
    return rw.padded(rw.call(target, x, dim, index, new), rw.lengths(x))


def _fitted(rw: Rewriter, x: Node, dim: int, index: Node, source: Any, rank: int) -> Node:
    """The index, no longer than the source, nor than ``x`` where it does not point into it."""
    for other in range(rank):
        if other != dim:
            index = rw.front(index, other, x.meta["val"].shape[other])
        if isinstance(source, Node):
            index = rw.front(index, other, source.meta["val"].shape[other])
    return index


def _last_repeated(rw: Rewriter, dim: int, index: Node, source: Any) -> tuple[Node, Any]:
    """Index and source of one shape, with the last true entry along ``dim`` behind all others; rows beyond point at row 0."""
    lengths, shape = rw.lengths(index), index.meta["val"].shape
    if isinstance(source, Node):
        for other, size in enumerate(shape):
            source = rw.front(source, other, size)
            if source.meta["val"].shape[other] != size:
                source = rw.call(aten.slice.Tensor, source, other, 0, size)
    if dim in lengths:
        last = rw.number(sympy.Max(lengths[dim] - 1, 0))
        valid = rw.call(aten.minimum.default, rw.iota(shape[dim], index.meta["val"].device), last)
        index = rw.padded(rw.call(aten.index_select.default, index, dim, valid), lengths)
        source = rw.call(aten.index_select.default, source, dim, valid) if isinstance(source, Node) else source
    others = [other for other in lengths if other != dim]
    none = rw.call(aten.logical_not.default, _written(rw, dim, index))
    if others or dim in lengths:
        index = rw.padded(rw.call(aten.masked_fill.Scalar, index, none, 0), lengths)
    return index, source


def _written(rw: Rewriter, dim: int, index: Node) -> Node:
    """Which entries of a repeated index are true: rows within their lengths, if there is anything along ``dim``."""
    lengths = rw.lengths(index)
    mask = rw.mask(index, [other for other in lengths if other != dim])
    if dim not in lengths:
        assert mask is not None
        return mask
    some = rw.call(aten.gt.Scalar, rw.number(lengths[dim]), 0)
    return some if mask is None else rw.call(aten.logical_and.default, mask, some)


def into_padded(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """A write by index into a tensor of bounded length; the graph checks that no index lies beyond the true one."""
    x, dim = args[:2]
    alone = isinstance(x, Node) and set(rw.lengths(x)) == {dim % max(x.meta["val"].dim(), 1)}
    if not alone or any(rw.lengths(a) for a in args[2:]) or any(map(is_symbol, args)):
        return None
    dim %= x.meta["val"].dim()
    limit = rw.number(rw.lengths(x)[dim])
    made = rw.call(node.target, *args, **kwargs)
    if isinstance(limit, Node):
        made.meta["limits"] = {dim: limit}
    return rw.padded(made, rw.lengths(x))


_INTO = (
    *(aten.scatter_reduce.two, aten.scatter_reduce_.two, aten.index_reduce.default, aten.index_reduce_.default),
    *(aten.index_fill_.int_Scalar, aten.index_fill.int_Scalar),
)
RULES: dict[Any, Rule] = dict.fromkeys((aten.scatter_.src, aten.scatter_.value, aten.scatter.src, aten.scatter.value), scatter)
RULES |= dict.fromkeys(_INTO, into_padded)
