"""The ``fused`` path on compute capability 9.0 for more than a few tokens, written in Gluon: warpgroup products over a cluster.

The weight is the left operand and goes from shared memory to registers, where it is widened; ``o`` is the right operand and is
read from shared memory by the instruction itself, once per 64 columns. Blocks that share columns form a cluster and split K
between them, so that few columns still occupy every multiprocessor; the partial sums meet through distributed shared memory in
a fixed order. Nothing is written to memory but the result: no workspace, and always the same bits.

Nothing here is needed for a right answer: where Gluon is missing, or a size does not suit, the portable kernels run instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from graphs.ops.wo_a.kernels import clusters
from graphs.ops.wo_a.tiles import Cluster

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # newer name, older name
block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _widen(w, factor, A: gl.constexpr):
    """Pairs of e4m3 codes (uint16) to twice as many bfloat16, exact for every finite code: as in `hopper`.

    Pairs, because they are what a lane reads from shared memory at a time: as single bytes, taking them apart and putting them
    together again took as many instructions as everything else. ``factor`` is 2**120 as a pair of bfloat16, or that times a
    scale.
    """
    x = gl.inline_asm_elementwise(
        """{
        .reg .b32 a;
        prmt.b32 a, $1, 0, 0x9180;
        mul.lo.u32 a, a, 16;
        and.b32 a, a, 0x87F087F0;
        mul.bf16x2 $0, a, $2;
        }""", "=r,r,r", [w.to(gl.uint32), gl.full(w.shape, factor, gl.int32, w.type.layout)], gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    low = (x & 0xFFFF).to(gl.int16).to(gl.bfloat16, bitcast=True)
    high = (x >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([w.shape[0], 64]), A)


@gluon.jit
def _factor(scale, step, steps, POWERS: gl.constexpr):
    """What widened codes are multiplied with: 2**120, times the scale of a step if that is a power of two of at most 2**7."""
    factor = 0x7B807B80
    if POWERS:
        bits = gl.load(scale + gl.minimum(step, steps - 1)).to(gl.int32, bitcast=True)
        factor = ((bits >> 16) + 0x3C00) * 0x10001
    return factor


@gluon.jit
def _request(w_shared, o_shared, s_shared, w_tile, o_tile, s_tile, live, slot, step):
    """Ask for 128 features of the weight, of ``o``, and for their scale."""
    copy_async(w_shared.index(slot), w_tile + step * 64)
    copy_async(o_shared.index(slot), o_tile + step * 128, mask=live)
    copy_async(s_shared.index(slot), s_tile + step)


@gluon.jit
def wo_a_warpgroup_kernel(
    o, weight, scale, y, M, stride_om8, stride_og8, N: gl.constexpr, K: gl.constexpr,
    TOKENS: gl.constexpr, COLUMNS: gl.constexpr, C: gl.constexpr, RECEIVERS: gl.constexpr, SLOTS: gl.constexpr,
    mma: gl.constexpr, A: gl.constexpr, PAIRS: gl.constexpr, W_SHARED: gl.constexpr, O_SHARED: gl.constexpr,
    S_SHARED: gl.constexpr, W_COPY: gl.constexpr, O_COPY: gl.constexpr,
    BEGIN: gl.constexpr, END: gl.constexpr, LEAVE: gl.constexpr, CONSTRAINTS: gl.constexpr,
    INDEX: gl.constexpr, INDEX_CONSTRAINTS: gl.constexpr, POWERS: gl.constexpr,
):  # fmt: skip
    """y^T = W o^T for COLUMNS, TOKENS and a part of K. Grid (C * N / COLUMNS, G, token tiles), clusters of C blocks.

    The K / 128 steps of a product are shared out over the blocks of its cluster as evenly as they can be. Shared memory has room
    for SLOTS steps, which are asked for at the start. ``stride_om8`` and ``stride_og8`` are strides of ``o`` in units of 8
    elements, which is one copy of 16 bytes.
    """
    REGISTERS: gl.constexpr = TOKENS // 2  # sums in each thread
    EAGER: gl.constexpr = SLOTS if SLOTS * C * 128 >= K else SLOTS - 1
    if C > 1:
        gl.inline_asm_elementwise(BEGIN, "=r", [], gl.int32, is_pure=False, pack=1)
    g = gl.program_id(1)
    rank = gl.program_id(0) % C
    n0 = gl.program_id(0) // C * COLUMNS
    m0 = gl.program_id(2) * TOKENS
    first = rank * (K // 128 // C) + min(rank, K // 128 % C)
    steps = K // 128 // C + (rank < K // 128 % C).to(gl.int32)
    nw = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(1, W_COPY)), 1)
    kw = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, W_COPY)), 0)
    w_tile = weight + g.to(gl.int64) * (N * K // 2) + (n0 + nw) * (K // 2) + first * 64 + kw
    mo = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(1, O_COPY)), 1)
    ko = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, O_COPY)), 0)
    o_tile = o + (g.to(gl.int64) * stride_og8 + (m0 + mo).to(gl.int64) * stride_om8) * 8 + first * 128 + ko
    live = (m0 + mo < M) & (ko < 128)
    s_tile = scale + (g * (N // 128) + n0 // 128) * (K // 128) + first + gl.full([1, 1], 0, gl.int32, O_COPY)
    w_shared = gl.allocate_shared_memory(gl.uint16, [SLOTS, COLUMNS, 64], W_SHARED)
    o_shared = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, TOKENS, 128], O_SHARED)
    s_shared = gl.allocate_shared_memory(gl.float32, [SLOTS, 1, 1], S_SHARED)
    for early in gl.static_range(EAGER):
        if early < steps:
            _request(w_shared, o_shared, s_shared, w_tile, o_tile, s_tile, live, early, early)
        async_copy.commit_group()
    acc = gl.zeros([COLUMNS, TOKENS], gl.float32, mma)
    zero = gl.zeros([COLUMNS, TOKENS], gl.float32, mma)
    async_copy.wait_group(EAGER - 1)
    block_barrier()
    scales = scale + (g * (N // 128) + n0 // 128) * (K // 128) + first
    factor = _factor(scales, 0, steps, POWERS)
    following = _factor(scales, 1, steps, POWERS)
    a = _widen(w_shared.index(0).slice(0, 32, dim=1).load(PAIRS), factor, A)
    for step in range(steps):  # while one half of a step is multiplied, the next one is widened
        slot = step % SLOTS
        x = o_shared.index(slot)
        begin = acc if POWERS else zero
        part = warpgroup_mma(a, x.slice(0, 64, dim=1).permute([1, 0]), begin, use_acc=POWERS, is_async=True)
        b = _widen(w_shared.index(slot).slice(32, 32, dim=1).load(PAIRS), factor, A)
        part = warpgroup_mma(b, x.slice(64, 64, dim=1).permute([1, 0]), part, is_async=True)
        s = s_shared.index(slot).load(mma)
        factor = following
        following = _factor(scales, step + 2, steps, POWERS)
        async_copy.wait_group(EAGER - 2)
        block_barrier()
        part = warpgroup_mma_wait(1, deps=[part])  # of the first half, whose registers are written next
        a = _widen(w_shared.index((step + 1) % SLOTS).slice(0, 32, dim=1).load(PAIRS), factor, A)
        if (step + EAGER < steps) | (M < 0):  # M is never: with a branch that stays, ptxas leaves the widening before the wait
            late = step + EAGER
            _request(w_shared, o_shared, s_shared, w_tile, o_tile, s_tile, live, late % SLOTS, late)
        async_copy.commit_group()
        part = warpgroup_mma_wait(0, deps=[part])
        if POWERS:
            acc = part
        else:
            acc += part * s
    nn = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(1, mma)), 1)
    tt = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, mma)), 0)
    out = y + ((m0 + tt).to(gl.int64) * gl.num_programs(1) + g) * N + n0 + nn
    mine = m0 + tt < M
    if C > 1:
        total = gl.inline_asm_elementwise(END, CONSTRAINTS, [acc], gl.float32, is_pure=False, pack=REGISTERS)
        register = gl.inline_asm_elementwise(INDEX, INDEX_CONSTRAINTS, [acc], gl.int32, is_pure=True, pack=REGISTERS)
        gl.store(out, total.to(gl.bfloat16), mask=mine & (register // (REGISTERS // RECEIVERS) == rank))
        gl.inline_asm_elementwise(LEAVE, "=r", [], gl.int32, is_pure=False, pack=1)
    else:
        gl.store(out, acc.to(gl.bfloat16), mask=mine)


def exchange(registers: int, threads: int, senders: int, receivers: int) -> dict[str, str]:
    """PTX that sums accumulators over a cluster: what to do first and last, the operands of the latter, the number of a register.

    A thread has ``receivers`` runs of ``registers``; run j of every thread of every block goes to block j, which adds them in
    the order of the blocks. The sums stand in run j of block j, every other register becomes zero. What is sent and what is
    received lies in the shared memory that the products no longer need, once all blocks have come that far (the first barrier).
    It goes out as one bulk copy for each block, which brings the news of its arrival along: storing to the other blocks directly
    takes either a fence of all memory or a signal for each store. No block leaves while others read from it (the last barrier).
    """
    run = registers // receivers
    step = min(run, 4)
    vector = {1: "", 2: ".v2", 4: ".v4"}[step]
    sent, piece = registers * threads * 4, run * threads * 4

    def names(prefix: str, first: int) -> str:
        joined = ", ".join(f"{prefix}{first + i}" for i in range(step))
        return "{" + joined + "}" if step > 1 else joined

    begin = f""".shared .align 1024 .b8 arrival[1024];
{{ .reg .pred p; .reg .b32 tid, bar;
mov.u32 tid, %tid.x; mov.u32 bar, arrival; setp.eq.u32 p, tid, 0;
@p mbarrier.init.shared::cta.b64 [bar], 1;
@p fence.mbarrier_init.release.cluster;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {senders * piece};
mov.b32 $0, 0; }}"""
    lines = [
        "{ .reg .b32 rank, tid, mine, sent, source, target, bar, own, base;", f".reg .f32 t<{run}>, s<{run}>;",
        ".reg .pred p, q;", "mov.u32 rank, %cluster_ctarank;", "mov.u32 tid, %tid.x;", "mov.u32 own, arrival;",
        "mov.u32 sent, global_smem;", f"add.u32 base, sent, {sent};", f"mad.lo.u32 mine, tid, {run * 4}, sent;", "bar.sync 0;",
    ]  # fmt: skip
    for rank in range(receivers):
        for i in range(0, run, step):
            lines.append(f"st.shared{vector}.f32 [mine+{rank * piece + i * 4}], {names('$', registers + rank * run + i)};")
    lines += [
        "fence.proxy.async.shared::cta;", "bar.sync 0;",
        "barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;",
        f"setp.lt.u32 p, tid, {receivers};",
        f"@p mad.lo.u32 source, tid, {piece}, sent;",
        f"@p mad.lo.u32 target, rank, {piece}, base;",
        "@p mapa.shared::cluster.u32 target, target, tid;",
        "@p mapa.shared::cluster.u32 bar, own, tid;",
        "@p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        f"[target], [source], {piece}, [bar];",
        f"mad.lo.u32 mine, tid, {run * 4}, base;",
        f"setp.ge.u32 q, rank, {receivers};",
        "again:", "mbarrier.try_wait.parity.shared::cta.b64 p, [own], 0;", "or.pred p, p, q;", "@!p bra again;",
        "barrier.cluster.arrive.relaxed.aligned;",
    ]  # fmt: skip
    lines += [f"mov.f32 s{i}, 0f00000000;" for i in range(run)]
    for source in range(senders):
        lines += [f"ld.shared{vector}.f32 {names('t', i)}, [mine+{source * piece + i * 4}];" for i in range(0, run, step)]
        lines += [f"add.f32 s{i}, s{i}, t{i};" for i in range(run)]
    for rank in range(receivers):
        lines.append(f"setp.eq.u32 p, rank, {rank};")
        lines += [f"selp.f32 ${rank * run + i}, s{i}, 0f00000000, p;" for i in range(run)]
    return {
        "BEGIN": begin,
        "END": "\n".join([*lines, "}"]),
        "LEAVE": "barrier.cluster.wait.aligned; mov.b32 $0, 0;",
        "CONSTRAINTS": ",".join(["=&f"] * registers + ["f"] * registers),
        "INDEX": " ".join(f"mov.b32 ${i}, {i};" for i in range(registers)),
        "INDEX_CONSTRAINTS": ",".join(["=r"] * registers + ["f"] * registers),
    }


@functools.cache
def constants(k: int, shape: Cluster, *, powers: bool = False) -> dict[str, Any]:
    """What :func:`wo_a_warpgroup_kernel` is compiled for, but for N and K; ``powers``: for scales that are powers of two.

    Raises:
        ValueError: some block would have fewer than two steps of 128 features.
    """
    if k < 256 * shape.blocks:
        raise ValueError(f"K = {k} is too little for a cluster of {shape.blocks} blocks, which need 256 features each")
    tokens, columns, cluster, slots = shape
    steps = -(-k // 128 // cluster)
    warps, receivers = columns // 16, 1 << (cluster.bit_length() - 1)
    mma = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, tokens, 16])
    nothing = dict.fromkeys(("BEGIN", "END", "LEAVE", "CONSTRAINTS", "INDEX", "INDEX_CONSTRAINTS"), "")
    return {
        "TOKENS": tokens, "COLUMNS": columns, "C": cluster, "RECEIVERS": receivers, "SLOTS": min(slots, steps),
        "POWERS": powers, "mma": mma, "A": gl.DotOperandLayout(0, mma, 2), "PAIRS": gl.DotOperandLayout(0, mma, 1),
        "W_SHARED": gl.SwizzledSharedLayout(8, 1, 8, [1, 0]),
        "O_SHARED": gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
        "S_SHARED": gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
        "W_COPY": gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0]),
        "O_COPY": gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0]),
        **(exchange(tokens // 2, 32 * warps, cluster, receivers) if cluster > 1 else nothing),
    }  # fmt: skip


TYPES = {  # of the arguments that are no constants
    "o": "*bf16", "weight": "*u16", "scale": "*fp32", "y": "*bf16", "M": "i32", "stride_om8": "i32", "stride_og8": "i32",
}  # fmt: skip


@functools.cache
def compiled(device: int, n: int, k: int, shape: Cluster, powers: bool) -> Any:
    """The kernel for these sizes, loaded on ``device``."""
    with torch.cuda.device(device):
        kernel = compile_for(triton.runtime.driver.active.get_current_target(), n, k, shape, powers=powers)
        kernel._init_handles()
    return kernel


def compile_for(target: Any, n: int, k: int, shape: Cluster, *, powers: bool = False) -> Any:
    """The kernel for these sizes and a chip, which need not be here."""
    given = {"N": n, "K": k} | constants(k, shape, powers=powers)
    names = wo_a_warpgroup_kernel.arg_names
    signature = {name: "constexpr" if name in given else TYPES[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(wo_a_warpgroup_kernel, signature, given, aligned)
    return triton.compile(source, target=target, options={"num_warps": shape.columns // 16, "enable_fp_fusion": True})


def launch_warpgroup(o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, shape: Cluster, *, powers: bool = False) -> None:
    """One launch, operands as :func:`graphs.ops.wo_a.kernels.portable.launch_fused`; ``o`` as :func:`suits` says.

    With ``powers`` every scale has to be a power of two, of at most 2**7.
    """
    m, g, k = o.shape
    n = weight.shape[1]
    kernel = compiled(o.device.index, n, k, shape, powers)
    grid = (shape.blocks * n // shape.columns, g, -(-m // shape.tokens))
    clusters.launch(kernel, grid, shape.blocks, (o, weight, scale, y, m, o.stride(0) // 8, o.stride(1) // 8))


def suits(o: Tensor) -> bool:
    """Whether 16 bytes of ``o`` can be copied at a time: contiguous features, rows at multiples of 16 bytes."""
    return o.stride(2) == 1 and o.stride(0) % 8 == 0 and o.stride(1) % 8 == 0 and o.data_ptr() % 16 == 0
