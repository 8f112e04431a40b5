"""A kernel that only reads a weight: the time that no kernel which must read it can beat. Triton, so GPUs only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = (65536, 16384)  # bytes per block; which is faster depends on the size of the weight, and the faster one is the floor


@triton.jit
def read_kernel(data, sink, SIZE: tl.constexpr, THREADS: tl.constexpr, ALL_IN_FLIGHT: tl.constexpr):
    """Read SIZE bytes per program, and store to ``sink [programs]`` under a condition that almost never holds.

    ALL_IN_FLIGHT (NVIDIA): a block barrier between the loads and their first use. The compiler otherwise moves most loads down
    to their use to save registers.
    """
    x = tl.load(data + tl.program_id(0).to(tl.int64) * (SIZE // 4) + tl.arange(0, SIZE // 4))
    if ALL_IN_FLIGHT:
        arrived = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.u32 p, 0, 0; bar.red.popc.u32 $0, 0, p; }", "=r", [], tl.int32, is_pure=False, pack=1
        )
        x = x ^ (arrived - THREADS)
    total = tl.sum(x, 0)
    tl.store(sink + tl.program_id(0), total, mask=total == 0x12345678)


def launch_read(weight: Tensor, sink: Tensor, size: int) -> None:
    """One launch that reads ``weight`` (a multiple of ``size`` bytes) in blocks of ``size``; ``sink`` is int32, one per block."""
    warps = size // 8192
    read_kernel[(weight.nbytes // size,)](
        weight.view(torch.int32), sink, size, warps * 32, torch.version.hip is None, num_warps=warps
    )
