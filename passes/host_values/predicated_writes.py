"""In-place operators under a condition of the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.core.predicates import CERTAIN
from passes.core.schema import written_arguments
from passes.errors import Unremovable
from passes.host_values.emitter import Emitter

aten = torch.ops.aten
_ADDING = (aten.index_add_.default, aten.scatter_add_.default)
_FILLING = (aten.zero_.default, aten.fill_.Scalar)


def predicated_write(rw: Emitter, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``target(*args)`` if the iteration or the arm takes place, nothing else.

    What is added becomes zero (below zero, which leaves zeros of either sign as they are), what is written becomes what is
    there; only for operators of another kind is the tensor copied.

    Raises:
        Unremovable: it writes anything but its first argument.
    """
    x, runs = args[0], rw.running()
    if runs is True:
        made = rw.plain(target, *args, **kwargs)
        made.meta[CERTAIN] = True
        return made
    if written_arguments(target) != {target._schema.arguments[0].name}:
        raise Unremovable("a write under a condition to more than the first argument", str(target), rw.site)
    if target in _ADDING:
        dim, index, source = args[1:4]
        kept = _nothing_else(rw, source, runs)
        return rw.plain(target, x, dim, index, kept, *args[4:], **kwargs)
    if target in (aten.index_put_.default, aten._index_put_impl_.default):
        values, add = args[2], args[3] if len(args) > 3 else kwargs.get("accumulate", False)
        if add:
            kept = _nothing_else(rw, values, runs)
        else:
            kept = rw.plain(aten.where.self, runs, values, rw.plain(aten.index.Tensor, x, list(args[1])))
        return rw.plain(target, x, args[1], kept, *args[3:], **kwargs)
    if target is aten.index_copy_.default:
        present = rw.plain(aten.index_select.default, x, args[1], args[2])
        return rw.plain(target, x, args[1], args[2], rw.plain(aten.where.self, runs, args[3], present))
    if target in _FILLING and not any(isinstance(value, Node) for value in args[1:]):
        return rw.plain(aten.masked_fill_.Scalar, x, runs, args[1] if len(args) > 1 else 0)
    if target is aten.copy_.default and _alike(x, args[1]):
        return rw.plain(target, x, rw.plain(aten.where.self, runs, args[1], x))
    before = rw.plain(aten.clone.default, x)
    rw.plain(target, *args, **kwargs)
    return rw.plain(aten.copy_.default, x, rw.plain(aten.where.self, runs, x, before))


def _alike(x: Node, y: Node) -> bool:
    a, b = x.meta["val"], y.meta["val"]
    return bool((a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device))


def _nothing_else(rw: Emitter, values: Node, runs: Node) -> Node:
    """What to add: ``values``, or nothing."""
    nothing = -0.0 if values.meta["val"].dtype.is_floating_point else 0
    return rw.plain(aten.masked_fill.Scalar, values, rw.plain(aten.logical_not.default, runs), nothing)
