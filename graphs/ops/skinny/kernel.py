"""The Triton kernel of ``graphs::skinny_linear``: a few rows times up to three weights, with or without biases, in one launch.

A decode step is bound by reading weights, and a library's kernel for one small product is over before it reads at full
speed. Products with the same activation share a launch here, each block reading its own 16 rows of whichever weight is its.
The norm in front of the products and what is done with their results need no launches of their own either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphs.ops.skinny.around import Around
from graphs.ops.skinny.around_kernel import activated, factor, moments
from graphs.ops.wo_a.kernels.portable import INTERPRETED
from graphs.ops.wo_a.tiles import Tile

WEIGHTS = 3  # of one launch: queries, keys and values
WARPS = 4  # that share K


@triton.jit
def _columns(
    x, weight, bias, y, tile, M, N, K, TURNED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
    gate, gate_bias, gain, shift, eps, residual, NORM: tl.constexpr, ONE_PASS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one product. K is split over the warps, which meet in the sum at the end and not before.

    The weight is the left operand, so that eight rows of ``x`` suffice for the right one. It lies as ``[N, K]``, or if it is
    turned as ``[K, N]``. With ``EVEN`` its columns are a multiple of BLOCK_N. With ``gate``, which lies as the weight does, the
    result is the activation of the product times the same columns of the product with ``gate``. The root mean square of a row is
    a factor on its sums: with ``ONE_PASS`` nothing waits for it.
    """
    dtype = x.dtype.element_ty
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    part = tl.arange(0, SPLIT)
    k = tl.arange(0, BLOCK_K)
    features = part[:, None, None] * BLOCK_K + k[None, None, :]
    offsets = cols[None, :, None] + features.to(tl.int64) * N if TURNED else cols.to(tl.int64)[None, :, None] * K + features
    w_tile = weight + offsets
    apart = tl.cast(N, tl.int64) if TURNED else 1  # of features, which may be more than 2**31 elements away
    live = (rows < M)[None, None, :]
    inside = (cols < N)[None, :, None]
    x_place = part[:, None, None] * BLOCK_K + k[None, :, None]
    x_tile = x + rows[None, None, :] * K + x_place
    if NORM != "none" and not ONE_PASS:
        mean, scale = moments(x, M, K, eps, NORM == "layer", BLOCK_M, SPLIT * BLOCK_K)
    if ONE_PASS:
        squares = tl.zeros((SPLIT, BLOCK_K, BLOCK_M), tl.float32)
    acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    if gate is not None:
        gate_tile = gate + offsets
        gate_acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, SPLIT * BLOCK_K):
        w = _weights(w_tile + start * apart, inside, EVEN)
        v = tl.load(x_tile + start, mask=live, other=0.0)
        if NORM != "none":
            wide = v.to(tl.float32)
            if ONE_PASS:
                squares += wide * wide
            else:
                wide = (wide - mean[None, None, :]) * scale[None, None, :]
            wide *= tl.load(gain + x_place + start).to(tl.float32)
            if shift is not None:
                wide += tl.load(shift + x_place + start).to(tl.float32)
            v = wide.to(dtype)
        if INTERPRETED:
            v = v.to(tl.float32)
        acc = tl.dot(w, v, acc)
        if gate is not None:
            gate_acc = tl.dot(_weights(gate_tile + start * apart, inside, EVEN), v, gate_acc)
    root = tl.zeros((BLOCK_M,), tl.float32)
    if ONE_PASS:
        root = factor(tl.sum(tl.sum(squares, 1), 0), K, eps)
    total = _summed(acc, root, bias, cols, N, ONE_PASS)
    if ACTIVATION != "none":
        total = activated(total.to(dtype).to(tl.float32), ACTIVATION)
    if gate is not None:
        total = total.to(dtype).to(tl.float32) * _summed(gate_acc, root, gate_bias, cols, N, ONE_PASS).to(dtype).to(tl.float32)
    place = rows[None, :].to(tl.int64) * N + cols[:, None]
    there = (rows < M)[None, :] & (cols < N)[:, None]
    if residual is not None:
        total = total.to(dtype).to(tl.float32) + tl.load(residual + place, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _weights(place, inside, EVEN: tl.constexpr):
    w = tl.load(place) if EVEN else tl.load(place, mask=inside, other=0.0)
    if INTERPRETED:  # which cannot multiply bfloat16
        w = w.to(tl.float32)
    return w


@triton.jit
def _summed(acc, root, bias, cols, N, ONE_PASS: tl.constexpr):
    """The sums of the warps, with a row's factor and a column's bias."""
    total = tl.sum(acc, 0)
    if ONE_PASS:
        total *= root[None, :]
    if bias is not None:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["M", "eps"])
def skinny_linear_kernel(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, gain, shift, residual, M, N0, N1, N2, K, eps,
    SINGLE: tl.constexpr, TURNED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, ONE_PASS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """``y[i] = x @ w[i].T + b[i]`` for contiguous ``x [M, K]`` and ``w[i] [N, K]`` or its transpose. Grid: all N / BLOCK_N.

    ``x`` is normed first where NORM says so. With GATED the grid is that of the first weight, and there is one result.
    """
    tile = tl.program_id(0)
    first = tl.cdiv(N0, BLOCK_N)
    second = first + tl.cdiv(N1, BLOCK_N)
    if GATED:
        _columns(
            x, w0, b0, y0, tile, M, N0, K, TURNED, EVEN, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K,
            w1, b1, gain, shift, eps, residual, NORM, ONE_PASS, ACTIVATION,
        )  # fmt: skip
    elif SINGLE or tile < first:
        _columns(
            x, w0, b0, y0, tile, M, N0, K, TURNED, EVEN, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K,
            None, None, gain, shift, eps, residual, NORM, ONE_PASS, ACTIVATION,
        )  # fmt: skip
    elif tile < second:
        _columns(
            x, w1, b1, y1, tile - first, M, N1, K, TURNED, EVEN, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K,
            None, None, gain, shift, eps, None, NORM, ONE_PASS, "none",
        )  # fmt: skip
    else:
        _columns(
            x, w2, b2, y2, tile - second, M, N2, K, TURNED, EVEN, BLOCK_M, BLOCK_N, SPLIT, BLOCK_K,
            None, None, gain, shift, eps, None, NORM, ONE_PASS, "none",
        )  # fmt: skip


def launch_skinny(
    x: Tensor,
    weights: list[Tensor],
    ys: list[Tensor],
    tile: Tile,
    block_k: int,
    biases: Sequence[Tensor | None] = (),
    around: Around = Around(),  # noqa: B008 (immutable)
    *,
    turned: bool,
) -> None:
    """One launch for one to three weights ``[N, K]``, which lie all as ``[N, K]``, or if they are turned as ``[K, N]``.

    Two weights with one result are a product and what it is multiplied with. See `graphs.ops.wo_a.tiles.skinny` for what has to
    divide what.
    """
    m, k = x.shape
    gated = len(weights) > len(ys)
    sizes = [*(weight.shape[0] for weight in weights), 0, 0][:WEIGHTS]
    ws, outs = ([*tensors, tensors[0], tensors[0]][:WEIGHTS] for tensors in (weights, ys))
    added = [*biases, None, None, None][:WEIGHTS]
    even = all(size % tile.block_n == 0 for size in sizes)
    columns = sizes[:1] if gated else sizes
    one_pass = around.norm == "rms" and x.dtype is torch.bfloat16  # whose range holds what was not divided yet
    skinny_linear_kernel[(sum(triton.cdiv(size, tile.block_n) for size in columns),)](
        x, *ws, *added, *outs, around.gain, around.shift, around.residual, m, *sizes, k, around.eps,
        len(weights) == 1, turned, even, tile.block_m, tile.block_n, tile.num_warps, block_k,
        around.norm, one_pass, around.activation, gated,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
