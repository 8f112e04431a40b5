"""The grouped output projection in plain torch: the definitions every kernel is held to.

``y[m, g, n] = sum_k o[m, g, k] * w[g, n, k]`` with ``o [M, G, K]``, ``w [G, N, K]``, ``y [M, G, N]``. FP8 weights carry one
float32 scale per 128x128 block, ``s [G, N/128, K/128]``, and stand for ``q * s``. Nothing here is fast; all of it runs on any
device and is short enough to be checked by eye.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # features per activation group, and both sides of a weight block
AMAX_FLOOR = 1e-10  # keeps the scale of an all-zero group finite and positive
WEIGHT_AMAX_FLOOR = 2.0**-100  # the same for a whole weight: amax/448 and 448/amax both stay normal in float32
HEAD = 512  # features of one attention head, of which the last ROTATED carry rotary position
ROTATED = 64
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}  # largest finite value of each format


def round_fp8(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Round to nearest even in ``dtype`` and saturate: finite values beyond the range become the largest one, NaN stays."""
    limit = FP8_MAX[dtype]
    return x.float().clamp(-limit, limit).to(dtype)


def expand_blocks(scale: Tensor) -> Tensor:
    """Repeat each scale over its 128x128 block: ``[..., N/128, K/128] -> [..., N, K]``."""
    return scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)


def dequantise_blocks(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``w = q * s[n // 128, k // 128]`` computed in ``dtype`` (float32 or float64). ``data [..., N, K]``, FP8."""
    return data.to(dtype) * expand_blocks(scale.to(dtype))


def quantise_blocks(w: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Quantise ``w [..., N, K]`` with one float32 scale ``amax/limit`` per 128x128 block. Returns (FP8 data, scale)."""
    *lead, n, k = w.shape
    blocks = w.float().reshape(*lead, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(-3, -1)).clamp_min(WEIGHT_AMAX_FLOOR) / FP8_MAX[dtype]
    return round_fp8(w.float() / expand_blocks(scale), dtype), scale


def quantise_single(w: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Quantise a whole tensor with one scale ``s = limit/amax(|w|)``. Returns (FP8 data, float32 ``[1]`` holding ``1/s``)."""
    amax = w.abs().amax().float().clamp_min(WEIGHT_AMAX_FLOOR)
    scale = FP8_MAX[dtype] / amax
    return round_fp8(w.float() * scale, dtype), (1.0 / scale).reshape(1)


def quantise_activations(o: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Quantise per token and per 128 features: ``s = max(amax|x|, 1e-10)/limit``, ``q = round(x/s)``, saturating.

    ``o [M, G, K]`` gives FP8 ``[M, G, K]`` and float32 ``[M, G, K/128]``. A group that holds NaN or Inf holds NaN afterwards,
    so no such input can turn into a finite result.
    """
    groups = o.float().unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1).clamp_min(AMAX_FLOOR) / FP8_MAX[dtype]
    return round_fp8(groups / scale.unsqueeze(-1), dtype).flatten(-2), scale


def inverse_rotary(o: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Undo the rotary embedding of the last 64 features of every head of 512; the result has ``o``'s dtype.

    ``o [M, G, K]``, ``positions [M]`` integers, ``table [P, 64]`` float32: 32 cosines, then 32 sines, per position. Features
    ``2i`` and ``2i + 1`` of the rotated part are the real and the imaginary part of one number, which was turned by angle ``i``.
    """
    heads = o.float().unflatten(-1, (-1, HEAD))
    cos, sin = (t[:, None, None] for t in table[positions.long()].float().split(ROTATED // 2, -1))
    real, imaginary = heads[..., -ROTATED::2], heads[..., -ROTATED + 1 :: 2]
    turned = torch.stack((real * cos + imaginary * sin, imaginary * cos - real * sin), -1).flatten(-2)
    return torch.cat((heads[..., :-ROTATED], turned), -1).flatten(-2).to(o.dtype)


def project(o: Tensor, w: Tensor) -> Tensor:
    """The projection in float32 for ``o [M, G, K]`` and ``w [G, N, K]`` of any float dtype; the result has ``o``'s dtype."""
    return torch.einsum("mgk,gnk->mgn", o.float(), w.float()).to(o.dtype)


def project_fp64(o: Tensor, w: Tensor) -> Tensor:
    """The projection in float64: what every path is measured against."""
    return torch.einsum("mgk,gnk->mgn", o.double(), w.double())


def project_quantised(o: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """FP8 weight times activations quantised per token and per 128 features, float32 accumulation.

    ``scale`` is ``[1]`` (the whole weight, path ``bmm``) or ``[G, N/128, K/128]`` (path ``gloop``). Each 128-wide partial
    product is scaled before it is added. The result ``[M, G, N]`` has ``o``'s dtype.
    """
    q, s = quantise_activations(o, data.dtype)
    blocks = scale.reshape(1, 1, 1) if scale.numel() == 1 and scale.dim() < 3 else scale
    blocks = blocks.expand(data.shape[0], data.shape[1] // BLOCK, data.shape[2] // BLOCK)
    y = torch.zeros(o.shape[0], o.shape[1], data.shape[1], dtype=torch.float32, device=o.device)
    for b in range(data.shape[2] // BLOCK):
        part = slice(b * BLOCK, (b + 1) * BLOCK)
        partial = torch.einsum("mgk,gnk->mgn", q[..., part].float(), data[..., part].float())
        y = y + partial * s[..., b, None] * blocks[..., b].repeat_interleave(BLOCK, -1)
    return y.to(o.dtype)


def project_blocks(o: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """FP8 weight with block scales times unquantised activations (path ``fused``): float32, result in ``o``'s dtype."""
    return project(o, dequantise_blocks(data, scale))


def relative_error(y: Tensor, exact: Tensor) -> float:
    """``|y - exact| / |exact|`` in the Frobenius norm, computed in float64."""
    exact = exact.double()
    return float((y.double() - exact).norm() / exact.norm())
