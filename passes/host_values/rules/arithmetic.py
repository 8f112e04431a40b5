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

import sympy
import torch
from torch.fx import Node

from passes.core.schema import base_name
from passes.core.symbols import expression_of, is_symbol
from passes.host_values.rewriter import Rewriter, Rule

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
_IN_FLOAT = {
    "cpu": frozenset(("mul", "div", "floor_divide")),
    "cuda": frozenset(("mul", "div", "floor_divide", "add", "sub", "rsub")),
}
"""Operators that take a number in float32 where their tensor is of lower precision; others round it first."""
_DIVISIONS = ("div", "floor_divide")
_EXPONENTS = (0, 1, 2, 3, -1, -2, 0.5, -0.5)


def pointwise(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """A binary operator, in place or not, of a tensor and a symbol."""
    if is_symbol(kwargs.get("alpha")):
        return _scaled(rw, node, args, kwargs["alpha"])
    if not isinstance(node.target, torch._ops.OpOverload):  # arithmetic of Python: done where its result is used
        return None
    overload = node.target._overloadname
    if len(args) < 2 or any(map(is_symbol, kwargs.values())):
        return None
    numbers = [is_symbol(new) or _is_host_number(old, node) for old, new in zip(node.args[:2], args, strict=False)]
    if not any(numbers):
        return None
    if overload not in _TENSOR and not isinstance(node.target._schema.arguments[1].type, torch.TensorType):
        return None
    overload = _TENSOR.get(overload, overload)
    name, in_place = base_name(node.target)
    tensor, number = args[:2] if numbers[1] else args[1::-1]
    value = tensor.meta["val"]
    wide = _precision(name, tensor, number, node.meta["val"].dtype)
    given = [on_device(rw, a, wide, value.device) if is_symbol(a) else cast(rw, a, wide) for a in args[:2]]
    if name in _DIVISIONS and value.device.type == "cuda" and wide.is_floating_point and numbers[1]:
        rounding = "floor" if name == "floor_divide" else kwargs.get("rounding_mode")
        result = _divided_on_cuda(rw, given, rounding, node.meta["val"].dtype)
    elif in_place and wide == value.dtype and not rw.lengths(tensor):
        return rw.call(getattr(getattr(aten, name + "_"), overload), *given, *args[2:], **kwargs)
    else:
        result = rw.call(getattr(getattr(aten, name), overload), *given, *args[2:], **kwargs)
    return _result(rw, node, tensor, result)


def _is_host_number(value: Any, node: Node) -> bool:
    """Whether an argument is a 0-d tensor of the host's that met tensors of a device: kernels take it as a number."""
    given, result = (part.meta.get("val") if isinstance(part, Node) else None for part in (value, node))
    if not isinstance(given, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    return not given.dim() and given.device != result.device


def takes_host_number(node: Node) -> bool:
    """Whether an operator met a 0-d tensor of the host's on a device."""
    return any(_is_host_number(value, node) for value in node.args)


def _precision(name: str, tensor: Node, number: Node, result: torch.dtype) -> torch.dtype:
    """The dtype in which an operator of a tensor and a number is done."""
    value, other = tensor.meta["val"], number.meta["val"]
    if not isinstance(other, torch.Tensor):
        other = 1.0 if isinstance(other, torch.SymFloat) else 1
    common = torch.result_type(value, other)
    if common in _LOW:
        return torch.float32 if name in _IN_FLOAT.get(value.device.type, _IN_FLOAT["cuda"]) else common
    return result if result.is_floating_point and not common.is_floating_point else common


def _divided_on_cuda(rw: Rewriter, given: list[Node], rounding: str | None, dtype: torch.dtype) -> Node:
    """Division by a number as CUDA kernels do it, by multiplication with its reciprocal; the result is for ``dtype``."""
    x, number = given
    inverse = rw.call(aten.reciprocal.default, number)
    quotient = rw.call(aten.mul.Tensor, x, inverse)
    if rounding is None:
        return quotient
    if rounding == "trunc":
        return rw.call(aten.trunc.default, quotient)
    rest = rw.call(aten.fmod.Tensor, x, number)
    signs = rw.call(aten.ne.Tensor, rw.call(aten.lt.Scalar, rest, 0), rw.call(aten.lt.Scalar, number, 0))
    below = rw.call(aten.logical_and.default, rw.call(aten.ne.Scalar, rest, 0), signs)
    exact = rw.call(aten.mul.Tensor, rw.call(aten.sub.Tensor, x, rest), inverse)
    exact = rw.call(aten.where.self, below, rw.call(aten.sub.Scalar, exact, 1), exact)
    whole = cast(rw, rw.call(aten.floor.default, exact), dtype)  # rounded before it is looked at, and again where one is added
    short = rw.call(aten.gt.Scalar, rw.call(aten.sub.Tensor, exact, whole), 0.5)
    whole = rw.call(aten.where.self, short, rw.call(aten.add.Scalar, whole, 1), whole)
    zero = rw.call(aten.copysign.Tensor, rw.call(aten.zeros_like.default, whole), quotient)
    whole = rw.call(aten.where.self, rw.call(aten.eq.Scalar, exact, 0), zero, whole)
    return rw.call(aten.where.self, rw.call(aten.eq.Scalar, number, 0), quotient, cast(rw, whole, quotient.meta["val"].dtype))


def _result(rw: Rewriter, node: Node, tensor: Node, made: Node) -> Node:
    """What an operator gives, in its dtype: ``made``, or ``tensor`` with that written to it."""
    if base_name(node.target)[1]:
        new = rw.keep(tensor, cast(rw, made, tensor.meta["val"].dtype))
        return rw.padded(rw.call(aten.copy_.default, tensor, new), rw.lengths(tensor))
    return rw.padded(cast(rw, made, node.meta["val"].dtype), rw.expected(node))


def _scaled(rw: Rewriter, node: Node, args: tuple[Any, ...], alpha: Node) -> Node | None:
    """``x.add(y, alpha=u)``: a multiply-add that rounds once, done in a wider dtype where there is one."""
    x, y = args[:2]
    value = node.meta["val"]
    if not isinstance(y, Node) or is_symbol(y):
        return None
    wide = torch.float64 if value.dtype == torch.float32 else torch.float32 if value.dtype in _LOW else value.dtype
    rounded = torch.float32 if value.dtype in _LOW and value.device.type != "cpu" else value.dtype
    product = rw.call(aten.mul.Tensor, cast(rw, y, wide), cast(rw, on_device(rw, alpha, rounded, value.device), wide))
    how = aten.sub.Tensor if base_name(node.target)[0] == "sub" else aten.add.Tensor
    return _result(rw, node, x, rw.call(how, cast(rw, x, wide), product))


def power(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x ** u``: some exponents have kernels of their own, so that it is an assumption whether it is one of them."""
    x, exponent = args[:2]
    if not is_symbol(exponent):
        return None
    expression = rw.facts.resolve(expression_of(exponent))
    hint = rw.facts.hint(expression)
    if hint is None:
        rw.no_rule("a power that the eager run did not read", node)
    if not x.meta["val"].dtype.is_floating_point:
        rw.assume(sympy.Ge(expression, 0))
    kind = float if isinstance(exponent.meta["val"], torch.SymFloat) else int
    special = [kind(e) for e in _EXPONENTS if kind(e) == e]
    if kind(hint) in special:
        rw.assume(sympy.Eq(expression, kind(hint)))
        return rw.padded(rw.call(node.target, x, kind(hint)), rw.expected(node))
    for known in special:
        rw.assume(sympy.Ne(expression, known))
    return pointwise(rw, node, args, kwargs)


def lerp(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.lerp(end, u)``, in place or not."""
    x, end, weight = args
    if not is_symbol(weight):
        return None
    value = x.meta["val"]
    wide = torch.float32 if value.dtype in _LOW else value.dtype
    number = rw.call(aten.expand.default, on_device(rw, weight, wide, value.device), list(value.shape))
    return _result(rw, node, x, rw.call(aten.lerp.Tensor, cast(rw, x, wide), cast(rw, end, wide), number))


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
    if value.target is aten._to_copy.default and _widened(value) and dtype.is_floating_point:
        value = value.args[0]  # type: ignore[assignment]
    if value.meta["val"].device != rw.home(device, symbol):
        value = rw.call(aten._to_copy.default, value, device=device)
    return cast(rw, value, dtype)


def _widened(value: Node) -> bool:
    """Whether a number was made float64 from a floating dtype, which is as good to go on from."""
    source: Any = value.args[0]
    return (
        value.meta["val"].dtype == torch.float64 and source.meta["val"].dtype.is_floating_point and not value.kwargs.get("device")
    )


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
    number, expression = rw.scalar(args[0]), rw.facts.resolve(expression_of(args[0]))
    if node.meta["val"].dtype == torch.bool and isinstance(expression, sympy.Piecewise) and expression.args[0].expr == 1:
        return rw.number(expression.args[0].cond)  # a choice between 1 and 0
    return rw.call(aten.clone.default, cast(rw, number, node.meta["val"].dtype))  # it stays on the device of what it comes from


def masked_fill(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """``x.masked_fill(mask, u)``, in place or not; also with a 0-d tensor, which a GPU's kernel asks the host to read."""
    x, mask, number = args
    return filled(rw, node, args) if isinstance(number, Node) and not rw.lengths(x) and not rw.lengths(mask) else None


def filled(rw: Rewriter, node: Node, args: tuple[Any, ...]) -> Node:
    """``x.masked_fill(mask, number)`` as a choice between the two; the number is a symbol or a 0-d tensor."""
    x, mask, number = args
    value = x.meta["val"]
    number = on_device(rw, number, value.dtype, value.device) if is_symbol(number) else cast(rw, number, value.dtype)
    made = rw.call(aten.where.self, mask, number, x)
    if base_name(node.target)[1]:
        made = rw.call(aten.copy_.default, x, rw.keep(x, made))
    return rw.padded(made, rw.lengths(x))


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
    device = rw.home(value.device, *args)
    made = rw.iota(rw.bound(expression_of(value.shape[0])), device)
    if step != 1:
        made = rw.call(aten.mul.Tensor, made, step)
    first = on_device(rw, start, torch.int64, device) if is_symbol(start) else start
    if isinstance(first, Node) or first:
        made = rw.call(aten.add.Tensor, made, first)
    return rw.padded(cast(rw, made, value.dtype), rw.expected(node))


RULES: dict[Any, Rule] = {
    aten.floor_divide.default: pointwise,
    aten.floor_divide_.Tensor: pointwise,
    aten.pow.Tensor_Scalar: power,
    aten.pow_.Scalar: power,
    aten.lerp.Scalar: lerp,
    aten.lerp_.Scalar: lerp,
    aten.roll.default: roll,
    aten.fill_.Scalar: fill_,
    aten.full.default: full,
    aten.full_like.default: full_like,
    aten.scalar_tensor.default: scalar_tensor,
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill_.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
    aten.masked_fill_.Tensor: masked_fill,
    aten.where.ScalarSelf: where,
    aten.where.ScalarOther: where,
    aten.where.Scalar: where,
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp,
    aten.arange.default: arange,
    aten.arange.start: arange,
    aten.arange.start_step: arange,
}
