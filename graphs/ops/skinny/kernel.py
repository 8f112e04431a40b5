"""The Triton kernel of ``graphs::skinny_linear``: a few rows times up to three weights, in one launch.

A decode step is bound by reading weights, and a library's kernel for one small product is over before it reads at full
speed. Products with the same activation share a launch here, each block reading its own 16 rows of whichever weight is its.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphs.ops.wo_a.kernels.portable import INTERPRETED
from graphs.ops.wo_a.tiles import Tile

WEIGHTS = 3  # of one launch: queries, keys and values
WARPS = 4  # that share K


@triton.jit
def _columns(
    x, weight, y, tile, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """BLOCK_N columns of one product. K is split over the warps, which meet in the sum at the end and not before.

    The weight is the left operand, so that eight rows of ``x`` suffice for the right one.
    """
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    part = tl.arange(0, SPLIT)
    k = tl.arange(0, BLOCK_K)
    w_tile = weight + cols.to(tl.int64)[None, :, None] * K + part[:, None, None] * BLOCK_K + k[None, None, :]
    x_tile = x + rows[None, None, :] * K + part[:, None, None] * BLOCK_K + k[None, :, None]
    acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, SPLIT * BLOCK_K):
        w = tl.load(w_tile + start)
        v = tl.load(x_tile + start, mask=(rows < M)[None, None, :], other=0.0)
        if INTERPRETED:  # which cannot multiply bfloat16
            w = w.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(w, v, acc)
    out = y + rows[None, :].to(tl.int64) * N + cols[:, None]
    tl.store(out, tl.sum(acc, 0).to(y.dtype.element_ty), mask=(rows < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def skinny_linear_kernel(
    x, w0, w1, w2, y0, y1, y2, M, N0, N1, N2, K, SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[i] = x @ w[i].T`` for contiguous ``x [M, K]`` and ``w[i] [N, K]``. Grid: the sum of N / BLOCK_N."""
    tile = tl.program_id(0)
    if SINGLE or tile < N0 // BLOCK_N:
        _columns(x, w0, y0, tile, M, N0, K, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K)
    elif tile < (N0 + N1) // BLOCK_N:
        _columns(x, w1, y1, tile - N0 // BLOCK_N, M, N1, K, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K)
    else:
        _columns(x, w2, y2, tile - (N0 + N1) // BLOCK_N, M, N2, K, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K)


def launch_skinny(x: Tensor, weights: list[Tensor], ys: list[Tensor], tile: Tile, block_k: int) -> None:
    """One launch for one to three weights; see `graphs.ops.wo_a.tiles.skinny` for what has to divide what."""
    m, k = x.shape
    sizes = [*(weight.shape[0] for weight in weights), 0, 0][:WEIGHTS]
    ws, outs = ([*tensors, tensors[0], tensors[0]][:WEIGHTS] for tensors in (weights, ys))
    skinny_linear_kernel[(sum(sizes) // tile.block_n,)](
        x, *ws, *outs, m, *sizes, k, len(weights) == 1, tile.block_m, tile.block_n, tile.num_warps, block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
