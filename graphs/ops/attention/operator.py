"""The operator ``graphs::one_query_attention``: attention of one query over keys that several heads may share.

``query [B, H, 1, D]``, ``key`` and ``value [B, G, S, D]`` of one 16-bit float dtype with any strides, G a divisor of H, D a power
of two from 16 to 256. ``mask`` broadcasts to ``[B, H, 1, S]``: a bias of floating point, or boolean, 0 where it is True and
``-inf`` elsewhere, or None. The result ``[B, H, 1, D]`` is ``softmax(query @ key.T * scale + mask) @ value``: scores and sums in
float32, weights as two numbers of 16 bits, the result rounded once; 0 where the mask hides everything. Keys and values of a part
of the cache that the mask hides from all heads are not read. Nothing writes this operator by hand: `passes.one_query_attention`
puts it into compiled steps.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from graphs.errors import WeightError
from graphs.ops.wo_a.operators import kernels, library

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (16, 32, 64, 128, 256)
HEADS = 16  # that share keys, at most

library.define(
    "one_query_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def fits(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
    """Whether the kernel takes tensors of these shapes, ``[B, H, 1, D]`` and ``[B, G, S, D]``."""
    heads, groups = query[1], key[1]
    some = heads > 0 and groups > 0 and key[2] > 0
    return some and query[2] == 1 and query[3] in WIDTHS and heads % groups == 0 and heads // groups <= HEADS


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Raise WeightError unless the operands fit together. Reads metadata only."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise WeightError(f"one_query_attention: {shapes}; legal are [B, H, 1, D] and twice [B, G, S, D]")
    batch, heads, rows, width = query.shape
    if rows != 1 or key.shape[0] != batch or key.shape[3] != width or not key.shape[1] or heads % key.shape[1]:
        raise WeightError(f"one_query_attention: {shapes}; legal are [B, H, 1, D] and twice [B, G, S, D], G a divisor of H")
    if mask is not None:
        wanted = (batch, heads, 1, key.shape[2])
        broadcasts = mask.dim() == 4 and all(one in (1, other) for one, other in zip(mask.shape, wanted, strict=True))
        if not broadcasts or not (mask.is_floating_point() or mask.dtype is torch.bool):
            legal = f"legal is a bias or a boolean mask that fits {wanted}"
            raise WeightError(f"one_query_attention: mask {tuple(mask.shape)} {mask.dtype}; {legal}")
    if any(tensor.dtype != query.dtype or tensor.device != query.device for tensor in (key, value)):
        raise WeightError(f"one_query_attention: key and value must be {query.dtype} on {query.device}, as query is")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What the operator means; its implementation on a CPU."""
    check(query, key, value, mask)
    with torch.autocast(query.device.type, enabled=False):
        return _attended(query, key, value, mask, scale)


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    (batch, heads, _, width), (groups, length) = query.shape, key.shape[1:3]
    if not length:
        return query.new_zeros(query.shape)
    stacked = query.reshape(batch, groups, heads // groups, width).float()
    scores = torch.matmul(stacked, key.float().transpose(2, 3)) * scale
    if mask is not None:
        if mask.dtype is torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf)
        scores = scores + mask.float().expand(batch, heads, 1, length).reshape(scores.shape)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    shares = torch.exp(scores - largest)
    total = shares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    result = torch.matmul(shares / total, value.float())
    return result.reshape(batch, heads, 1, width).to(query.dtype)


def _cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check(query, key, value, mask)
    if query.dtype not in DTYPES or not fits(tuple(query.shape), tuple(key.shape)):
        return attend(query, key, value, mask, scale)
    result = query.new_empty(query.shape)
    if result.numel():
        with torch.cuda.device(query.device):
            attention_kernel().launch_attention(query, key, value, mask, scale, result)
    return result


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check(query, key, value, mask)
    return query.new_empty(query.shape)


library.impl("one_query_attention", attend, "CPU")
library.impl("one_query_attention", _cuda, "CUDA")
torch.library.register_fake("graphs::one_query_attention", _fake, lib=library)


@functools.cache
def attention_kernel() -> ModuleType:
    """The Triton kernels, imported at first use. Raises MissingDependency where triton is absent."""
    kernels()
    from graphs.ops.attention import kernel as module

    return module
