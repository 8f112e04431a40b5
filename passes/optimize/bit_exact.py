"""Which operators give the same bits however they are compiled.

Arithmetic on whole numbers of 32 and 64 bits (a byte wraps in memory and not in a register), comparisons of what has one dtype
(a number beside a bfloat16 tensor is rounded to it, in a register it is not), choices, moves of values, and conversions that
lose nothing. A compiler keeps what it computes in float32 registers and contracts a product and a sum, so that of what rounds
only one sum or product at a time is the same, with nothing behind it that computes: choices of it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.core.schema import returns_view
from passes.core.symbols import has_static_shape

aten = torch.ops.aten
Tensor = torch.Tensor
LARGEST = 1 << 18
"""Elements above which an operator is worth a launch of its own."""
_WHOLE = (torch.int32, torch.int64)
_ARITHMETIC = frozenset(
    overload
    for packet in (
        *(aten.add, aten.sub, aten.mul, aten.neg, aten.abs, aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum),
        *(aten.maximum, aten.remainder, aten.floor_divide, aten.scatter_add, aten.sum, aten.amax, aten.amin),
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)  # fmt: skip
_CONDITIONS = frozenset(
    overload
    for packet in (
        *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge),
        *(aten.logical_and, aten.logical_or, aten.logical_not, aten.logical_xor, aten.any, aten.all),
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)
_MOVES = frozenset(
    (
        *(aten.where.self, aten.masked_fill.Scalar, aten.index.Tensor, aten.index_select.default, aten.gather.default),
        *(aten.full.default, aten.scalar_tensor.default, aten.clone.default),
    )
)
_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.bool: (*_WHOLE, torch.float32, torch.float64),
    torch.int32: (*_WHOLE, torch.bool, torch.float64),
    torch.int64: (*_WHOLE, torch.bool),
}
"""Conversions that lose nothing, or bits of whole numbers alone."""
_ROUNDING = frozenset((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor))
_CHOICES = frozenset((aten.where.self, aten.masked_fill.Scalar))
_SUMS = frozenset((aten.sum.default, aten.sum.dim_IntList))


def exact_operators(module: GraphModule, pure: set[Node], values: dict[Node, Any]) -> set[Node]:
    """Those of ``pure`` that may be compiled together, whatever is beside them.

    Args:
        pure: operators that depend on their arguments alone.
        values: what each node gives, without data.
    """
    found: set[Node] = set()
    rounded: set[Node] = set()
    for node in module.graph.nodes:
        reads_rounded = not rounded.isdisjoint(node.all_input_nodes)
        if returns_view(node.target):
            rounded |= {node} if reads_rounded else set()
        elif node in pure and node.target in _ROUNDING and not reads_rounded and _is_plain(node, values):
            rounded.add(node)
            found.add(node)
        elif node in pure and is_exact(node, values) and not (reads_rounded and node.target not in _CHOICES):
            rounded |= {node} if reads_rounded else set()
            found.add(node)
    return found


def _is_plain(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a small sum or product is one of two tensors of the dtype of the result, which is floating."""
    made, read = values[node], [values[one] for one in node.args if isinstance(one, Node)]
    if len(read) != 2 or node.kwargs or not _is_small(made, read):
        return False
    return made.dtype.is_floating_point and all(value.dtype == made.dtype for value in read)


def _is_small(made: Any, read: Sequence[Any]) -> bool:
    """Whether a result is one small tensor of static shape, on the device of all that it is made from."""
    if not has_static_shape(made) or made.numel() > LARGEST:
        return False
    return all(isinstance(value, Tensor) and value.device == made.device for value in read)


def is_exact(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a small operator gives the same bits however it is compiled."""
    made, read = values[node], [values[one] for one in node.all_input_nodes]
    if not _is_small(made, read):
        return False
    dtypes = {value.dtype for value in read}
    numbers = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, (float, complex))]
    if node.target in _ARITHMETIC:
        flags = dtypes == {torch.bool} and node.target in _SUMS
        return made.dtype in _WHOLE and (flags or dtypes <= set(_WHOLE)) and not numbers
    if node.target in _CONDITIONS:
        whole = dtypes <= {*_WHOLE, torch.bool} and not numbers
        return made.dtype == torch.bool and (whole or (len(dtypes) == 1 and len(read) == 2))
    if node.target is aten._to_copy.default:
        (source,) = dtypes
        return set(node.kwargs) == {"dtype"} and made.dtype in _WIDER.get(source, ())
    if node.target not in _MOVES:
        return False
    if node.target is aten.where.self:
        read = [values[one] for one in node.args[1:]]  # type: ignore[index]
        return all(value.dtype == made.dtype for value in read)
    return all(value.dtype in (torch.bool, *_WHOLE, made.dtype) for value in read)
