"""A host value that scales, shifts, fills or is compared with tensors: a 0-d tensor takes its place.

Before::

    %u : _local_scalar_dense(%temperature)
    %y : div.Tensor(%x, %u)

After::

    %y : div.Tensor(%x, %temperature)

A Python number and a 0-d tensor do not promote alike, and do not round alike: a kernel takes a number in the precision it
computes in (float32 for bfloat16), and on CUDA divides by a number by multiplying with its reciprocal. Both are done here
in the open, so that the result has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.rewriter import Rewriter, Rule
from passes.symbols import expression_of, is_symbol

aten = torch.ops.aten
_TENSOR = {
    "Scalar": "Tensor",
    "Tensor_Scalar": "Tensor_Tensor",
    "Tensor": "Tensor",
    "Tensor_Tensor": "Tensor_Tensor",
    "Scalar_Tensor": "Tensor_Tensor",
    "Scalar_": "Tensor",
}
_LOW = (torch.float16, torch.bfloat16)


def pointwise(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """A binary operator, in place or not, of a tensor and a symbol."""
    if is_symbol(kwargs.get("alpha")):
        return _scaled(rw, node, args, kwargs["alpha"])
    if len(args) < 2 or not (is_symbol(args[0]) or is_symbol(args[1])) or any(map(is_symbol, kwargs.values())):
        return None
    name, overload = node.target._schema.name.split("::")[1], node.target._overloadname  # type: ignore[union-attr]
    in_place = name.endswith("_") and not name.startswith("__")
    packet = getattr(aten, name.rstrip("_") if in_place else name)
    function = getattr(packet, _TENSOR.get(overload, overload))
    tensor = args[1] if is_symbol(args[0]) else args[0]
    dtype, device = tensor.meta["val"].dtype, tensor.meta["val"].device
    number = args[0] if is_symbol(args[0]) else args[1]
    common = torch.result_type(tensor.meta["val"], 1.0 if isinstance(number.meta["val"], torch.SymFloat) else 1)
    wide = torch.float32 if common in _LOW else common
    values = [on_device(rw, a, wide, device) if is_symbol(a) else cast(rw, a, wide) for a in args[:2]]
    if name.startswith("div") and device.type == "cuda" and wide.is_floating_point and is_symbol(args[1]) and not kwargs:
        result = rw.call(aten.mul.Tensor, values[0], rw.call(aten.reciprocal.default, values[1]))
    else:
        result = rw.call(function, *values, *args[2:], **kwargs)
    lengths = rw.lengths(tensor)
    if in_place:
        return rw.padded(rw.call(aten.copy_.default, tensor, rw.keep(tensor, cast(rw, result, dtype))), lengths)
    return rw.padded(cast(rw, result, node.meta["val"].dtype), lengths)


def _scaled(rw: Rewriter, node: Node, args: tuple[Any, ...], alpha: Node) -> Node | None:
    """``x.add(y, alpha=u)``: a multiply-add that rounds once, done in float64 where that tells the difference."""
    x, y = args[:2]
    dtype = node.meta["val"].dtype
    if not isinstance(y, Node) or is_symbol(y):
        return None
    wide = torch.float64 if dtype == torch.float32 else torch.float32 if dtype in _LOW else dtype
    scale = rw.scalar(alpha)
    scale = rw.call(aten._to_copy.default, scale, dtype=dtype if dtype not in _LOW else torch.float32)
    product = rw.call(aten.mul.Tensor, cast(rw, y, wide), cast(rw, scale, wide))
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    made = rw.call(aten.sub.Tensor if name.startswith("sub") else aten.add.Tensor, cast(rw, x, wide), product)
    made = cast(rw, made, dtype)
    if name.endswith("_"):
        return rw.padded(rw.call(aten.copy_.default, x, rw.keep(x, made)), rw.lengths(x))
    return rw.padded(made, rw.expected(node))


def lerp(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.lerp(end, u)``, in place or not."""
    x, end, weight = args
    if not is_symbol(weight):
        return None
    value = x.meta["val"]
    number = rw.call(aten.expand.default, on_device(rw, weight, value.dtype, value.device), list(node.meta["val"].shape))
    made = rw.call(aten.lerp.Tensor, x, end, number)
    if node.target is aten.lerp_.Scalar:
        return rw.padded(rw.call(aten.copy_.default, x, rw.keep(x, made)), rw.lengths(x))
    return rw.padded(made, rw.lengths(x))


def roll(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.roll(u, dim)``: rows by index."""
    x, shifts = args[0], args[1]
    dims = args[2] if len(args) > 2 else kwargs.get("dims", [])
    if not any(map(is_symbol, shifts)):
        return None
    if rw.lengths(x) or not dims:
        rw.no_rule("a roll of a padded or flattened tensor by an amount that only the device knows", node)
    made = x
    for shift, dim in zip(shifts, dims, strict=True):
        size, device = x.meta["val"].shape[dim], x.meta["val"].device
        amount = rw.scalar(shift)
        how = aten.sub.Tensor if isinstance(amount, Node) else aten.sub.Scalar
        rows = rw.call(aten.remainder.Scalar, rw.call(how, rw.iota(size, device), amount), size)
        made = rw.call(aten.index_select.default, made, dim, rows)
    return made


def cast(rw: Rewriter, value: Any, dtype: torch.dtype) -> Any:
    """``value`` in another dtype; numbers as they are."""
    if not isinstance(value, Node) or value.meta["val"].dtype == dtype:
        return value
    return rw.padded(rw.call(aten._to_copy.default, value, dtype=dtype), rw.lengths(value))


def on_device(rw: Rewriter, symbol: Node, dtype: torch.dtype, device: torch.device) -> Any:
    """The 0-d tensor of a symbol in ``dtype``, on the device of what it meets."""
    value = rw.scalar(symbol)
    if not isinstance(value, Node):
        return value
    if value.meta["val"].device != device:
        value = rw.call(aten._to_copy.default, value, device=device)
    return cast(rw, value, dtype)


def fill_(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.fill_(u)``."""
    if not is_symbol(args[1]):
        return None
    value = args[0].meta["val"]
    number = on_device(rw, args[1], value.dtype, value.device)
    return rw.padded(rw.call(aten.copy_.default, args[0], rw.keep(args[0], number)), rw.lengths(args[0]))


def full(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``torch.full(size, u)``."""
    if not is_symbol(args[1]):
        return None
    value = node.meta["val"]
    number = on_device(rw, args[1], value.dtype, value.device)
    sizes = [rw.size(size) for size in args[0]]
    return rw.padded(rw.call(aten.clone.default, rw.call(aten.expand.default, number, sizes)), rw.expected(node))


def full_like(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``torch.full_like(x, u)``."""
    if not is_symbol(args[1]):
        return None
    value = node.meta["val"]
    number = on_device(rw, args[1], value.dtype, value.device)
    shape = list(args[0].meta["val"].shape)
    return rw.padded(rw.call(aten.clone.default, rw.call(aten.expand.default, number, shape)), rw.lengths(args[0]))


def scalar_tensor(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``torch.tensor(u)``."""
    if not is_symbol(args[0]):
        return None
    number = rw.scalar(args[0])
    return rw.call(aten.clone.default, cast(rw, number, node.meta["val"].dtype))  # it stays on the device of what it comes from


def masked_fill(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.masked_fill(mask, u)``, in place or not."""
    x, mask, number = args
    if not is_symbol(number):
        return None
    value = x.meta["val"]
    filled = rw.call(aten.where.self, mask, on_device(rw, number, value.dtype, value.device), x)
    if node.target is aten.masked_fill_.Scalar:
        filled = rw.call(aten.copy_.default, x, rw.keep(x, filled))
    return rw.padded(filled, rw.lengths(x))


def where(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``torch.where(mask, u, x)`` and its like."""
    if not any(map(is_symbol, args[1:])):
        return None
    value = node.meta["val"]
    sides = [on_device(rw, a, value.dtype, value.device) if is_symbol(a) else cast(rw, a, value.dtype) for a in args[1:]]
    sides = [
        a if isinstance(a, Node) else rw.call(aten.full.default, [], a, dtype=value.dtype, device=value.device) for a in sides
    ]
    return rw.padded(rw.call(aten.where.self, args[0], *sides), rw.expected(node))


def clamp(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.clamp(u, v)``."""
    low, high = (*args[1:], None, None)[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if not is_symbol(low) and not is_symbol(high):
        return None
    x, dtype = args[0], node.meta["val"].dtype
    made = cast(rw, x, dtype)
    for limit, function in ((low, aten.maximum.default), (high, aten.minimum.default)):
        if limit is None:
            continue
        device = x.meta["val"].device
        other = (
            on_device(rw, limit, dtype, device)
            if is_symbol(limit)
            else rw.call(aten.full.default, [], limit, dtype=dtype, device=device)
        )
        made = rw.call(function, made, other)
    return rw.padded(made, rw.lengths(x))


def arange(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``torch.arange(u, u + 4)``, ``torch.arange(u)``: from a constant ``arange``."""
    if not any(map(is_symbol, args)):
        return None
    start: Any = 0
    step: Any = 1
    if node.target is not aten.arange.default:
        start = args[0]
        step = args[2] if node.target is aten.arange.start_step and len(args) > 2 else 1
    value = node.meta["val"]
    if is_symbol(step) or any(isinstance(a.meta["val"], torch.SymFloat) for a in args if is_symbol(a)):
        rw.no_rule("a range with a step or bounds that are not whole numbers", node)
    made = rw.iota(rw.bound(expression_of(value.shape[0])), value.device)
    if step != 1:
        made = rw.call(aten.mul.Tensor, made, step)
    first = on_device(rw, start, torch.int64, value.device) if is_symbol(start) else start
    if isinstance(first, Node) or first:
        made = rw.call(aten.add.Tensor, made, first)
    return rw.padded(cast(rw, made, value.dtype), rw.expected(node))


RULES: dict[Any, Rule] = {
    aten.lerp.Scalar: lerp,
    aten.lerp_.Scalar: lerp,
    aten.roll.default: roll,
    aten.fill_.Scalar: fill_,
    aten.full.default: full,
    aten.full_like.default: full_like,
    aten.scalar_tensor.default: scalar_tensor,
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill_.Scalar: masked_fill,
    aten.where.ScalarSelf: where,
    aten.where.ScalarOther: where,
    aten.where.Scalar: where,
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp,
    aten.arange.default: arange,
    aten.arange.start: arange,
    aten.arange.start_step: arange,
}
