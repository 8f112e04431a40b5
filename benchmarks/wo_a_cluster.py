"""A candidate for 32 and more tokens: a cluster of eight blocks splits K and adds up through distributed shared memory.

A block holds 128 columns and an eighth of K: 64 KiB of weight, in registers as it comes, and its slice of ``o`` in shared memory,
both requested at the start and used in order of arrival. A warp has 32 columns, so that ``o`` is read from shared memory half as
often as with 16. The partial sums meet over the cluster: run j of every thread's accumulators goes to block j, which adds in a
fixed order. Nothing is written to memory but the result, so there is no workspace, and the bits are always the same.

``wo_a_variants.py`` imports this and times it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from graphs.ops.hopper import _3d, _factor_after_loads, _grid_launch, _grid_wait, _widen

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # newer name, older name
BLOCKS = 8  # in a cluster
COLUMNS = 128  # of a block: one scale per 128 features


@gluon.jit
def cluster_kernel(
    o, weight, scale, y, M, N: gl.constexpr, K: gl.constexpr, stride_om, stride_og,
    C: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, OVERLAP: gl.constexpr, THREADS: gl.constexpr, REGISTERS: gl.constexpr,
    mma: gl.constexpr, A: gl.constexpr, B: gl.constexpr, SHARED: gl.constexpr, COPY: gl.constexpr,
    BEGIN: gl.constexpr, END: gl.constexpr, CONSTRAINTS: gl.constexpr, INDEX: gl.constexpr, INDEX_CONSTRAINTS: gl.constexpr,
):  # fmt: skip
    """y^T = W o^T for BN columns, BT tokens and K / C features. Grid (N tiles, G, token tiles) of clusters of C blocks."""
    SLICE: gl.constexpr = K // C
    STEPS: gl.constexpr = SLICE // 128
    if not OVERLAP:
        _grid_wait()
    gl.inline_asm_elementwise(BEGIN, "=r", [], gl.int32, is_pure=False, pack=1)
    g = gl.program_id(1)
    n0 = gl.program_id(0) * BN
    m0 = gl.program_id(2) * BT
    sa = _3d(gl.arange(0, C, gl.SliceLayout(1, gl.SliceLayout(2, A))), 1, 2)
    na = _3d(gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, A))), 0, 2)
    ka = _3d(gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A))), 0, 1)
    w_tile = weight + g.to(gl.int64) * N * K + (n0 + na) * K + sa * SLICE + ka
    sy = _3d(gl.arange(0, C, gl.SliceLayout(1, gl.SliceLayout(2, mma))), 1, 2)
    s_tile = scale + (g * (N // 128) + n0 // 128) * (K // 128) + sy * STEPS
    sc = _3d(gl.arange(0, C, gl.SliceLayout(1, gl.SliceLayout(2, COPY))), 1, 2)
    kc = _3d(gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, COPY))), 0, 1)
    mc = _3d(gl.arange(0, BT, gl.SliceLayout(0, gl.SliceLayout(2, COPY))), 0, 2)
    o_tile = o + g.to(gl.int64) * stride_og + (m0 + mc) * stride_om + sc * SLICE + kc
    live = (m0 + mc < M) & (kc < 64) & (sc < C)
    ws = ()
    for c in gl.static_range(2 * STEPS):
        ws = ws + (gl.load(w_tile + c * 64),)  # noqa: RUF005 (Triton has no starred tuples)
    ss = ()
    for b in gl.static_range(STEPS):
        ss = ss + (gl.load(s_tile + b),)  # noqa: RUF005
    _grid_launch()
    if OVERLAP:
        _grid_wait()
    xs = ()  # an allocation each: within one the compiler puts a barrier between any two copies
    for c in gl.static_range(2 * STEPS):
        xs = xs + (gl.allocate_shared_memory(gl.bfloat16, [C, BT, 64], SHARED),)  # noqa: RUF005
        copy_async(xs[c], o_tile + c * 64, mask=live)
        if c % 2 == 1:
            async_copy.commit_group()
    factor = gl.full([C, BN, 64], 0, gl.int32, A) + _factor_after_loads(THREADS)
    acc = gl.zeros([C, BN, BT], gl.float32, mma)
    for b in gl.static_range(STEPS):
        async_copy.wait_group(STEPS - 1 - b)
        part = gl.zeros([C, BN, BT], gl.float32, mma)
        for half in gl.static_range(2):
            xb = xs[2 * b + half].permute([0, 2, 1]).load(B)
            part = mma_v2(_widen(ws[2 * b + half], factor), xb, part)
        acc += part * ss[b]
    total = gl.inline_asm_elementwise(END, CONSTRAINTS, [acc], gl.float32, is_pure=False, pack=REGISTERS)
    register = gl.inline_asm_elementwise(INDEX, INDEX_CONSTRAINTS, [acc], gl.int32, is_pure=True, pack=REGISTERS)
    nn = _3d(gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, mma))), 0, 2)
    tt = _3d(gl.arange(0, BT, gl.SliceLayout(0, gl.SliceLayout(1, mma))), 0, 1)
    mine = (register // (REGISTERS // C) == sy) & (m0 + tt < M)
    gl.store(y + ((m0 + tt) * gl.num_programs(1) + g) * N + n0 + nn + sy * 0, total.to(gl.bfloat16), mask=mine)


def exchange(registers: int, ranks: int, threads: int, signal: bool) -> dict[str, str]:
    """PTX that sums accumulators over a cluster: what to do first and last, the operands of the latter, the number of a register.

    A thread has ``ranks`` runs of ``registers``; run j of every thread of every block goes to block j, which adds them in the
    order of the blocks. The sums stand in run j of block j, every other register becomes zero. With ``signal`` data and the news
    of it travel together (``st.async``), and no block leaves before all of its data has come, so nobody writes to a block that is
    gone; without, plain stores and a cluster barrier, which fences all memory. The barrier at the start is for both: nobody may
    write to a block that is not there yet.
    """
    run = registers // ranks
    step = min(run, 4)
    vector = {1: "", 2: ".v2", 4: ".v4"}[step]
    size = registers * threads * 4

    def names(prefix: str, first: int) -> str:
        joined = ", ".join(f"{prefix}{first + i}" for i in range(step))
        return "{" + joined + "}" if step > 1 else joined

    expect = f"""@p mbarrier.init.shared::cta.b64 [base+{size}], 1;
@p fence.mbarrier_init.release.cluster;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [base+{size}], {size};"""
    begin = f""".shared .align 16 .b8 exchanged[{size + 16}];
{{ .reg .pred p; .reg .b32 tid, base;
mov.u32 tid, %tid.x; mov.u32 base, exchanged; setp.eq.u32 p, tid, 0;
{expect if signal else ""}
barrier.cluster.arrive.relaxed.aligned;
mov.b32 $0, 0; }}"""
    lines = [
        "{ .reg .b32 rank, tid, base, slot, signal, remote, bar;", f".reg .f32 t<{run}>, s<{run}>;", ".reg .pred p;",
        "mov.u32 rank, %cluster_ctarank;", "mov.u32 tid, %tid.x;", "mov.u32 base, exchanged;", f"add.u32 signal, base, {size};",
        f"mad.lo.u32 base, tid, {run * 4}, base;", f"mad.lo.u32 slot, rank, {threads * run * 4}, base;",
        "barrier.cluster.wait.aligned;",
    ]  # fmt: skip
    for rank in range(ranks):
        lines.append(f"mapa.shared::cluster.u32 remote, slot, {rank}; mapa.shared::cluster.u32 bar, signal, {rank};")
        for i in range(0, run, step):
            values = names("$", registers + rank * run + i)
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
    return {
        "BEGIN": begin,
        "END": "\n".join([*lines, "}"]),
        "CONSTRAINTS": ",".join(["=&f"] * registers + ["f"] * registers),
        "INDEX": " ".join(f"mov.b32 ${i}, {i};" for i in range(registers)),
        "INDEX_CONSTRAINTS": ",".join(["=r"] * registers + ["f"] * registers),
    }


def layouts(tokens: int, column_warps: int, token_warps: int, signal: bool) -> dict[str, object]:
    """Constants of :func:`cluster_kernel` for ``tokens`` per block and this arrangement of warps."""
    cga = [[1 << i, 0, 0] for i in range(BLOCKS.bit_length() - 1)]
    mma = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, column_warps, token_warps], instr_shape=[1, 16, 8], cga_layout=cga
    )
    threads = 32 * column_warps * token_warps
    registers = COLUMNS * tokens // threads
    return {
        "C": BLOCKS, "BN": COLUMNS, "BT": tokens, "THREADS": threads, "REGISTERS": registers,
        "mma": mma, "A": gl.DotOperandLayout(0, mma, 16), "B": gl.DotOperandLayout(1, mma, 16),
        "SHARED": gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0], cga_layout=cga),
        "COPY": gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, column_warps * token_warps, 1], [2, 1, 0], cga_layout=cga),
        **exchange(registers, BLOCKS, threads, signal),
    }  # fmt: skip
