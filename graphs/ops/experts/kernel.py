"""The Triton kernel of ``graphs::expert_linear``: one row times some outputs of its expert, a block each.

A weight is read once and multiplied once, so there is nothing for tensor cores. Blocks of the same outputs stand beside each
other for all rows: rows with one expert read the same part of its weight at the same time, all but the first from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WARPS, STAGES = 4, 2
ELEMENTS = 4096  # of a weight that a block reads at a time
LONGEST = 512  # features of these


@triton.jit(do_not_specialize=["P"])
def expert_linear_kernel(
    x, weights, experts, y, P, E, N, K, stride_e, stride_n, stride_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[p] = weights[experts[p]] @ x[p]`` for contiguous ``x [P, K]`` and ``y [P, N]``. Grid: P * N / BLOCK_N."""
    row = tl.program_id(0) % P
    n = tl.program_id(0) // P * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(experts + row).to(tl.int64)
    expert = tl.where(expert < 0, expert + E, expert)
    known = (expert >= 0) & (expert < E)
    expert = tl.where(known, expert, 0)
    here = weights + expert * stride_e + n.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    apart = tl.cast(stride_k, tl.int64)
    for start in range(0, K, BLOCK_K):
        left = k < K - start
        w = tl.load(here + start * apart, mask=(n < N)[:, None] & left[None, :], other=0.0)
        v = tl.load(x + row.to(tl.int64) * K + start + k, mask=left, other=0.0)
        acc += w.to(tl.float32) * v.to(tl.float32)[None, :]
    result = tl.where(known, tl.sum(acc, 1), float("nan"))
    tl.store(y + row.to(tl.int64) * N + n, result.to(y.dtype.element_ty), mask=n < N)


def blocks(n: int, k: int) -> tuple[int, int]:
    """Outputs and features of a block."""
    features = min(LONGEST, triton.next_power_of_2(max(k, 1)))
    return min(max(ELEMENTS // features, 1), triton.next_power_of_2(n)), features


def launch_experts(x: Tensor, weights: Tensor, experts: Tensor, y: Tensor) -> None:
    """One launch. ``x``, ``experts`` and ``y`` are contiguous, ``weights [E, N, K]`` may have any strides."""
    (p, k), (e, n, _) = x.shape, weights.shape
    block_n, block_k = blocks(n, k)
    expert_linear_kernel[(p * triton.cdiv(n, block_n),)](
        x, weights, experts, y, p, e, n, k, *weights.stride(), block_n, block_k, num_warps=WARPS, num_stages=STAGES
    )
