"""Second round of candidates: activations as a pair of FP8 values, so that the weight is multiplied as it lies in memory.

A bfloat16 has eight significant bits and e4m3 has four, so x = hi + lo with hi = e4m3(x) and lo = e4m3(x - hi) is exact for
values within ten binades of the largest of their 128 (each group is first scaled by a power of two to just below 448), and off
by at most 2**-19 of that largest value below. The FP8 tensor cores then take the weight from shared memory untouched: nothing
of it ever stands in a register, and what is converted is the activations, which are fewer.

``wo_a_variants.py`` imports this and times it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # newer name, older name
UNDERSCORE = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))


@gluon.jit
def grid_wait():
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def grid_launch():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def view(memory, shape: gl.constexpr, layout: gl.constexpr):
    if UNDERSCORE:
        return memory._reinterpret(memory.dtype, shape, layout)
    else:
        return memory.reinterpret(memory.dtype, shape, layout)


@gluon.jit
def split(x):
    """Rows of 128 float32 as FP8 hi and lo, and the power of two that undoes their scaling. Inf and NaN become NaN."""
    exponent = gl.maximum((gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True) >> 23) & 0xFF, 8)
    factor = gl.where(exponent == 255, 0x7FC00000, (261 - exponent) << 23).to(gl.float32, bitcast=True)
    x = x * gl.expand_dims(factor, 1)
    hi = x.to(gl.float8e4nv)
    return hi, (x - hi.to(gl.float32)).to(gl.float8e4nv), ((exponent - 7) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def tiles(pointers, mask, COUNT: gl.constexpr):
    x = ()
    for b in gl.static_range(COUNT):
        x = x + (gl.load(pointers + b * 128, mask=mask, other=0.0),)  # noqa: RUF005
    return x


@gluon.jit
def scalars(pointer, mask, COUNT: gl.constexpr):
    x = ()
    for b in gl.static_range(COUNT):
        x = x + (gl.load(pointer + b, mask=mask, other=0.0),)  # noqa: RUF005
    return x


@gluon.jit
def one_after_loads(THREADS: gl.constexpr):
    """1.0, known only after a block barrier: keeps ptxas from moving the loads before it down to their uses."""
    count = gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; bar.red.popc.u32 $0, 0, p; }", "=r", [], gl.int32, is_pure=False, pack=1
    )
    return (count + (0x3F800000 - THREADS)).to(gl.float32, bitcast=True)


@gluon.jit
def buffers(COUNT: gl.constexpr, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """One allocation per block of K: with a single one the compiler puts a barrier between any two writes to it."""
    out = ()
    for _b in gl.static_range(COUNT):
        out = out + (gl.allocate_shared_memory(dtype, shape, layout),)  # noqa: RUF005
    return out


@gluon.jit
def pair_kernel(
    o, w, scale, y, M, N: gl.constexpr, K: gl.constexpr, stride_om, stride_og,
    C: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, CB: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
    COPY: gl.constexpr, OL: gl.constexpr, WS: gl.constexpr, FS: gl.constexpr, mma: gl.constexpr, ACC: gl.constexpr,
    BEGIN: gl.constexpr, END: gl.constexpr, CONSTRAINTS: gl.constexpr,
):  # fmt: skip
    """BN columns and K/C features per block: C blocks of a cluster share K. A chunk is CB blocks of 128; STAGES are in flight."""
    SLICE: gl.constexpr = K // C
    CHUNKS: gl.constexpr = SLICE // (128 * CB)
    BUFFERS: gl.constexpr = 1 if CHUNKS == 1 else 2
    if PDL == 2:
        grid_wait()
    rank = 0
    if C > 1:
        gl.inline_asm_elementwise(BEGIN, "=r", [], gl.int32, is_pure=False, pack=1)
        rank = gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], gl.int32, is_pure=True, pack=1)
    g = gl.program_id(1)
    n0 = gl.program_id(0) * BN
    nc = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, COPY)), 1)
    kc = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, COPY)), 0)
    w_tile = w + (g * N + n0).to(gl.int64) * K + rank * SLICE + nc * K + kc
    ws = buffers(CB, gl.float8e4nv, [STAGES, BN, 128], WS)
    for s in gl.static_range(STAGES):
        for b in gl.static_range(CB):
            copy_async(ws[b].index(s), w_tile + (s * CB + b) * 128)
        async_copy.commit_group()
    s_tile = scale + (g * (N // 128) + n0 // 128) * (K // 128) + rank * (SLICE // 128)
    ss = scalars(s_tile, True, CB)
    to = gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(1, OL)), 1)
    ko = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, OL)), 0)
    o_tile = o + g.to(gl.int64) * stride_og + rank * SLICE + to * stride_om + ko
    live = (to < M) & (ko < 128)
    if PDL > 0:
        grid_launch()
    if PDL == 1:
        grid_wait()
    x = tiles(o_tile, live, CB)
    one = one_after_loads(BN * 2) if CHUNKS == 1 else 1.0
    xs = buffers(CB, gl.float8e4nv, [BUFFERS, 2 * BT, 128], WS)  # hi over lo: one instruction multiplies both
    fs = buffers(CB, gl.float32, [BUFFERS, 2 * BT], FS)
    acc = gl.zeros([BN, 2 * BT], gl.float32, mma)
    for c in range(CHUNKS):
        slot = c % BUFFERS
        los = ()
        inverses = ()
        for b in gl.static_range(CB):
            hi, lo, inverse = split(x[b].to(gl.float32) * one)
            view(xs[b], [2 * BUFFERS, BT, 128], WS).index(2 * slot).store(hi)
            view(fs[b], [2 * BUFFERS, BT], FS).index(2 * slot).store(inverse)
            los = los + (lo,)  # noqa: RUF005
            inverses = inverses + (inverse,)  # noqa: RUF005
        for b in gl.static_range(CB):
            view(xs[b], [2 * BUFFERS, BT, 128], WS).index(2 * slot + 1).store(los[b])
            view(fs[b], [2 * BUFFERS, BT], FS).index(2 * slot + 1).store(inverses[b])
        if CHUNKS > 1:
            x = tiles(o_tile + (c + 1) * (CB * 128), live & (c + 1 < CHUNKS), CB)
        fence_async_shared()  # by the threads that wrote, before the barrier that comes with the wait below
        async_copy.wait_group(STAGES - 1)
        parts = ()
        for b in gl.static_range(CB):
            part = warpgroup_mma(
                ws[b].index(c % STAGES), xs[b].index(slot).permute([1, 0]), gl.zeros([BN, 2 * BT], gl.float32, mma),
                use_acc=False, is_async=True,
            )  # fmt: skip
            parts = parts + (part,)  # noqa: RUF005
        if CB == 1:  # noqa: SIM108 (as an expression both sides would need one type)
            parts = (warpgroup_mma_wait(0, deps=parts),)
        else:
            parts = warpgroup_mma_wait(0, deps=parts)
        if STAGES < CHUNKS:
            for b in gl.static_range(CB):
                copy_async(
                    ws[b].index(c % STAGES), w_tile + ((c + STAGES) * CB + b) * 128, mask=(nc < BN) & (c + STAGES < CHUNKS)
                )
        async_copy.commit_group()
        for b in gl.static_range(CB):
            acc += parts[b] * gl.expand_dims(fs[b].index(slot).load(gl.SliceLayout(0, mma)) * ss[b], 0)
        if CHUNKS > 1:
            ss = scalars(s_tile + (c + 1) * CB, c + 1 < CHUNKS, CB)
    if C == 1:
        total = gl.convert_layout(gl.sum(acc.reshape([BN, 2, BT]), 1), ACC, assert_trivial=True)
        nn = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, ACC)), 1)
        tt = gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(0, ACC)), 0)
        gl.store(y + (tt * gl.num_programs(1) + g) * N + n0 + nn, total.to(gl.bfloat16), mask=(tt < M) & (nn < BN))
    else:  # the compiler thinks that all blocks of a cluster hold the same and lets only the first store: hence PTX
        RUN: gl.constexpr = BT // 2 // C
        total = gl.inline_asm_elementwise(END, CONSTRAINTS, [acc], gl.float32, is_pure=False, pack=BT)
        nn = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, mma)), 1)
        tt = gl.expand_dims(gl.arange(0, 2 * BT, gl.SliceLayout(0, mma)), 0)
        mine = (((tt // 8) * 4 + ((nn % 16) // 8) * 2 + tt % 2) // RUN == rank) & (tt < M) & (tt < BT)
        out = y + (tt * gl.num_programs(1) + g) * N + n0 + nn
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }", "=r,l,h,r",
            [out.to(gl.int64), total.to(gl.bfloat16).to(gl.int16, bitcast=True), mine.to(gl.int32)], gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


def exchange(registers: int, ranks: int, threads: int, signal: bool) -> tuple[str, str, str]:
    """PTX that adds hi to lo and sums over a cluster: what to do first, what to do last, operand constraints of the last.

    A thread's ``registers`` accumulators are hi in the first half, lo in the second. Their sums fall into ``ranks`` runs; run j
    of every thread of every block goes to block j, which adds in a fixed order. With ``signal``, data and the news that it is
    there travel together (``st.async``) and no block leaves before all of its data has come, so nobody writes to a block that
    is gone; without, plain stores and a cluster barrier, which fences all memory. The barrier at the start is for both: nobody
    may write to a block that is not there yet.
    """
    half = registers // 2
    run = half // ranks
    step = min(run, 4)
    vector = {1: "", 2: ".v2", 4: ".v4"}[step]
    size = half * threads * 4
    reserved = -(-(size + 8) // 1024) * 1024  # swizzled tiles behind it must stay aligned to 1024 bytes

    def names(prefix: str, first: int) -> str:
        joined = ", ".join(f"{prefix}{first + i}" for i in range(step))
        return "{" + joined + "}" if step > 1 else joined

    expect = f"""@p mbarrier.init.shared::cta.b64 [base+{size}], 1;
@p fence.mbarrier_init.release.cluster;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [base+{size}], {size};"""
    begin = f""".shared .align 1024 .b8 exchanged[{reserved}];
{{ .reg .pred p; .reg .b32 tid, base;
mov.u32 tid, %tid.x; mov.u32 base, exchanged; setp.eq.u32 p, tid, 0;
{expect if signal else ""}
barrier.cluster.arrive.relaxed.aligned;
mov.b32 $0, 0; }}"""
    lines = [
        "{ .reg .b32 rank, tid, base, slot, signal, remote, bar;", f".reg .f32 t<{run}>, s<{run}>, h<{half}>;", ".reg .pred p;",
        *(f"add.f32 h{i}, ${registers + i}, ${registers + half + i};" for i in range(half)),
        "mov.u32 rank, %cluster_ctarank;", "mov.u32 tid, %tid.x;", "mov.u32 base, exchanged;", f"add.u32 signal, base, {size};",
        f"mad.lo.u32 base, tid, {run * 4}, base;", f"mad.lo.u32 slot, rank, {threads * run * 4}, base;",
        "barrier.cluster.wait.aligned;",
    ]  # fmt: skip
    for rank in range(ranks):
        lines.append(f"mapa.shared::cluster.u32 remote, slot, {rank}; mapa.shared::cluster.u32 bar, signal, {rank};")
        for i in range(0, run, step):
            values = names("h", rank * run + i)
            store = f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{vector}.f32 [remote+{i * 4}], {values}, [bar];"
            lines.append(store if signal else f"st.shared::cluster{vector}.f32 [remote+{i * 4}], {values};")
    if signal:
        lines += ["again:", "mbarrier.try_wait.parity.shared::cta.b64 p, [signal], 0;", "@!p bra again;"]
    else:
        lines += ["barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"]
    lines += [f"mov.f32 s{i}, 0f00000000;" for i in range(run)]
    for source in range(ranks):
        offset = source * threads * run * 4
        lines += [f"ld.shared{vector}.f32 {names('t', i)}, [base+{offset + i * 4}];" for i in range(0, run, step)]
        lines += [f"add.f32 s{i}, s{i}, t{i};" for i in range(run)]
    for rank in range(ranks):
        lines.append(f"setp.eq.u32 p, rank, {rank};")
        lines += [f"selp.f32 ${rank * run + i}, s{i}, 0f00000000, p;" for i in range(run)]
    lines += [f"mov.f32 ${half + i}, 0f00000000;" for i in range(half)]
    return begin, "\n".join([*lines, "}"]), ",".join(["=&f"] * registers + ["f"] * registers)


def layouts(c: int, bn: int, bt: int, signal: bool = True) -> dict[str, object]:
    warps = bn // 16
    bits = c.bit_length() - 1
    cga, flat = [[0, 0]] * bits, [[0]] * bits
    begin, end, constraints = exchange(bt, c, 32 * warps, signal) if c > 1 else ("", "", "")
    return {
        "COPY": gl.BlockedLayout([1, 16], [4, 8], [warps, 1], [1, 0], cga_layout=cga),
        "OL": gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0], cga_layout=cga),
        "WS": gl.NVMMASharedLayout(128, 8, rank=2, cga_layout=cga),
        "FS": gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=flat),
        "mma": gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, 2 * bt, 32], cga_layout=cga),
        "ACC": gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, bt, 32], cga_layout=cga),
        "BEGIN": begin, "END": end, "CONSTRAINTS": constraints,
    }  # fmt: skip


# ---- what it costs to bring the weight into shared memory, with and without clusters -------------------------------------------
@gluon.jit
def copy_kernel(
    w, y, K: gl.constexpr, C: gl.constexpr, BN: gl.constexpr, BLOCKS: gl.constexpr, PDL: gl.constexpr, BARRIER: gl.constexpr,
    COPY: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """The loads of ``pair_kernel`` and nothing else; BARRIER adds the cluster barrier it needs."""
    rank = 0
    if C > 1:
        rank = gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], gl.int32, is_pure=True, pack=1)
        if BARRIER:
            gl.inline_asm_elementwise(
                "barrier.cluster.arrive.relaxed.aligned; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
            )
    nc = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, COPY)), 1)
    kc = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, COPY)), 0)
    w_tile = w + gl.program_id(0).to(gl.int64) * BN * K + rank * (BLOCKS * 128) + nc * K + kc
    ws = buffers(BLOCKS, gl.int8, [BN, 128], WS)
    for b in gl.static_range(BLOCKS):
        copy_async(ws[b], w_tile + b * 128)
    async_copy.commit_group()
    if PDL > 0:
        grid_launch()
        grid_wait()
    async_copy.wait_group(0)
    value = ws[0].load(COPY)
    if C > 1:  # noqa: SIM102 (compile-time branches do not combine)
        if BARRIER:
            gl.inline_asm_elementwise("barrier.cluster.wait.aligned; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
    for b in gl.static_range(1, BLOCKS):
        value = value ^ ws[b].load(COPY)
    total = gl.max(gl.max(value.to(gl.int32), 1), 0)
    gl.store(y + gl.program_id(0), total, mask=total == 0x12345678)
