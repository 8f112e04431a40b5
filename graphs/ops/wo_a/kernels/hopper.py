"""The ``fused`` path on compute capability 9.0, written in Gluon: what matters is which thread loads which byte, and when.

Nothing here is needed for a right answer: where Gluon is missing, or a size does not suit, the portable kernel of
:mod:`graphs.ops.wo_a.kernels.portable` runs instead. Shapes and meaning of every operand are the same there and here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

COLUMNS = 16  # per block: 2048 columns make 128 blocks, one for nearly every multiprocessor of an H100 or H200
WARPS = 8  # a warp's slice of K = 4096 is 4 blocks of 128: 16 loads of 16 bytes per thread, all in flight at once


@gluon.jit
def _3d(x, a: gl.constexpr, b: gl.constexpr):
    return gl.expand_dims(gl.expand_dims(x, a), b)


@gluon.jit
def _grid_wait():
    """Wait until the kernel before this one has finished and its writes are visible."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _grid_launch():
    """Let the next kernel's blocks start, if it was launched to allow that."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _factor_after_loads(THREADS: gl.constexpr):
    """The bits of two bfloat16 2**120, known only after a block barrier.

    ptxas moves loads down to their use to save registers, which leaves four of a thread's sixteen in flight. It cannot move
    them across a barrier, and the conversions below cannot move up because they need this value.
    """
    count = gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; bar.red.popc.u32 $0, 0, p; }", "=r", [], gl.int32, is_pure=False, pack=1
    )
    return count + (0x7B807B80 - THREADS)


@gluon.jit
def _widen(w, factor):
    """e4m3 bytes (int8) to bfloat16, exact for every finite code.

    The seven bits below the sign, moved to where bfloat16 has its exponent and mantissa, are the value times 2**-120
    (subnormals too); one multiplication finishes. The compiler's direct conversion is a quarter-rate instruction.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $2, 0, 0x1404;
        prmt.b32 b, $2, 0, 0x3424;
        and.b32 c, a, 0x7F007F00;
        and.b32 d, b, 0x7F007F00;
        shr.b32 c, c, 4;
        shr.b32 d, d, 4;
        lop3.b32 c, a, 0x80008000, c, 0xEA;
        lop3.b32 d, b, 0x80008000, d, 0xEA;
        mul.bf16x2 $0, c, $3;
        mul.bf16x2 $1, d, $3;
        }""", "=&r,=&r,r,r,r,r,r", [w, factor], gl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def wo_a_registers_kernel(
    o, weight, scale, y, M, N: gl.constexpr, K: gl.constexpr, stride_om, stride_og,
    BLOCK_M: gl.constexpr, SPLIT: gl.constexpr, OVERLAP: gl.constexpr,
    mma: gl.constexpr, A: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """y^T = W o^T for 16 columns and all of K: SPLIT warps share K, everything goes straight into registers. Grid (N/16, G).

    The weight is the left operand, tokens are the columns of the instruction. Fragments are loaded as the instruction wants
    them, 16 contiguous bytes per lane: the order of k is free as long as both operands share it, so shared memory serves only
    the sum over the warps. With OVERLAP the weight is requested before the kernel in front of this one has finished.
    """
    SLICE: gl.constexpr = K // SPLIT
    BLOCKS: gl.constexpr = SLICE // 128
    if not OVERLAP:
        _grid_wait()
    g = gl.program_id(1)
    n0 = gl.program_id(0) * 16
    sa = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, A))), 1, 2)
    na = _3d(gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, A))), 0, 2)
    ka = _3d(gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, A))), 0, 1)
    w_tile = weight + g.to(gl.int64) * N * K + (n0 + na) * K + sa * SLICE + ka
    sc = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, mma))), 1, 2)
    s_tile = scale + (g * (N // 128) + n0 // 128) * (K // 128) + sc * BLOCKS
    sb = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, B))), 1, 2)
    kb = _3d(gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, B))), 0, 2)
    mb = _3d(gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, B))), 0, 1)
    o_tile = o + g.to(gl.int64) * stride_og + mb * stride_om + sb * SLICE + kb
    ws = ()
    for b in gl.static_range(BLOCKS):
        ws = ws + (gl.load(w_tile + b * 128),)  # noqa: RUF005 (Triton has no starred tuples)
    ss = ()
    for b in gl.static_range(BLOCKS):
        ss = ss + (gl.load(s_tile + b),)  # noqa: RUF005
    _grid_launch()
    if OVERLAP:
        _grid_wait()
    xs = ()
    for b in gl.static_range(BLOCKS):
        xs = xs + (gl.load(o_tile + b * 128, mask=mb < M, other=0.0),)  # noqa: RUF005
    factor = gl.full([SPLIT, 16, 128], 0, gl.int32, A) + _factor_after_loads(SPLIT * 32)
    acc = gl.zeros([SPLIT, 16, BLOCK_M], gl.float32, mma)
    for b in gl.static_range(BLOCKS):
        part = mma_v2(_widen(ws[b], factor), xs[b], gl.zeros([SPLIT, 16, BLOCK_M], gl.float32, mma))
        acc += part * ss[b]
    out = gl.sum(acc, 0)
    L: gl.constexpr = gl.SliceLayout(0, mma)
    nn = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, L)), 1)
    mm = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, L)), 0)
    gl.store(y + (mm * gl.num_programs(1) + g) * N + n0 + nn, out.to(gl.bfloat16), mask=mm < M)


@functools.cache
def layouts(split: int) -> dict[str, Any]:
    """Thread layouts of the result and of both operands for ``split`` warps; also what this module needs of Gluon."""
    mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[split, 1, 1], instr_shape=[1, 16, 8])
    return {"mma": mma, "A": gl.DotOperandLayout(0, mma, 16), "B": gl.DotOperandLayout(1, mma, 16)}


def launch_registers(o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, overlap: bool) -> None:
    """One launch, for M <= 16, contiguous features and K a multiple of 1024 up to 4096."""
    m, g, k = o.shape
    n = weight.shape[1]
    wo_a_registers_kernel[(n // COLUMNS, g)](
        o, weight.view(torch.int8), scale, y, m, n, k, o.stride(0), o.stride(1),
        8 if m <= 8 else 16, WARPS, overlap, **layouts(WARPS), num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
