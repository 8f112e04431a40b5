"""The Triton kernel of ``graphs::skinny_linear``: a few rows times up to three weights, with or without biases, in one launch.

A decode step is bound by reading weights, and a library's kernel for one small product is over before it reads at full
speed. Products with the same activation share a launch here, each block reading its own 16 rows of whichever weight is its.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from graphs.ops.wo_a.kernels.portable import INTERPRETED
from graphs.ops.wo_a.tiles import Tile

WEIGHTS = 3  # of one launch: queries, keys and values
WARPS = 4  # that share K


@triton.jit
def _columns(
    x, weight, bias, y, tile, M, N, K, TURNED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one product. K is split over the warps, which meet in the sum at the end and not before.

    The weight is the left operand, so that eight rows of ``x`` suffice for the right one. It lies as ``[N, K]``, or if it is
    turned as ``[K, N]``. With ``EVEN`` its columns are a multiple of BLOCK_N.
    """
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    part = tl.arange(0, SPLIT)
    k = tl.arange(0, BLOCK_K)
    features = part[:, None, None] * BLOCK_K + k[None, None, :]
    if TURNED:
        w_tile = weight + cols[None, :, None] + features.to(tl.int64) * N
    else:
        w_tile = weight + cols.to(tl.int64)[None, :, None] * K + features
    apart = N if TURNED else 1
    x_tile = x + rows[None, None, :] * K + part[:, None, None] * BLOCK_K + k[None, :, None]
    acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, SPLIT * BLOCK_K):
        if EVEN:
            w = tl.load(w_tile + start * apart)
        else:
            w = tl.load(w_tile + start * apart, mask=(cols < N)[None, :, None], other=0.0)
        v = tl.load(x_tile + start, mask=(rows < M)[None, None, :], other=0.0)
        if INTERPRETED:  # which cannot multiply bfloat16
            w = w.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(w, v, acc)
    total = tl.sum(acc, 0)
    if bias is not None:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    out = y + rows[None, :].to(tl.int64) * N + cols[:, None]
    tl.store(out, total.to(y.dtype.element_ty), mask=(rows < M)[None, :] & (cols < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def skinny_linear_kernel(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, M, N0, N1, N2, K,
    SINGLE: tl.constexpr, TURNED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[i] = x @ w[i].T + b[i]`` for contiguous ``x [M, K]`` and ``w[i] [N, K]`` or its transpose. Grid: all N / BLOCK_N."""
    tile = tl.program_id(0)
    first = tl.cdiv(N0, BLOCK_N)
    second = first + tl.cdiv(N1, BLOCK_N)
    if SINGLE or tile < first:
        _columns(x, w0, b0, y0, tile, M, N0, K, TURNED, EVEN, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K)
    elif tile < second:
        _columns(x, w1, b1, y1, tile - first, M, N1, K, TURNED, EVEN, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K)
    else:
        _columns(x, w2, b2, y2, tile - second, M, N2, K, TURNED, EVEN, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K)


def launch_skinny(
    x: Tensor,
    weights: list[Tensor],
    ys: list[Tensor],
    tile: Tile,
    block_k: int,
    biases: Sequence[Tensor | None] = (),
) -> None:
    """One launch for one to three weights ``[N, K]``, which lie all as ``[N, K]`` or all as ``[K, N]``.

    See `graphs.ops.wo_a.tiles.skinny` for what has to divide what.
    """
    m, k = x.shape
    sizes = [*(weight.shape[0] for weight in weights), 0, 0][:WEIGHTS]
    ws, outs = ([*tensors, tensors[0], tensors[0]][:WEIGHTS] for tensors in (weights, ys))
    added = [*biases, None, None, None][:WEIGHTS]
    even = all(size % tile.block_n == 0 for size in sizes)
    skinny_linear_kernel[(sum(triton.cdiv(size, tile.block_n) for size in sizes),)](
        x, *ws, *added, *outs, m, *sizes, k, len(weights) == 1, not weights[0].is_contiguous(), even,
        tile.block_m, tile.block_n, tile.num_warps, block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
