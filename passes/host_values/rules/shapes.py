"""Operators that keep, rearrange or make dimensions of bounded length."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from passes.core.schema import is_mutable
from passes.core.symbols import expression_of, is_symbol
from passes.host_values.rewriter import Rewriter, Rule
from passes.host_values.rules.addressing import gather
from passes.host_values.rules.arithmetic import filled

aten = torch.ops.aten


def aligned(rw: Rewriter, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an elementwise operator, padded dimensions cut to the smallest bound among them."""
    tensors = [a for a in args if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)]
    rank = max((a.meta["val"].dim() for a in tensors), default=0)
    smallest: dict[int, int] = {}
    for a in tensors:
        shift = rank - a.meta["val"].dim()
        for dim in rw.lengths(a):
            size = a.meta["val"].shape[dim]
            smallest[dim + shift] = min(size, smallest.get(dim + shift, size))
    if not smallest:
        return args
    for a in tensors:  # a static size that has to equal a true length: an equality that the graph assumes
        shift = rank - a.meta["val"].dim()
        for dim, size in enumerate(a.meta["val"].shape):
            if dim + shift in smallest and size != 1:
                smallest[dim + shift] = min(int(size), smallest[dim + shift])
    return tuple(_cut(rw, a, smallest, rank) if a in tensors else a for a in args)


def _cut(rw: Rewriter, node: Node, sizes: dict[int, int], rank: int) -> Node:
    shift = rank - node.meta["val"].dim()
    for dim, size in enumerate(node.meta["val"].shape):
        wanted = sizes.get(dim + shift, size)
        if size not in (1, wanted):
            node = rw.padded(rw.call(aten.slice.Tensor, node, dim, 0, wanted), rw.lengths(node))
    return node


def elementwise(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """A pointwise operator on padded tensors; in place, what is beyond the true lengths stays."""
    args = aligned(rw, args)
    if is_mutable(node.target):
        return in_place(rw, node, args, kwargs)
    return rw.padded(rw.call(node.target, *args, **kwargs), rw.expected(node))


def untagged(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """Elementwise operators that torch does not mark as such."""
    if any(map(is_symbol, args)) or not _touched(rw, node, args):
        return None
    return elementwise(rw, node, args, kwargs)


def in_place(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``x.op_(...)`` on the true part of ``x``."""
    target, lengths = args[0], rw.lengths(args[0])
    if not lengths:
        made = rw.call(node.target, *[rw.neutral(a, 0) if rw.lengths(a) else a for a in args], **kwargs)
        return made
    if node.target is aten.copy_.default:
        new = args[1]
    else:
        name, overload = node.target._schema.name.split("::")[1], node.target._overloadname  # type: ignore[union-attr]
        new = rw.call(getattr(getattr(aten, name.rstrip("_")), overload), *args, **kwargs)
    if new.meta["val"].dtype != target.meta["val"].dtype:
        new = rw.call(aten._to_copy.default, new, dtype=target.meta["val"].dtype)
    return rw.padded(rw.call(aten.copy_.default, target, rw.keep(target, new)), lengths)


def _touched(rw: Rewriter, node: Node, args: tuple[Any, ...]) -> bool:
    leaves = torch.utils._pytree.tree_leaves(args)
    return any(isinstance(a, Node) and (is_symbol(a) or bool(rw.lengths(a))) for a in leaves) or rw.has_dynamic_result(node)


def same(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """Views and copies that leave each dimension what it is, or move it."""
    if not _touched(rw, node, args):
        return None
    if any(map(is_symbol, args[1:])):
        rw.no_rule("a dimension that only the device knows", node)
    return rw.padded(rw.call(node.target, *args, **kwargs), rw.expected(node))


def squeeze_(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.squeeze_(dim)`` and its like on a tensor that the step made: as a view, which no later reader can be surprised by."""
    if not isinstance(rw.aliases.root(args[0]), Node):
        return None
    name, overload = node.target._schema.name.split("::")[1], node.target._overloadname  # type: ignore[union-attr]
    return rw.padded(rw.call(getattr(getattr(aten, name.rstrip("_")), overload), *args, **kwargs), rw.expected(node))


def static_shape(rw: Rewriter, node: Node) -> list[int]:
    """The padded shape of an old node's result."""
    return [rw.bound(s.node.expr) if isinstance(s, torch.SymInt) else int(s) for s in node.meta["val"].shape]


def view(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """Reshapes that keep a padded dimension, split it, or merge it with what follows: true rows stay in front."""
    if not _touched(rw, node, args):
        return None
    old = node.args[0].meta["val"]  # type: ignore[union-attr]
    if rw.lengths(args[0]) and not _keeps_rows(rw, list(old.shape), list(node.meta["val"].shape)):
        rw.no_rule("a reshape that puts padding between true elements", node)
    target = aten.view.default if node.target is aten.view.default else aten.reshape.default
    return rw.padded(rw.call(target, args[0], static_shape(rw, node)), rw.expected(node))


def _keeps_rows(rw: Rewriter, before: list[Any], after: list[Any]) -> bool:
    """Whether each dynamic dimension leads the group of dimensions that it is merged with or split into."""
    old, new = ([_expr(rw, size) for size in sizes if not _is_one(size)] for sizes in (before, after))
    while old or new:
        left, right = old[:1], new[:1]
        old, new = old[1:], new[1:]
        while not _are_equal(rw, sympy.prod(left), sympy.prod(right)):
            if old and _grows(sympy.prod(left), sympy.prod(right), bool(new)):
                left.append(old.pop(0))
            elif new:
                right.append(new.pop(0))
            elif old:
                left.append(old.pop(0))
            else:
                return False
        if any(size.free_symbols for size in (*left[1:], *right[1:])):
            return False
    return True


def _are_equal(rw: Rewriter, left: sympy.Basic, right: sympy.Basic) -> bool:
    """Whether two products are the same number whatever their symbols are. What differs for this data is not."""
    difference = sympy.expand(left - right)
    if difference.is_number:
        return bool(difference == 0)
    hint = rw.facts.hint(difference)
    return (hint is None or hint == 0) and bool(sympy.simplify(difference) == 0)


def _is_one(size: Any) -> bool:
    """Whether a dimension has one element, wherever it stands."""
    return isinstance(size, int) and size == 1


def _grows(left: sympy.Basic, right: sympy.Basic, more: bool) -> bool:
    """Whether the left product is the one to extend."""
    ratio = left / right if right != 0 else sympy.Integer(2)
    if not ratio.is_number and left.free_symbols & right.free_symbols:
        ratio = sympy.simplify(ratio)
    return not more or (ratio.is_number and ratio < 1) or (not ratio.is_number and not left.free_symbols)


def _expr(rw: Rewriter, size: Any) -> sympy.Basic:
    return rw.bounds.simplified(rw.facts.resolve(expression_of(size)))


def expand(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.expand(u, 4)``."""
    if not _touched(rw, node, args):
        return None
    return rw.padded(rw.call(aten.expand.default, args[0], static_shape(rw, node)), rw.expected(node))


def factory(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``torch.zeros(u, 4)`` and its like, with the bound for a size."""
    if not _touched(rw, node, args):
        return None
    shape = static_shape(rw, node)
    position = next(i for i, a in enumerate(args) if isinstance(a, (list, tuple)))
    return rw.padded(rw.call(node.target, *args[:position], shape, *args[position + 1 :], **kwargs), rw.expected(node))


def getitem(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of several results."""
    if isinstance(args[0], (tuple, list)):
        return args[0][args[1]]
    if isinstance(node.meta.get("val"), torch.Tensor) and rw.sized_by_symbols(node):
        made = rw.item(*args)
        rw.aliases.made(made)
        return rw.padded(made, rw.expected(node))
    return None


def split(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``unbind``, ``split`` and ``chunk`` along a dimension that is not padded."""
    if not _touched(rw, node, args):
        return None
    dim = args[1] if node.target is aten.unbind.int and len(args) > 1 else (args[2] if len(args) > 2 else kwargs.get("dim", 0))
    if dim % args[0].meta["val"].dim() in rw.lengths(args[0]) or any(is_symbol(a) for a in torch.utils._pytree.tree_leaves(args)):
        rw.no_rule("a split of a dimension whose length only the device knows", node)
    return rw.call(node.target, *args, **kwargs)


def split_with_sizes(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.split([u, v, ...])``: each part is a window that begins where the one before it ends."""
    x, sizes = args[:2]
    if not _touched(rw, node, args):
        return None
    if not any(map(is_symbol, sizes)):
        return split(rw, node, args, kwargs)
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.meta["val"].dim()
    total, parts, start = x.meta["val"].shape[dim], [], sympy.Integer(0)
    lengths = [rw.facts.resolve(expression_of(size)) for size in sizes]
    if dim in rw.lengths(x):
        rw.no_rule("a split of a dimension whose length only the device knows", node)
    rw.facts.decide(sympy.Eq(sum(lengths), total), True, rw.site)
    for length in lengths:
        rw.facts.decide(sympy.Ge(length, 0), True, rw.site)
        rw.bounds.limit(length, total)
        first = rw.number(start)
        count = rw.bound(length)
        known = length if length.free_symbols and not rw.is_exact(length) else None
        part = gather(rw, x, dim, first, count, known)
        parts.append(rw.padded(part, {**rw.lengths(x), **({dim: length} if known is not None else {})}))
        start = rw.facts.resolve(start + length)
    return tuple(parts)


def cat(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``torch.cat``: along a padded dimension, the second part moves up to where the first truly ends."""
    if not _touched(rw, node, args):
        return None
    parts = [p for p in args[0] if p.meta["val"].numel() or p.meta["val"].dim() > 1]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % parts[0].meta["val"].dim()
    expected = rw.expected(node)
    other = {d: min(p.meta["val"].shape[d] for p in parts) for d in expected if d != dim}
    rank = parts[0].meta["val"].dim()
    parts = [_cut(rw, p, other, rank) for p in parts]
    made = parts[0]
    length: sympy.Basic = rw.lengths(made).get(dim, sympy.Integer(made.meta["val"].shape[dim]))
    for part in parts[1:]:
        added = rw.lengths(part).get(dim, sympy.Integer(part.meta["val"].shape[dim]))
        joined = rw.call(aten.cat.default, [made, part], dim)
        if not length.is_Integer:  # the padding of the first part lies between
            joined = _closed(rw, joined, dim, length, made.meta["val"].shape[dim])
        made, length = joined, rw.facts.resolve(length + added)
    if dim not in expected and length.is_Integer and made.meta["val"].shape[dim] > length:  # the lengths add up to a constant
        made = rw.call(aten.slice.Tensor, made, dim, 0, int(length))
    return rw.padded(made, expected)


def _closed(rw: Rewriter, joined: Node, dim: int, length: sympy.Basic, bound: int) -> Node:
    """``joined`` without the gap from ``length`` to ``bound``."""
    value = joined.meta["val"]
    count = value.shape[dim]
    iota = rw.iota(count, value.device)
    moved = rw.call(aten.add.Tensor, rw.call(aten.sub.Tensor, iota, rw.number(length)), bound)
    source = rw.call(aten.where.self, rw.within(length, count, value.device), iota, moved)
    return rw.call(aten.index_select.default, joined, dim, rw.call(aten.clamp.default, source, 0, count - 1))


def masked_fill(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.masked_fill(mask, t)`` with a 0-d tensor."""
    return filled(rw, node, aligned(rw, args)) if any(map(rw.lengths, args)) else None


def fill_(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.fill_(v)``, ``x.zero_()`` on the true part of ``x``."""
    x, *value = args
    mask = rw.mask(x)
    if mask is None or any(map(is_symbol, value)):
        return None
    if value and isinstance(value[0], Node):
        filled = rw.call(aten.where.self, mask, rw.call(aten._to_copy.default, value[0], dtype=x.meta["val"].dtype), x)
    else:
        filled = rw.call(aten.masked_fill.Scalar, x, mask, *(value or [0]))
    return rw.padded(rw.call(aten.copy_.default, x, filled), rw.lengths(x))


def number(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A size as a number: kept as the symbol it is, for those that compute with it."""
    made = rw.graph.call_function(node.target, args)  # type: ignore[arg-type]
    made.meta = dict(node.meta)
    return made


RULES: dict[Any, Rule] = {
    operator.getitem: getitem,
    aten.sym_size.int: number,
    aten.sym_numel.default: number,
    aten.masked_fill.Tensor: masked_fill,
    aten.masked_fill_.Tensor: masked_fill,
    aten.fill_.Scalar: fill_,
    aten.fill_.Tensor: fill_,
    aten.zero_.default: fill_,
    aten.view.default: view,
    aten._unsafe_view.default: view,
    aten.reshape.default: view,
    aten.expand.default: expand,
    aten.cat.default: cat,
    **{
        target: same
        for target in (
            aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default, aten.unsqueeze.default,
            aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.transpose.int, aten.t.default,
            aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default,
            aten.lift_fresh_copy.default, aten.triu.default, aten.tril.default,
        )
    },
    **{target: squeeze_ for target in (aten.squeeze_.dim, aten.unsqueeze_.default, aten.transpose_.default, aten.t_.default)},
    **{
        target: factory
        for target in (
            aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.full.default, aten.new_zeros.default,
            aten.new_ones.default, aten.new_empty.default, aten.new_full.default,
        )
    },
    **{target: split for target in (aten.unbind.int, aten.split.Tensor)},
    aten.split_with_sizes.default: split_with_sizes,
    **{
        target: untagged
        for target in (
            aten.copy_.default, aten.masked_fill_.Scalar, aten.rsub.Tensor, aten.floor_divide.default,
            aten.hardswish.default, aten.hardswish_.default, aten._prelu_kernel.default,
        )
    },
}  # fmt: skip
