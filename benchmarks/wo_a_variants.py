"""Candidate kernels for the fused path, timed against the library GEMM and the cost of only reading the weight.

``PYTHONPATH=. python3 benchmarks/wo_a_variants.py`` prints one table: microseconds per operator inside one CUDA graph of 32
layers (16 for G > 2), each with its own weight, so that the weight comes from memory and not from L2. A variant is timed only
after its result agreed with float64, in a buffer filled with NaN beforehand; after timing, its results must be the same bits.
``--quick`` takes G = 2 only, ``--only NAME`` the variants whose name contains NAME, ``--compile`` compiles all of them for
sm_90 on a machine without a GPU and prints registers and instruction counts.

The candidates are written in Gluon: what matters here is which thread loads which byte, and that is what it lets one say.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from graphs.ops import kernels, offline, reference, tiles

N, K = 1024, 4096
H200 = tiles.Arch("cuda", 9, 0)
compile_only = False  # set by --compile


# ---- pieces -------------------------------------------------------------------------------------------------------------------
@gluon.jit
def _3d(x, a: gl.constexpr, b: gl.constexpr):
    return gl.expand_dims(gl.expand_dims(x, a), b)


@gluon.jit
def _grid_wait():
    """Wait until the kernel before this one has finished and its writes are visible."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _grid_launch():
    """Allow the next kernel's blocks to start."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _cluster_arrive():
    gl.inline_asm_elementwise("barrier.cluster.arrive.relaxed.aligned; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _factor_after_loads(THREADS: gl.constexpr):
    """The bits of two bfloat16 2**120, known only after a block barrier.

    ptxas moves loads down to their use to save registers, which leaves four of a thread's sixteen loads in flight. It cannot
    move them across a barrier, and the conversions below cannot move up because they need this value.
    """
    count = gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; bar.red.popc.u32 $0, 0, p; }", "=r", [], gl.int32, is_pure=False, pack=1
    )
    return count + (0x7B807B80 - THREADS)


@gluon.jit
def _widen(w, factor, HOW: gl.constexpr):
    """e4m3 bytes (int8) to bfloat16, exact.

    ``bits``: the seven bits below the sign, moved to where bfloat16 has its exponent and mantissa, are the value times 2**-120
    (subnormals too), so one multiplication finishes. ``float``: the conversions of the compiler, by way of float32; the direct
    one is a quarter-rate instruction. ``none``: wrong on purpose, to see what conversion costs.
    """
    if HOW == "float":
        after = gl.inline_asm_elementwise(
            "{ .reg .b32 a; xor.b32 a, $2, 0x7B807B80; xor.b32 $0, $1, a; }",
            "=r,r,r,r,r,r", [w, factor], gl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        return after.to(gl.float8e4nv, bitcast=True).to(gl.float32).to(gl.bfloat16)
    if HOW == "none":
        return gl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x1404; prmt.b32 $1, $2, $3, 0x3424;",
            "=&r,=&r,r,r,r,r,r", [w, factor], gl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
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


# ---- candidate 1: 16 columns per block, K split over its warps, everything straight into registers ---------------------------
@gluon.jit
def registers_kernel(
    o, w, scale, y, M, N: gl.constexpr, K: gl.constexpr, stride_om, stride_og,
    SPLIT: gl.constexpr, BT: gl.constexpr, HOW: gl.constexpr, PDL: gl.constexpr,
    mma: gl.constexpr, A: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """y^T = W o^T: the weight is the left operand, tokens are the eight columns of the instruction.

    Fragments are loaded as the instruction wants them (16 contiguous bytes per lane: the order of k is free as long as both
    operands share it), so there is no shared memory before the reduction over the SPLIT warps.
    """
    SLICE: gl.constexpr = K // SPLIT
    BLOCKS: gl.constexpr = SLICE // 128
    if PDL == 2:
        _grid_wait()
    g = gl.program_id(1)
    n0 = gl.program_id(0) * 16
    sa = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, A))), 1, 2)
    na = _3d(gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, A))), 0, 2)
    ka = _3d(gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, A))), 0, 1)
    w_tile = w + (g * N + n0 + na) * K + sa * SLICE + ka
    sc = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, mma))), 1, 2)
    s_tile = scale + (g * (N // 128) + n0 // 128) * (K // 128) + sc * BLOCKS
    sb = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, B))), 1, 2)
    kb = _3d(gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, B))), 0, 2)
    mb = _3d(gl.arange(0, BT, gl.SliceLayout(0, gl.SliceLayout(1, B))), 0, 1)
    o_tile = o + mb * stride_om + g * stride_og + sb * SLICE + kb
    ws = ()
    for b in gl.static_range(BLOCKS):
        ws = ws + (gl.load(w_tile + b * 128),)  # noqa: RUF005 (Triton has no starred tuples)
    ss = ()
    for b in gl.static_range(BLOCKS):
        ss = ss + (gl.load(s_tile + b),)  # noqa: RUF005
    if PDL > 0:
        _grid_launch()
    if PDL == 1:
        _grid_wait()
    xs = ()
    for b in gl.static_range(BLOCKS):
        xs = xs + (gl.load(o_tile + b * 128, mask=mb < M, other=0.0),)  # noqa: RUF005
    factor = gl.full([SPLIT, 16, 128], 0, gl.int32, A) + _factor_after_loads(SPLIT * 32)
    acc = gl.zeros([SPLIT, 16, BT], gl.float32, mma)
    for b in gl.static_range(BLOCKS):
        part = mma_v2(_widen(ws[b], factor, HOW), xs[b], gl.zeros([SPLIT, 16, BT], gl.float32, mma))
        acc += part * ss[b]
    out = gl.sum(acc, 0)
    L: gl.constexpr = gl.SliceLayout(0, mma)
    nn = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, L)), 1)
    mm = gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(0, L)), 0)
    gl.store(y + (mm * gl.num_programs(1) + g) * N + n0 + nn, out.to(gl.bfloat16), mask=mm < M)


# ---- candidate 2: a cluster of blocks splits K and adds up through distributed shared memory -----------------------------------
def _exchange(registers: int, ranks: int, warps_k: int, threads: int) -> tuple[str, str]:
    """PTX that reduces accumulators over a cluster, and its operand constraints.

    A thread's ``registers`` accumulators fall into ``ranks`` equal runs; run j of every thread of every block goes to block j,
    which adds what came from all blocks (and from the ``warps_k`` groups of warps that split K inside a block) in a fixed
    order. The sum stands in the registers of run j of block j; every other register becomes zero.
    """
    run = registers // ranks
    vector = {1: "", 2: ".v2", 4: ".v4", 8: ".v4"}[run]
    step = min(run, 4)

    def names(prefix: str, first: int) -> str:
        joined = ", ".join(f"{prefix}{first + i}" for i in range(step))
        return "{" + joined + "}" if step > 1 else joined

    lines = [
        "{ .reg .b32 rank, tid, base, slot, remote;", f".reg .f32 t<{run}>, s<{run}>;", ".reg .pred p;",
        f".shared .align 16 .b8 exchanged[{ranks * threads * run * 4}];",
        "mov.u32 rank, %cluster_ctarank;", "mov.u32 tid, %tid.x;", "mov.u32 base, exchanged;",
        f"mad.lo.u32 slot, tid, {run * 4}, base;", f"mad.lo.u32 slot, rank, {threads * run * 4}, slot;",
        f"and.b32 tid, tid, {threads // warps_k - 1};", f"mad.lo.u32 base, tid, {run * 4}, base;",
        "barrier.cluster.wait.aligned;",
    ]  # fmt: skip
    for rank in range(ranks):
        lines.append(f"mapa.shared::cluster.u32 remote, slot, {rank};")
        for i in range(0, run, step):
            lines.append(f"st.shared::cluster{vector}.f32 [remote+{i * 4}], {names('$', registers + rank * run + i)};")
    lines += ["barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"]
    lines += [f"mov.f32 s{i}, 0f00000000;" for i in range(run)]
    for source in range(ranks * warps_k):
        offset = (source // warps_k * threads + source % warps_k * (threads // warps_k)) * run * 4
        lines += [f"ld.shared{vector}.f32 {names('t', i)}, [base+{offset + i * 4}];" for i in range(0, run, step)]
        lines += [f"add.f32 s{i}, s{i}, t{i};" for i in range(run)]
    for rank in range(ranks):
        lines.append(f"setp.eq.u32 p, rank, {rank};")
        lines += [f"selp.f32 ${rank * run + i}, s{i}, 0f00000000, p;" for i in range(run)]
    return "\n".join([*lines, "}"]), ",".join(["=f"] * registers + ["f"] * registers)


@gluon.jit
def cluster_kernel(
    o, w, scale, y, M, N: gl.constexpr, K: gl.constexpr, stride_om, stride_og,
    C: gl.constexpr, WK: gl.constexpr, WN: gl.constexpr, BT: gl.constexpr, HOW: gl.constexpr, PDL: gl.constexpr,
    mma: gl.constexpr, A: gl.constexpr, B: gl.constexpr, SHARED: gl.constexpr, COPY: gl.constexpr,
    ASM: gl.constexpr, CONSTRAINTS: gl.constexpr,
):  # fmt: skip
    """C blocks times WK groups of warps split K; a block holds 16 * WN columns and only its slice of o, in shared memory."""
    SPLIT: gl.constexpr = C * WK
    BN: gl.constexpr = 16 * WN
    SLICE: gl.constexpr = K // SPLIT
    CHUNKS: gl.constexpr = SLICE // 64
    RUN: gl.constexpr = BT // 2 // C
    if PDL == 2:
        _grid_wait()
    _cluster_arrive()
    g = gl.program_id(1)
    n0 = gl.program_id(0) * BN
    sa = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, A))), 1, 2)
    na = _3d(gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, A))), 0, 2)
    ka = _3d(gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A))), 0, 1)
    w_tile = w + (g * N + n0 + na) * K + sa * SLICE + ka
    sy = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, mma))), 1, 2)
    s_tile = scale + (g * (N // 128) + n0 // 128) * (K // 128) + sy * (SLICE // 128)
    sc = _3d(gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, COPY))), 1, 2)
    kc = _3d(gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, COPY))), 0, 1)
    mc = _3d(gl.arange(0, BT, gl.SliceLayout(0, gl.SliceLayout(2, COPY))), 0, 2)
    o_tile = o + mc * stride_om + g * stride_og + sc * SLICE + kc
    live = (mc < M) & (kc < 64) & (sc < SPLIT)
    ws = ()
    for c in gl.static_range(CHUNKS):
        ws = ws + (gl.load(w_tile + c * 64),)  # noqa: RUF005
    ss = ()
    for b in gl.static_range(CHUNKS // 2):
        ss = ss + (gl.load(s_tile + b),)  # noqa: RUF005
    if PDL > 0:
        _grid_launch()
    if PDL == 1:
        _grid_wait()
    x = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, SPLIT, BT, 64], SHARED)
    for c in gl.static_range(CHUNKS):
        async_copy.async_copy_global_to_shared(x.index(c), o_tile + c * 64, mask=live)
    async_copy.commit_group()
    async_copy.wait_group(0)
    factor = gl.full([SPLIT, BN, 64], 0, gl.int32, A) + _factor_after_loads(WK * WN * 32)
    acc = gl.zeros([SPLIT, BN, BT], gl.float32, mma)
    for b in gl.static_range(CHUNKS // 2):
        part = gl.zeros([SPLIT, BN, BT], gl.float32, mma)
        for half in gl.static_range(2):
            xb = x.index(2 * b + half).permute([0, 2, 1]).load(B)
            part = mma_v2(_widen(ws[2 * b + half], factor, HOW), xb, part)
        acc += part * ss[b]
    out = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [acc], gl.float32, is_pure=False, pack=BT // 2)
    nn = _3d(gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, mma))), 0, 2)
    tt = _3d(gl.arange(0, BT, gl.SliceLayout(0, gl.SliceLayout(1, mma))), 0, 1)
    owner = ((tt // 8) * 4 + ((nn % 16) // 8) * 2 + tt % 2) // RUN  # the run its register belongs to
    mine = (sy == owner * WK) & (tt < M)
    gl.store(y + (tt * gl.num_programs(1) + g) * N + n0 + nn + sy * 0, out.to(gl.bfloat16), mask=mine)


def _registers_layouts(split: int) -> dict[str, object]:
    mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[split, 1, 1], instr_shape=[1, 16, 8])
    return {"mma": mma, "A": gl.DotOperandLayout(0, mma, 16), "B": gl.DotOperandLayout(1, mma, 16)}


def _cluster_layouts(c: int, wk: int, wn: int, bt: int) -> dict[str, object]:
    cga = [[1 << i, 0, 0] for i in range(c.bit_length() - 1)]
    mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[wk, wn, 1], instr_shape=[1, 16, 8], cga_layout=cga)
    asm, constraints = _exchange(bt // 2, c, wk, 32 * wk * wn)
    return {
        "mma": mma, "A": gl.DotOperandLayout(0, mma, 16), "B": gl.DotOperandLayout(1, mma, 16),
        "SHARED": gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0], cga_layout=cga),
        "COPY": gl.BlockedLayout([1, 1, 8], [1, 4, 8], [wk, wn, 1], [2, 1, 0], cga_layout=cga),
        "ASM": asm, "CONSTRAINTS": constraints,
    }  # fmt: skip


# ---- floors and baselines -----------------------------------------------------------------------------------------------------
@triton.jit
def read_kernel(w, y, SIZE: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr):
    """Read SIZE bytes per program and do nothing with them: the floor of every kernel that must read this weight once."""
    x = tl.load(w + tl.program_id(0).to(tl.int64) * (SIZE // 4) + tl.arange(0, SIZE // 4))
    if PDL:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
    arrived = tl.inline_asm_elementwise(  # as in _factor_after_loads: every load is in flight before the first is used
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; bar.red.popc.u32 $0, 0, p; }", "=r", [], tl.int32, is_pure=False, pack=1
    )
    total = tl.sum(x ^ (arrived - THREADS), 0)
    tl.store(y + tl.program_id(0), total, mask=total == 0x12345678)


@dataclass
class Layer:
    """One layer's operands: activations, FP8 weight and scales, the same weight in bfloat16, and the result buffer."""

    o: torch.Tensor
    w: torch.Tensor
    scale: torch.Tensor
    wide: torch.Tensor
    y: torch.Tensor


Run = Callable[[Layer], None]


def launch(kernel: triton.runtime.JITFunction, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Launch, or (for ``--compile``) only compile and print what the kernel takes."""
    if not compile_only:
        kernel[grid](*arguments, **options)
        return
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    registers_used, spills = offline.nvidia_registers(compiled.asm["cubin"])
    print(f"{registers_used:3} registers, {spills} bytes of stack, {compiled.metadata.shared} bytes shared")


def read(layer: Layer, wide: bool = False, pdl: bool = False, size: int = 65536) -> None:
    data = (layer.wide if wide else layer.w).view(torch.int32)
    warps = size // 8192
    grid = (data.numel() * 4 // size,)
    launch(read_kernel, grid, data, layer.y.view(torch.int32), size, warps * 32, pdl, num_warps=warps, launch_pdl=pdl)


def einsum(layer: Layer) -> None:
    torch.bmm(layer.o.transpose(0, 1), layer.wide.transpose(1, 2), out=layer.y.transpose(0, 1))


def generic(layer: Layer) -> None:
    m, g, _ = layer.o.shape
    kernels.launch_fused(layer.o, layer.w, layer.scale, layer.y, tiles.fused(m, g, N, K, H200))


def operands(layer: Layer) -> tuple[object, ...]:
    m, _, k = layer.o.shape
    return layer.o, layer.w.view(torch.int8), layer.scale, layer.y, m, N, k, layer.o.stride(0), layer.o.stride(1)


def registers(layer: Layer, bt: int, split: int = 8, how: str = "bits", pdl: int = 0, **options: int) -> None:
    g = layer.o.shape[1]
    launch(
        registers_kernel, (N // 16, g), *operands(layer),
        split, bt, how, pdl, **_registers_layouts(split), num_warps=split, launch_pdl=pdl > 0, **options,
    )  # fmt: skip


def cluster(layer: Layer, bt: int, c: int = 8, wk: int = 1, wn: int = 8, how: str = "bits", pdl: int = 0, **options: int) -> None:
    g = layer.o.shape[1]
    launch(
        cluster_kernel, (N // (16 * wn), g), *operands(layer),
        c, wk, wn, bt, how, pdl, **_cluster_layouts(c, wk, wn, bt), num_warps=wk * wn, num_ctas=c, launch_pdl=pdl > 0, **options,
    )  # fmt: skip


FLOORS = ("read fp8", "read fp8 16 KiB")  # the better of the two is the floor


@dataclass(frozen=True)
class Variant:
    """``exact`` is False for what does not compute the product: floors, and kernels with a piece left out."""

    name: str
    run: Run
    exact: bool = True


def variants(m: int) -> Iterator[Variant]:
    """The candidates for ``m`` tokens, baselines first."""
    yield Variant("einsum bf16", einsum)
    yield Variant("read fp8", read, False)
    yield Variant("read fp8 16 KiB", partial(read, size=16384), False)
    yield Variant("read fp8 pdl", partial(read, pdl=True), False)
    yield Variant("read bf16", partial(read, wide=True), False)
    yield Variant("generic", generic)
    if m <= 16:
        bt = 8 if m <= 8 else 16
        make = partial(registers, bt=bt)
        yield Variant("registers", make)
        yield Variant("registers float", partial(make, how="float"))
        yield Variant("registers none", partial(make, how="none"), False)
        yield Variant("registers 16 warps", partial(make, split=16))
        yield Variant("registers pdl wait first", partial(make, pdl=2))
        yield Variant("registers pdl", partial(make, pdl=1))
        if bt == 8:
            yield Variant("registers pdl 128 regs", partial(make, pdl=1, maxnreg=128))
            yield Variant("registers 128 regs", partial(make, maxnreg=128))
    small = (8, 16) if m <= 8 else (16,) if m <= 16 else ()
    for bt in small:  # four blocks, two groups of warps each: 64 columns per block
        make = partial(cluster, bt=bt, c=4, wk=2, wn=4)
        yield Variant(f"cluster 4 t{bt}", make)
        yield Variant(f"cluster 4 t{bt} pdl", partial(make, pdl=1))
    bt = 16 if m <= 16 else 32 if m <= 32 else 64
    make = partial(cluster, bt=bt)
    yield Variant("cluster 8", make)
    yield Variant("cluster 8 float", partial(make, how="float"))
    yield Variant("cluster 8 none", partial(make, how="none"), False)
    yield Variant("cluster 8 pdl wait first", partial(make, pdl=2))
    yield Variant("cluster 8 pdl", partial(make, pdl=1))


# ---- measuring ----------------------------------------------------------------------------------------------------------------
def make_layers(m: int, g: int, count: int) -> list[Layer]:
    """Random operands: FP8 values of every magnitude, float32 scales that are no powers of two."""
    layers = []
    for seed in range(count):
        generator = torch.Generator("cuda").manual_seed(seed)
        bits = torch.randint(0, 256, (g, N, K), dtype=torch.uint8, device="cuda", generator=generator)
        bits[(bits & 0x7F) >= 0x70] &= 0x8F  # no NaN, and the largest values do not drown the others
        w = bits.view(torch.float8_e4m3fn)
        scale = torch.rand(g, N // 128, K // 128, device="cuda", generator=generator) * 0.01 + 0.001
        o = torch.randn(m, g, K, device="cuda", generator=generator).bfloat16()
        wide = (w.float() * reference.expand_blocks(scale)).bfloat16()
        layers.append(Layer(o, w, scale, wide, torch.empty(m, g, N, dtype=torch.bfloat16, device="cuda")))
    return layers


def error(layer: Layer, run: Run) -> float:
    """Relative Frobenius error of one call against float64 on the dequantised weight; every output starts as NaN."""
    layer.y.fill_(float("nan"))
    run(layer)
    weight = layer.w.double() * reference.expand_blocks(layer.scale.double())
    return reference.relative_error(layer.y, reference.project_fp64(layer.o, weight))


def graph_time(layers: list[Layer], run: Run, exact: bool, replays: int) -> tuple[float, float]:
    """Median and interquartile range of microseconds per operator in one graph over all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(layers[0])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for layer in layers:
            run(layer)
    first = None
    for _ in range(3):
        for layer in layers:
            layer.y.fill_(float("nan"))
        graph.replay()
        results = [layer.y.clone() for layer in layers]
        same = first is None or all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
        assert not exact or (same and all(r.isfinite().all() for r in results)), (
            "a replay changed bits or left an output unwritten"
        )
        first = results
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(layers))
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def measure(cases: list[tuple[int, int]], only: str, replays: int) -> dict[str, dict[tuple[int, int], str]]:
    """The table: variant -> (G, M) -> text."""
    table: dict[str, dict[tuple[int, int], str]] = {}
    for g, m in cases:
        layers = make_layers(m, g, 32 if g == 2 else 16)
        base = floor = float("inf")
        for variant in variants(m):
            if only not in variant.name and variant.name not in ("einsum bf16", *FLOORS):
                continue
            row = table.setdefault(variant.name, {})
            try:
                wrong = error(layers[1], variant.run) if variant.exact else 0.0
                if not wrong <= 0.004:
                    row[g, m] = f"WRONG {wrong:.3g}"
                    continue
                median, spread = graph_time(layers, variant.run, variant.exact, replays)
            except Exception as e:  # a candidate that does not run must not hide the others
                row[g, m] = f"{type(e).__name__}"
                print(f"{variant.name} G={g} M={m}: {type(e).__name__}: {str(e)[:500]}", file=sys.stderr, flush=True)
                continue
            base = median if variant.name == "einsum bf16" else base
            floor = min(median, floor) if variant.name in FLOORS else floor
            row[g, m] = f"{median:5.2f}±{spread:.2f} {median / base:4.2f}e {median / floor:4.2f}f"
            print(f"G={g} M={m:3} {variant.name:26} {row[g, m]}  error {wrong:.5f}", flush=True)
        del layers
        torch.cuda.empty_cache()
    return table


class NoDevice:
    """What Triton asks of a driver before it compiles; nothing can be launched with it."""

    def get_current_target(self) -> object:
        """The chip to compile for."""
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """There is only this one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


def compile_all() -> None:
    """Compile every variant for sm_90 without a device."""
    triton.runtime.driver.set_active(NoDevice())
    w = torch.zeros(2, N, K, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for m in (1, 16, 64):
        o, y = torch.zeros(m, 2, K).bfloat16(), torch.zeros(m, 2, N).bfloat16()
        layer = Layer(o, w, torch.ones(2, N // 128, K // 128), w.bfloat16(), y)
        for variant in variants(m):
            if variant.run not in (einsum, generic):
                print(f"M={m:3} {variant.name:26} ", end="", flush=True)
                variant.run(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--replays", type=int, default=31)
    options = parser.parse_args()
    if options.compile:
        global compile_only
        compile_only = True
        compile_all()
        return
    cases = [(2, 1), (2, 4), (2, 16), (2, 64)] + ([] if options.quick else [(8, 4), (16, 1), (16, 16)])
    table = measure(cases, options.only, options.replays)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; us ± quartile range, ")
    print("e: over einsum, f: over the FP8 read floor of the same run")
    print(f"{'':26}" + "".join(f"{f'G={g} M={m}':>26}" for g, m in cases))
    for name, row in table.items():
        print(f"{name:26}" + "".join(f"{row.get(case, ''):>26}" for case in cases))


if __name__ == "__main__":
    main()
