"""A host value that only says where: the index stays on the device.

Reading, before::

    %u : _local_scalar_dense(%position)
    %row : select.int(%cache, 0, %u)

After::

    %row : index.Tensor(%cache, [%position])

Writing, before::

    %row : select.int(%cache, 0, %u)
    %_ : copy_.default(%row, %new)

After, in place and one row only::

    %_ : index_put_.default(%cache, [%position], %new)

An index outside of its tensor is refused by these operators as it is by ``select``. Where the graph assumes something in
any case, the index is kept inside and that it was is one more assumption: a run that goes wrong has to get to its flag.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from passes.core.aliasing import Gathered
from passes.core.symbols import expression_of, is_symbol
from passes.host_values.rewriter import Rewriter, Rule

aten = torch.ops.aten


def select(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.select(dim, u)``; also ``x.select(dim, -k)`` on a dimension whose length only the device knows."""
    x, dim, index = args
    dim %= x.meta["val"].dim()
    length = rw.lengths(x).get(dim)
    if not is_symbol(index) and (length is None or index >= 0):
        if not rw.lengths(x):
            return None
        return rw.padded(rw.call(aten.select.int, x, dim, index), rw.expected(node))
    return rw.padded(row_of(rw, x, dim, rw.facts.resolve(expression_of(index)), length), rw.expected(node))


def row_of(rw: Rewriter, x: Node, dim: int, index: sympy.Basic, length: sympy.Basic | None) -> Node:
    """Row ``index`` of ``x`` as a copy that knows how to be written back; below zero it counts from the end.

    Args:
        length: the true length of the dimension; None where it is the size.
    """
    size = x.meta["val"].shape[dim]
    total = sympy.Integer(size) if length is None else length
    inside = sympy.And(sympy.Ge(index, -total), sympy.Lt(index, total))
    if length is not None and not rw.bounds.certain(sympy.Ge(index, 0)):
        index = sympy.Piecewise((index + total, sympy.Lt(index, 0)), (index, True))
    where = rw.number(index)
    if not rw.bounds.certain(inside):
        if rw.guarded or rw.trips or length is not None:
            rw.assume(inside)
            where = rw.kept_within(where, size) if isinstance(where, Node) else where % size
        else:
            rw.trusted = True
    if not isinstance(where, Node):
        return rw.call(aten.select.int, x, dim, where)
    place = [*[None] * dim, where]

    def read(base: Node) -> Node:
        return rw.aliases.gathered(rw.call(aten.index.Tensor, base, place), Gathered(base, read, write))

    def write(base: Node, row: Node) -> None:
        rw.call(aten.index_put_.default, base, place, row)

    return read(x)


def slice_(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x[start:end]`` with bounds on the device, of a length known or not."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    x, dim, start, end, step = args + defaults[len(args) - 1 :]
    dim %= x.meta["val"].dim()
    whole = rw.lengths(x).get(dim)
    if whole is None and not is_symbol(start) and not is_symbol(end):
        if not rw.lengths(x):
            return None
        return rw.padded(rw.call(aten.slice.Tensor, x, dim, start, end, step), rw.expected(node))
    expected = rw.expected(node)
    length = expected.get(dim, sympy.sympify(node.meta["val"].shape[dim]) if dim not in expected else None)
    size = x.meta["val"].shape[dim]
    if is_symbol(step) or (step != 1 and (is_symbol(start) or (start or 0) < 0)):
        rw.no_rule("a slice with a step whose first row only the device knows", node)
    first = sympy.Integer(0) if start is None else expression_of(start)
    if first.is_negative:
        first = sympy.Max(first + (size if whole is None else whole), 0)
    count = min(rw.bound(length), size)
    if first.is_Integer:
        first = min(int(first), size)
        last = min(first + count * step, size)
        return rw.padded(rw.call(aten.slice.Tensor, x, dim, first, last, step), expected)
    if first.is_negative is not False:  # a start that may count from the end
        total = sympy.Integer(size) if whole is None else whole
        hint = rw.facts.hint(first)
        if hint is not None and hint < 0:
            first = sympy.Max(first + total, 0)  # as far as there is anything in front
    part = gather(rw, x, dim, rw.number(first), count, length if dim in expected and not rw.is_exact(length) else None)
    return rw.padded(part, expected)


def gather(rw: Rewriter, x: Node, dim: int, start: Any, count: int, length: sympy.Basic | None) -> Node:
    """Rows ``start .. start + count`` of ``x`` as a copy that knows how to be written back.

    Args:
        start: 0-d integer tensor, or a number.
        length: how many of the rows are meant; None for all.
    """
    value = x.meta["val"]
    size, device = value.shape[dim], value.device
    index = rw.call(aten.clamp.default, rw.call(aten.add.Tensor, rw.iota(count, device), start), 0, size - 1)

    def read(base: Node) -> Node:
        copy = rw.call(aten.index_select.default, base, dim, index)
        return rw.aliases.gathered(copy, Gathered(base, read, write))

    def write(base: Node, rows: Node) -> None:
        if length is None:
            rw.call(aten.index_copy_.default, base, dim, index, rows)
        else:
            write_rows(rw, base, dim, index, rows, length)

    return read(x)


def write_rows(rw: Rewriter, base: Node, dim: int, index: Node, rows: Node, length: sympy.Basic) -> None:
    """``base[index] = rows`` for the first ``length`` rows; the others repeat the first, or what is there if there is none."""
    count, device = index.meta["val"].shape[0], base.meta["val"].device
    valid = rw.call(aten.masked_fill.Scalar, rw.iota(count, device), rw.beyond(length, count, device), 0)
    target = rw.call(aten.clamp.default, rw.call(aten.index_select.default, index, 0, valid), 0, base.meta["val"].shape[dim] - 1)
    chosen = rw.call(aten.index_select.default, rows, dim, valid)
    present = rw.call(aten.index_select.default, base, dim, target)
    any_row = rw.call(aten.gt.Scalar, rw.number(length), 0)
    rw.call(aten.index_copy_.default, base, dim, target, rw.call(aten.where.self, any_row, chosen, present))


def copy_(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``row.copy_(new)`` where the row is a copy: ``new`` is written to where the row came from, and nowhere else."""
    row, new = args[:2]
    if rw.lengths(row) or rw.lengths(new) or not rw.aliases.is_gathered(row):
        return None
    value = row.meta["val"]
    if new.meta["val"].dtype != value.dtype:
        new = rw.call(aten._to_copy.default, new, dtype=value.dtype)
    if new.meta["val"].shape != value.shape:
        new = rw.call(aten.expand.default, new, list(value.shape))
    rw.aliases.overwrite(row, new)
    return row


RULES: dict[Any, Rule] = {aten.select.int: select, aten.slice.Tensor: slice_, aten.copy_.default: copy_}
