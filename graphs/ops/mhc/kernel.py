"""The Triton kernels of ``graphs::mhc_*``: for few rows, two launches from a block's output to the next block's input.

``mhc_sums_kernel`` reads the linear layer of a hyper-connection once, each program its own columns of all streams, and writes
partial sums: of squares for the norm, and of products for the weights. The norm is a factor on these sums, so nothing waits for
it. Where a block's output is given, the streams are mixed on the way, and further programs write them. ``mhc_mix_kernel`` adds
the partial sums in a fixed order, so that results do not depend on timing, and sums the streams; one program more per row makes
``post`` and ``comb`` in registers.

All tensors are contiguous, H is 2, 4 or 8; weights may have any float dtype. Sums are float32. What is rounded to the dtype of
the streams is what `graphs.ops.mhc.reference` rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphs.ops.mhc.tiles import Tile, power_of_two


@triton.jit
def _spread(out, streams, post, comb, token, h, cols, D, H: tl.constexpr):
    """``post * out + comb.T @ streams`` of one token at the streams ``h`` and columns ``cols``, rounded, as float32."""
    dtype = streams.dtype.element_ty
    inside = cols < D
    row = token.to(tl.int64)
    given = tl.load(out + row * D + cols, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(post + row * H + h).to(dtype).to(tl.float32)
    mixed = tl.zeros_like(given)
    for j in tl.static_range(H):
        weight = tl.load(comb + row * H * H + j * H + h).to(dtype).to(tl.float32)
        mixed += weight * tl.load(streams + (row * H + j) * D + cols, mask=inside, other=0.0).to(tl.float32)
    return ((share * given).to(dtype).to(tl.float32) + mixed.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def mhc_spread_kernel(out, streams, post, comb, y, D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """The streams behind a block. Grid: rows, D / BLOCK."""
    k = tl.arange(0, H * BLOCK)
    h = k // BLOCK
    cols = tl.program_id(1) * BLOCK + k % BLOCK
    row = tl.program_id(0)
    x = _spread(out, streams, post, comb, row, h, cols, D, H)
    tl.store(y + (row.to(tl.int64) * H + h) * D + cols, x.to(y.dtype.element_ty), mask=cols < D)


@triton.jit
def _layer(weight, at, inside, FIRST: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr):
    """``ROWS`` rows of a linear layer, at the features ``at``."""
    row = FIRST + tl.arange(0, ROWS)
    return tl.load(weight + row[:, None] * K + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _features(out, streams, post, comb, token, h, cols, D, H: tl.constexpr, BEHIND: tl.constexpr):
    """The streams of a token, which may have to be mixed first."""
    if BEHIND:
        x = _spread(out, streams, post, comb, token, h, cols, D, H)
    else:
        x = tl.load(streams + (token.to(tl.int64) * H + h) * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["M"])
def mhc_sums_kernel(
    out, streams, post, comb, weight, y, sums, M, D: tl.constexpr, H: tl.constexpr, BEHIND: tl.constexpr, HEAD: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Partial sums ``[programs, M, STRIDE]`` of products with the linear layer, and behind them of squares.

    Grid: D / BLOCK, M / ROWS; with BEHIND M more, which write ``y``, what `mhc_spread_kernel` gives. The sums are over that then.
    Nothing is written before all was read, so that the reads of all rows are on their way together.
    """
    k = tl.arange(0, H * BLOCK)
    h = k // BLOCK
    cols = tl.program_id(0) * BLOCK + k % BLOCK
    first = tl.program_id(1) * ROWS
    if first < M:
        WIDE: tl.constexpr = H if HEAD else 2 * H
        narrow = _layer(weight, h * D + cols, cols < D, 0, WIDE, H * D)
        square = _layer(weight, h * D + cols, cols < D, 2 * H, 1 if HEAD else H * H, H * D) if not HEAD else narrow
        rows = tl.arange(0, ROWS)
        by_stream = tl.zeros((ROWS, WIDE), tl.float32)
        by_pair = tl.zeros((ROWS, 1 if HEAD else H * H), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        for index in tl.static_range(ROWS):
            x = _features(out, streams, post, comb, tl.minimum(first + index, M - 1), h, cols, D, H, BEHIND)
            here = rows == index
            by_stream += tl.where(here[:, None], tl.sum(narrow * x[None, :], 1)[None, :], 0.0)
            if not HEAD:
                by_pair += tl.where(here[:, None], tl.sum(square * x[None, :], 1)[None, :], 0.0)
            squares += tl.where(here, tl.sum(x * x, 0), 0.0)
        to = sums + (tl.program_id(0) * M + first + rows) * STRIDE
        there = first + rows < M
        tl.store(to[:, None] + tl.arange(0, WIDE)[None, :], by_stream, mask=there[:, None])
        if not HEAD:
            tl.store(to[:, None] + 2 * H + tl.arange(0, H * H)[None, :], by_pair, mask=there[:, None])
        tl.store(to + (H if HEAD else (2 + H) * H), squares, mask=there)
    elif BEHIND:
        token = tl.program_id(1) - (M + ROWS - 1) // ROWS
        made = _spread(out, streams, post, comb, token, h, cols, D, H)
        tl.store(y + (token.to(tl.int64) * H + h) * D + cols, made.to(y.dtype.element_ty), mask=cols < D)


@triton.jit
def _normalised(comb, eps, ITERATIONS: tl.constexpr):
    """One reciprocal for each sum: its digits are those of a division, and the steps are one after the other."""
    comb = comb * (1.0 / (tl.sum(comb, 0)[None, :] + eps))
    for _ in range(ITERATIONS - 1):
        comb = comb * (1.0 / (tl.sum(comb, 1)[:, None] + eps))
        comb = comb * (1.0 / (tl.sum(comb, 0)[None, :] + eps))
    return comb


@triton.jit
def _total(part, there, at):
    """Sums over programs of the partial sums at the places ``at``, of one dimension or two."""
    return tl.sum(tl.load(part + tl.expand_dims(at, 0), mask=there, other=0.0), 0)


@triton.jit
def _behind(part, there, base, scale, post, comb, norm, row, eps, H: tl.constexpr, ITERATIONS: tl.constexpr):
    """``post`` and ``comb`` of one row."""
    h = tl.arange(0, H)
    spread = _total(part[:, None], there[:, None], H + h) * norm
    made = spread * tl.load(scale + 1).to(tl.float32) + tl.load(base + H + h).to(tl.float32)
    tl.store(post + row * H + h, 2 * tl.sigmoid(made))
    square = h[:, None] * H + h[None, :]
    mixes = _total(part[:, None, None], there[:, None, None], 2 * H + square) * norm
    logits = mixes * tl.load(scale + 2).to(tl.float32) + tl.load(base + 2 * H + square).to(tl.float32)
    shares = tl.exp(logits - tl.max(logits, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None] + eps
    tl.store(comb + row * H * H + square, _normalised(shares, eps, ITERATIONS))


@triton.jit(do_not_specialize=["M", "norm_eps", "eps"])
def mhc_mix_kernel(
    streams, sums, base, scale, mixed, post, comb, M, norm_eps, eps, PROGRAMS: tl.constexpr, CHUNKS: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, STRIDE: tl.constexpr, ITERATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next block's input, and its weights, of the sums of PROGRAMS programs. Grid: rows, D / BLOCK, and one without HEAD."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    there = chunk < PROGRAMS
    part = sums + (chunk * M + row) * STRIDE
    squares = tl.sum(tl.load(part + (H if HEAD else (2 + H) * H), mask=there, other=0.0), 0)
    norm = tl.rsqrt(squares / (H * D) + norm_eps)
    if tl.program_id(1) < (D + BLOCK - 1) // BLOCK:
        h = tl.arange(0, H)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = (row.to(tl.int64) * H + h)[:, None] * D + cols[None, :]
        x = tl.load(streams + at, mask=(cols < D)[None, :], other=0.0).to(tl.float32)
        total = _total(part[:, None], there[:, None], h) * norm
        weights = tl.sigmoid(total * tl.load(scale).to(tl.float32) + tl.load(base + h).to(tl.float32)) + eps
        made = tl.sum(weights[:, None] * x, 0)
        tl.store(mixed + row.to(tl.int64) * D + cols, made.to(mixed.dtype.element_ty), mask=cols < D)
    elif not HEAD:
        _behind(part, there, base, scale, post, comb, norm, row, eps, H, ITERATIONS)


def launch_spread(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor, y: Tensor, tile: Tile) -> None:
    """``y [M, H, D]``, the streams behind a block, in one launch."""
    m, hc, width = streams.shape
    mhc_spread_kernel[(m, triton.cdiv(width, tile.spread))](out, streams, post, comb, y, width, hc, tile.spread, num_warps=4)


def launch_mix(
    behind: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    streams: Tensor,
    layer: tuple[Tensor, Tensor, Tensor],
    numbers: tuple[float, float, int],
    results: tuple[Tensor, ...],
    tile: Tile,
) -> None:
    """The input of a block in two launches.

    Args:
        behind: the output of the block before, and the streams, ``post`` and ``comb`` from before that; None where ``streams``
            are there already. Otherwise they are written.
        streams: ``[M, H, D]``.
        layer: ``fn``, ``base``, ``scale``.
        numbers: what is added to the mean square and to sums, and the number of iterations; 0 for the head's.
        results: the input ``[M, D]``; ``post`` and ``comb`` as well, but for the head's.
    """
    m, hc, width = streams.shape
    (fn, base, scale), (norm_eps, eps, iterations) = layer, numbers
    head, programs = iterations == 0, triton.cdiv(width, tile.columns)
    stride = power_of_two((2 + hc) * hc + 1)
    sums = torch.empty(programs, m, stride, dtype=torch.float32, device=streams.device)
    out, before, post, comb = behind if behind is not None else (streams, streams, base, base)
    rows = triton.cdiv(m, tile.rows) + (m if behind is not None else 0)
    mhc_sums_kernel[(programs, rows)](
        out, before, post, comb, fn, streams, sums, m, width, hc, behind is not None, head, stride, tile.columns, tile.rows,
        num_warps=tile.warps,
    )  # fmt: skip
    mixed, new_post, new_comb = results if not head else (results[0], sums, sums)
    mhc_mix_kernel[(m, triton.cdiv(width, tile.mixed) + (not head))](
        streams, sums, base, scale, mixed, new_post, new_comb, m, norm_eps, eps, programs, power_of_two(programs), width, hc,
        head, stride, iterations, tile.mixed, num_warps=4,
    )  # fmt: skip
