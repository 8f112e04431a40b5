"""The Triton kernel for few tokens: K split over the warps of a block, for ``fused`` and ``bmm`` with all their options.

A step of the kernels in `portable` is a chain (wait, barrier, load, widen, multiply, scale, barrier) of 128
features, which with one warp per scheduler takes its latency 32 times at K = 4096. Here a step is a chain of 512 features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphs.ops.wo_a.kernels.portable import GROUP, HEAD, OPERAND, ROTATED, _begin, _quantise, programmatic
from graphs.ops.wo_a.reference import FP8_MAX
from graphs.ops.wo_a.tiles import Tile


@triton.jit
def _turn_back_split(x, cos, sin):
    """As :func:`_turn_back` for ``x [SPLIT, 128, BLOCK_M]``: real and imaginary parts alternate along the features."""
    SPLIT: tl.constexpr = x.shape[0]
    BLOCK_M: tl.constexpr = x.shape[2]
    pairs = tl.permute(tl.reshape(x.to(tl.float32), (SPLIT, GROUP // 2, 2, BLOCK_M)), (0, 1, 3, 2))
    real, imaginary = tl.split(pairs)
    out = tl.join(real * cos + imaginary * sin, imaginary * cos - real * sin)
    return tl.reshape(tl.permute(out, (0, 1, 3, 2)), (SPLIT, GROUP, BLOCK_M))


@triton.jit(do_not_specialize=["M"])
def wo_a_split_kernel(
    o, weight, scale, y, positions, table, M, N, K, stride_om, stride_og, stride_ok,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SINGLE: tl.constexpr, FP8_LIMIT: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As ``fused`` (or, SINGLE, ``bmm``) for few tokens: SPLIT blocks of 128 features per step, one per warp. Grid (N tiles, G).

    No warp waits for another's product before the sum at the end. The weight is the left operand, so that eight tokens fill the
    right one; scales are requested a step ahead. K is a multiple of 128 * SPLIT, M at most BLOCK_M, SPLIT a multiple of 4.
    """
    g = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _begin(weight + g * N * K + cols * K, AHEAD, OVERLAP)
    rows = tl.arange(0, BLOCK_M)
    part = tl.arange(0, SPLIT)
    k = tl.arange(0, GROUP)
    feature = part[:, None, None] * GROUP + k[None, :, None]
    o_tile = o + g * stride_og + rows[None, None, :] * stride_om + feature * stride_ok
    w_tile = weight + g * N * K + part[:, None, None] * GROUP + cols[None, :, None] * K + k[None, None, :]
    live = (rows < M)[None, None, :]
    if positions is not None:  # the same angles at every step, which is one head or several
        pair = (part[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]) % (HEAD // 2) - (HEAD - ROTATED) // 2
        turned = (pair >= 0)[:, :, None] & live
        place = tl.load(positions + rows, mask=rows < M, other=0).to(tl.int64) * ROTATED
        angle = table + place[None, None, :] + pair[:, :, None]
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + ROTATED // 2, mask=turned, other=0.0)
    steps = K // (GROUP * SPLIT)
    s_tile = scale + (g * (N // GROUP) + tl.program_id(0) * BLOCK_N // GROUP) * (K // GROUP) + part
    following = tl.full((SPLIT,), 1.0, tl.float32) if SINGLE else tl.load(s_tile)
    acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        s = following
        if not SINGLE:
            following = tl.load(s_tile + tl.minimum(step + 1, steps - 1) * SPLIT)
        w = tl.load(w_tile + step * (GROUP * SPLIT))
        x = tl.load(o_tile + step * (GROUP * SPLIT) * stride_ok, mask=live, other=0.0)
        if positions is not None:
            x = _turn_back_split(x, cos, sin).to(OPERAND)
        if FP8_LIMIT > 0:
            q, x_scale = _quantise(x.to(tl.float32), 1, FP8_LIMIT, weight.dtype.element_ty)
            acc += tl.dot(w, q) * (x_scale * s[:, None])[:, None, :]
        else:
            acc += tl.dot(w.to(tl.float32).to(OPERAND), x.to(OPERAND)) * s[:, None, None]
    out = y + (rows[None, :] * tl.num_programs(1) + g) * N + cols[:, None]
    total = tl.sum(acc, 0)
    if SINGLE:
        total *= tl.load(scale)
    tl.store(out, total.to(y.dtype.element_ty), mask=(rows < M)[None, :])


def launch_split(
    o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, tile: Tile, fp8: bool = False,
    positions: Tensor | None = None, table: Tensor | None = None, overlap: bool = False,
) -> None:  # fmt: skip
    """One launch, operands as :func:`graphs.ops.wo_a.kernels.portable.launch_fused`; with a ``scale [1]`` as ``launch_bmm``.

    For at most ``tile.block_m`` tokens; ``tile.num_warps`` warps share K, which is a multiple of 128 times their number.
    """
    m, g, k = o.shape
    n, split = weight.shape[1], tile.num_warps
    wo_a_split_kernel[(n // tile.block_n, g)](
        o, weight, scale, y, positions, table, m, n, k, *o.stride(), tile.block_m, tile.block_n, split, scale.dim() == 1,
        FP8_MAX[weight.dtype] if fp8 else 0.0, min(k, GROUP.value * split * tile.num_stages), overlap,
        num_warps=split, num_stages=tile.num_stages, enable_fp_fusion=True, **programmatic(overlap),
    )  # fmt: skip
