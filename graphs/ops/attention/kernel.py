"""The Triton kernels of ``graphs::one_query_attention``: a block for the heads that share keys and a part of the cache.

All keys and values of a part are asked for at once; there is no loop to fill. A second kernel joins the parts where there are
several, each with its largest score and its sum, in the order of the cache (the decomposition of FlashDecoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphs.ops.wo_a.kernels.portable import INTERPRETED

SHORT = 16384  # elements of keys that one block takes whole
LONG = 8192  # of a block, where there are several
ROWS = 16  # heads of a block as a product takes them
JOINED = 32  # parts that are joined at a time


@triton.jit
def attend_part_kernel(
    query, key, value, mask, result, parts, scale, HEADS, LENGTH, GROUPS, PARTS,
    q_b, q_h, q_d, k_b, k_g, k_s, k_d, v_b, v_g, v_s, v_d, m_b, m_h, m_s,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One part of the cache for ``SHARED`` heads. Grid: (B * GROUPS, PARTS).

    With ``WHOLE`` there is one part, and ``result [B, HEADS, 1, WIDTH]`` is written; else ``parts [B * GROUPS, PARTS, ROWS,
    WIDTH + 2]`` float32: the weighted sum of values, the sum of weights, and the largest score.
    """
    batch = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = (tl.program_id(0) % GROUPS).to(tl.int64)
    rows = tl.arange(0, ROWS)
    head = group * SHARED + rows
    d = tl.arange(0, WIDTH)
    s = tl.program_id(1) * PART + tl.arange(0, PART)
    is_head, is_place = rows < SHARED, s < LENGTH
    both = is_head[:, None] & is_place[None, :]
    if mask is not None:
        place = mask + batch * m_b + head[:, None] * m_h + s[None, :] * m_s
        if mask.dtype.element_ty == tl.int1:
            bias = tl.where(tl.load(place, mask=both, other=0) != 0, 0.0, float("-inf"))
        else:
            bias = tl.load(place, mask=both, other=float("-inf")).to(tl.float32)
    else:
        bias = tl.where(both, 0.0, float("-inf"))
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    largest = tl.max(bias, 1)
    if tl.max(tl.max((bias != float("-inf")).to(tl.int32), 1)) > 0:  # NaN is seen, too
        q = tl.load(query + batch * q_b + head[:, None] * q_h + d[None, :] * q_d, mask=is_head[:, None], other=0.0)
        places = s.to(tl.int64)
        k = tl.load(key + batch * k_b + group * k_g + d[:, None] * k_d + places[None, :] * k_s, mask=is_place[None, :], other=0.0)
        v = tl.load(
            value + batch * v_b + group * v_g + places[:, None] * v_s + d[None, :] * v_d, mask=is_place[:, None], other=0.0
        )
        dtype = v.dtype
        if INTERPRETED:  # which cannot multiply bfloat16
            dtype = tl.float32
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scores = tl.dot(q, k) * scale + bias
        largest = tl.maximum(tl.max(scores, 1), -3.4028234663852886e38)
        shares = tl.exp(scores - largest[:, None])
        weight = tl.sum(shares, 1)
        high = shares.to(dtype)
        low = (shares - high.to(tl.float32)).to(dtype)  # twice the digits, on any chip
        finite = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)  # where nothing is left, 0 of an infinite value is 0
        total = tl.dot(low, finite.to(dtype), tl.dot(high, v))
    if WHOLE:
        out = total / tl.where(weight > 0, weight, 1.0)[:, None]
        place = result + (batch * HEADS + head[:, None]) * WIDTH + d[None, :]
        tl.store(place, out.to(result.dtype.element_ty), mask=is_head[:, None])
    else:
        here = parts + ((tl.program_id(0).to(tl.int64) * PARTS + tl.program_id(1)) * ROWS + rows) * (WIDTH + 2)
        tl.store(here[:, None] + d[None, :], total)
        tl.store(here + WIDTH, weight)
        tl.store(here + WIDTH + 1, largest)


@triton.jit
def join_parts_kernel(
    parts, result, HEADS, GROUPS, PARTS, SHARED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, JOINED: tl.constexpr
):  # fmt: skip
    """Join the parts of one head, ``JOINED`` at a time. Grid: B * HEADS."""
    batch = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    d = tl.arange(0, WIDTH)
    first = (batch * GROUPS + head // SHARED).to(tl.int64) * PARTS
    most = -3.4028234663852886e38
    weight = 0.0
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, PARTS, JOINED):
        part = start + tl.arange(0, JOINED)
        known = part < PARTS
        here = parts + ((first + part) * ROWS + head % SHARED) * (WIDTH + 2)
        largest = tl.load(here + WIDTH + 1, mask=known, other=float("-inf"))
        next_most = tl.maximum(most, tl.max(largest, 0))
        factor, before = tl.exp(largest - next_most), tl.exp(most - next_most)
        values = tl.load(here[:, None] + d[None, :], mask=known[:, None], other=0.0)
        weight = weight * before + tl.sum(tl.load(here + WIDTH, mask=known, other=0.0) * factor, 0)
        total = total * before + tl.sum(values * factor[:, None], 0)
        most = next_most
    total = total / tl.where(weight > 0, weight, 1.0)
    tl.store(result + tl.program_id(0).to(tl.int64) * WIDTH + d, total.to(result.dtype.element_ty))


def part_of(length: int, width: int) -> tuple[int, int]:
    """Positions and warps of a block: all of a short cache.

    Measured on an H200, us, against the library's kernel: 12 heads of 64 over 192 positions 4.5 (5.9); 32 heads of 64 on 8 of
    keys, batch 4, over 192 4.8 (6.1); one sequence over 1024, all filled 5.5 (6.6), 64 filled 4.7 (6.8). Batch 4 over 4096 of
    width 128 33 (24): there it pays for heads that share keys, which a library is given repeated.
    """
    whole = max(triton.next_power_of_2(length), 16)
    if whole * width <= SHORT:
        return whole, 8 if 2 * whole * width > SHORT else 4
    return max(LONG // width, 32), 4


def launch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, result: Tensor) -> None:
    """One launch for a cache of one part, two else; ``result [B, H, 1, D]`` is contiguous."""
    (batch, heads, _, width), (groups, length) = query.shape, key.shape[1:3]
    part, warps = part_of(length, width)
    parts = triton.cdiv(length, part)
    kept = result if parts == 1 else query.new_empty(batch * groups, parts, ROWS, width + 2, dtype=torch.float32)
    over = (0, 0, 0) if mask is None else tuple(0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in (0, 1, 3))
    q, shared = query.stride(), heads // groups
    attend_part_kernel[(batch * groups, parts)](
        query, key, value, mask, result, kept, scale, heads, length, groups, parts,
        q[0], q[1], q[3], *key.stride(), *value.stride(), *over, shared, width, part, ROWS, parts == 1,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    if parts > 1:
        join_parts_kernel[(batch * heads,)](kept, result, heads, groups, parts, shared, width, ROWS, JOINED, num_warps=4)
