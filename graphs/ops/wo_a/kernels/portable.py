"""Triton kernels of the quantised paths, portable and for any number of tokens (:mod:`graphs.ops.wo_a.kernels.split_k`: for few).

All shapes are those of `operators`; ``o`` may have any strides, weights, scales and results are contiguous. Sums are
kept in float32 and every 128-wide partial product is scaled before it is added. Rows beyond M are masked, so M is free; K and N
are multiples of 128.

NaN and Inf in ``o`` make every result of their token and group non-finite. A NaN goes through the scale, because a conversion to
FP8 may clamp it to a number; an Inf makes its group's scale infinite, which turns it into NaN.

Triton's interpreter converts to FP8 without rounding to nearest and cannot multiply bfloat16 matrices. Under it (and only then)
values are rounded before the conversion and ``tl.dot`` gets float32 operands, so the checks there are as tight as on a device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphs.ops.wo_a.reference import FP8_MAX
from graphs.ops.wo_a.reference import HEAD as HEAD_FEATURES
from graphs.ops.wo_a.reference import ROTATED as ROTATED_FEATURES
from graphs.ops.wo_a.tiles import Tile, quantise_rows

GROUP = tl.constexpr(128)
HEAD = tl.constexpr(HEAD_FEATURES)
ROTATED = tl.constexpr(ROTATED_FEATURES)
AMAX_FLOOR = tl.constexpr(1e-10)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)  # what the fused kernel multiplies


@triton.jit
def _max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round_e4m3(x):
    """Nearest e4m3 value, ties to even, as float32: adding 1.5 * 2**23 quanta leaves no bits below the quantum."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    quantum = tl.maximum(exponent - 3, 127 - 9)  # 2**-9 is the smallest e4m3fn subnormal; e4m3fnuz is finer by one, unused here
    magic = ((quantum + 23) << 23).to(tl.float32, bitcast=True) * 1.5
    return (x + magic) - magic


@triton.jit
def _quantise(x, AXIS: tl.constexpr, FP8_LIMIT: tl.constexpr, FP8: tl.constexpr):
    """Groups of 128 along AXIS of ``x`` (float32) as FP8 and their scales. ``|x| <= amax``, so the cast has nothing to saturate.

    One reciprocal per group: a division per element is three multiplications, a fifth of the instructions of the ``bmm`` kernel.
    """
    # the interpreter runs _max_nan element by element, and its own maximum skips NaN
    largest = tl.max(tl.abs(x), AXIS) + tl.sum(x, AXIS) * 0.0 if INTERPRETED else tl.reduce(tl.abs(x), AXIS, _max_nan)
    scale = tl.maximum(largest, AMAX_FLOOR, propagate_nan=tl.PropagateNan.ALL) / FP8_LIMIT
    q = _round_e4m3(x / tl.expand_dims(scale, AXIS)) if INTERPRETED else x * tl.expand_dims(1.0 / scale, AXIS)
    return q.to(FP8), scale


@triton.jit
def _begin(rows, BYTES: tl.constexpr, OVERLAP: tl.constexpr):
    """With OVERLAP this kernel was started before the one in front of it had ended (programmatic dependent launch).

    It asks for the first BYTES of its rows of the weight, lets the next kernel start likewise, and waits. What it asks for goes
    into L2 and is read only after the wait, so this is right even if the kernel in front writes the weight.
    """
    if OVERLAP:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
            [rows.to(tl.int64), tl.full(rows.shape, BYTES, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def wo_a_bmm_kernel(
    o, weight, scale, y, M, N, K, stride_om, stride_og, stride_ok,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """One scale for the whole weight; activations are quantised as they are read. Grid (N tiles, M tiles, G)."""
    g = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, GROUP)
    o_tile = o + g * stride_og + rows.to(tl.int64)[:, None] * stride_om + k[None, :] * stride_ok
    w_tile = weight + g * N * K + cols[None, :] * K + k[:, None]
    live = (rows < M)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, GROUP):
        w = tl.load(w_tile + start)
        x = tl.load(o_tile + start * stride_ok, mask=live, other=0.0).to(tl.float32)
        q, s = _quantise(x, 1, FP8_LIMIT, weight.dtype.element_ty)
        acc += tl.dot(q, w) * s[:, None]
    acc *= tl.load(scale)
    out = y + (rows.to(tl.int64)[:, None] * tl.num_programs(2) + g) * N + cols[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=live)


@triton.jit
def wo_a_quantise_kernel(o, q, scale, M, K, stride_om, stride_og, stride_ok, ROWS: tl.constexpr, FP8_LIMIT: tl.constexpr):
    """Activations to FP8 ``[G, M, K]`` and scales ``[G, M, K/128]``. Grid (M, G, K/128/ROWS); ROWS groups per program."""
    m = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    groups = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    k = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = groups < K // GROUP
    x = tl.load(o + m * stride_om + g * stride_og + k * stride_ok, mask=live[:, None], other=0.0).to(tl.float32)
    values, s = _quantise(x, 1, FP8_LIMIT, q.dtype.element_ty)
    row = g * M + m
    tl.store(q + row * K + k, values, mask=live[:, None])
    tl.store(scale + row * (K // GROUP) + groups, s, mask=live)


@triton.jit(do_not_specialize=["g"])
def wo_a_block_gemm_kernel(
    q, q_scale, weight, scale, y, g, G, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Group ``g``: quantised activations times a weight with 128x128 block scales. Grid (N tiles, M tiles).

    BLOCK_N divides 128, so a program sees one weight scale per 128 features. With OVERLAP the groups run at the same time: the
    first waits for the quantisation and only then lets the second start, which so need not wait for it; every later one lets
    its follower start at once. Each waits for the one in front before it ends, so whoever waits for the last waits for all.
    """
    if OVERLAP:
        if g == 0:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group = g.to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, GROUP)
    row = group * M + rows
    q_tile = q + row[:, None] * K + k[None, :]
    s_tile = q_scale + row * (K // GROUP)
    w_tile = weight + group * N * K + cols[None, :] * K + k[:, None]
    w_scale = scale + (group * (N // GROUP) + tl.program_id(0) * BLOCK_N // GROUP) * (K // GROUP)
    live = rows < M
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(K // GROUP):
        w = tl.load(w_tile + block * GROUP)
        x = tl.load(q_tile + block * GROUP, mask=live[:, None], other=0.0)
        s = tl.load(s_tile + block, mask=live, other=0.0) * tl.load(w_scale + block)
        acc += tl.dot(x, w) * s[:, None]
    out = y + (rows.to(tl.int64)[:, None] * G + group) * N + cols[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=live[:, None])
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _turn_back(x, table_rows, live, BLOCK_M: tl.constexpr):
    """Inverse rotary embedding of the last 128 features of a head; see :func:`graphs.ops.wo_a.reference.inverse_rotary`."""
    pair = tl.arange(0, GROUP // 2)
    turned = live & (pair >= (GROUP - ROTATED) // 2)[None, :]
    angle = table_rows[:, None] + (pair % (ROTATED // 2))[None, :]
    cos = tl.load(angle, mask=turned, other=1.0)
    sin = tl.load(angle + ROTATED // 2, mask=turned, other=0.0)
    real, imaginary = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_M, GROUP // 2, 2)))
    out = tl.join(real * cos + imaginary * sin, imaginary * cos - real * sin)
    return tl.reshape(out, (BLOCK_M, GROUP))


@triton.jit
def wo_a_fused_kernel(
    o, weight, scale, y, positions, table, M, N, K, stride_om, stride_og, stride_ok,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8_LIMIT: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """FP8 weight widened to bfloat16 (exact) times bfloat16 activations, block scales on the partial sums. Grid as ``bmm``.

    The weight goes by way of float32: the direct conversion is a quarter-rate instruction on sm_90. With a positive FP8_LIMIT the
    activations are quantised instead, as in ``bmm``. With ``positions`` their rotary embedding is undone as they are read.
    :func:`_begin` asks for AHEAD features of the weight.
    """
    g = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _begin(weight + g * N * K + cols * K, AHEAD, OVERLAP)
    k = tl.arange(0, GROUP)
    o_tile = o + g * stride_og + rows.to(tl.int64)[:, None] * stride_om + k[None, :] * stride_ok
    w_tile = weight + g * N * K + cols[None, :] * K + k[:, None]
    w_scale = scale + (g * (N // GROUP) + tl.program_id(0) * BLOCK_N // GROUP) * (K // GROUP)
    live = (rows < M)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if positions is not None:
        table_rows = table + tl.load(positions + rows, mask=rows < M, other=0).to(tl.int64) * ROTATED
    for block in range(K // GROUP):
        w = tl.load(w_tile + block * GROUP)
        x = tl.load(o_tile + block * GROUP * stride_ok, mask=live, other=0.0)
        if positions is not None:  # noqa: SIM102 (this one is decided at compile time)
            if (GROUP * (block + 1)) % HEAD == 0:
                x = _turn_back(x, table_rows, live, BLOCK_M).to(OPERAND)
        if FP8_LIMIT > 0:
            q, s = _quantise(x.to(tl.float32), 1, FP8_LIMIT, weight.dtype.element_ty)
            acc += tl.dot(q, w) * (s * tl.load(w_scale + block))[:, None]
        else:
            acc += tl.dot(x.to(OPERAND), w.to(tl.float32).to(OPERAND)) * tl.load(w_scale + block)
    out = y + (rows.to(tl.int64)[:, None] * tl.num_programs(2) + g) * N + cols[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=live)


def launch_bmm(o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, tile: Tile) -> None:
    """One launch. ``o [M, G, K]``, ``weight [G, N, K]`` FP8, ``scale [1]`` float32, ``y [M, G, N]`` written."""
    m, g, k = o.shape
    n = weight.shape[1]
    wo_a_bmm_kernel[(n // tile.block_n, triton.cdiv(m, tile.block_m), g)](
        o, weight, scale, y, m, n, k, *o.stride(), tile.block_m, tile.block_n, FP8_MAX[weight.dtype],
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def launch_fused(
    o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, tile: Tile, fp8: bool = False,
    positions: Tensor | None = None, table: Tensor | None = None, overlap: bool = False,
) -> None:  # fmt: skip
    """One launch. ``scale [G, N/128, K/128]`` float32, the rest as :func:`launch_bmm`.

    ``fp8`` quantises the activations; ``positions [M]`` and ``table [P, 64]`` undo their rotary embedding. ``overlap``: as
    :func:`_begin` says.
    """
    m, g, k = o.shape
    n = weight.shape[1]
    wo_a_fused_kernel[(n // tile.block_n, triton.cdiv(m, tile.block_m), g)](
        o, weight, scale, y, positions, table, m, n, k, *o.stride(), tile.block_m, tile.block_n,
        FP8_MAX[weight.dtype] if fp8 else 0.0, min(k, GROUP.value * tile.num_stages), overlap,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **programmatic(overlap),
    )  # fmt: skip


def programmatic(overlap: bool) -> dict[str, bool]:
    """The launch option for a kernel that starts before the one in front has ended; Triton's AMD compiler does not know it."""
    return {"launch_pdl": True} if overlap else {}


def quantise(o: Tensor, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """One launch: ``o [M, G, K]`` as FP8 ``[G, M, K]`` with float32 scales ``[G, M, K/128]``."""
    m, g, k = o.shape
    q = o.new_empty((g, m, k), dtype=fp8)
    scale = o.new_empty((g, m, k // 128), dtype=torch.float32)
    rows = quantise_rows(k // 128)
    wo_a_quantise_kernel[(m, g, triton.cdiv(k // 128, rows))](
        o, q, scale, m, k, *o.stride(), rows, FP8_MAX[fp8], num_warps=4, enable_fp_fusion=True
    )
    return q, scale


def launch_gloop(o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, tile: Tile, overlap: bool = False) -> None:
    """1 + G launches: one that quantises ``o``, then one block-scaled GEMM per group. ``scale [G, N/128, K/128]`` float32.

    ``overlap``: the groups run side by side (see the kernel), on one stream, by programmatic dependent launch.
    """
    m, g, k = o.shape
    n = weight.shape[1]
    q, q_scale = quantise(o, weight.dtype)
    grid = (n // tile.block_n, triton.cdiv(m, tile.block_m))
    for group in range(g):
        wo_a_block_gemm_kernel[grid](
            q, q_scale, weight, scale, y, group, g, m, n, k, tile.block_m, tile.block_n, overlap,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **programmatic(overlap),
        )  # fmt: skip
