"""Candidate kernels for the projection, timed against the library GEMM and the cost of only reading the weight.

``PYTHONPATH=. python3 benchmarks/wo_a_variants.py`` prints one table: microseconds per operator inside one CUDA graph of 32
layers (16 for G > 2), each with its own weight, so that the weight comes from memory and not from L2. A variant is timed only
after its result agreed with float64, in a buffer filled with NaN beforehand; after timing, its results must be the same bits.
``--cases 2:1,2:64`` takes these G:M, ``--suite`` one group of variants, ``--only NAME`` the variants whose name contains NAME,
``--compile`` compiles all of them for sm_90 on a machine without a GPU and prints what they take. ``--powers`` has scales that
are powers of two, as checkpoints have them, and the variants that put them into the widened weight.

``pdl`` in a name: programmatic launch, the weight is requested before the kernel in front has finished; ``early``: programmatic
launch, but everything waits for that kernel. Without either, kernels follow each other as usual.
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

from graphs.ops import offline
from graphs.ops.wo_a import reference, tiles
from graphs.ops.wo_a.kernels import hopper, portable, split_k, warpgroup

N, K = 1024, 4096
H200 = tiles.Arch("cuda", 9, 0)
compile_only = False  # set by --compile


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


def generic(layer: Layer, tile: tiles.Tile | None = None, pdl: bool = False) -> None:
    m, g, _ = layer.o.shape
    portable.launch_fused(layer.o, layer.w, layer.scale, layer.y, tile or tiles.fused(m, g, N, K, H200), overlap=pdl)


def split(layer: Layer, tile: tiles.Tile, pdl: bool = False, bmm: bool = False) -> None:
    scale = layer.scale.flatten()[:1] if bmm else layer.scale
    split_k.launch_split(layer.o, layer.w, scale, layer.y, tile, fp8=bmm, overlap=pdl)


def quantised(layer: Layer, path: str, tile: tiles.Tile | None = None, overlap: bool = True) -> None:
    m, g, _ = layer.o.shape
    tile = tile or tiles.quantised_gemm(path, m, g if path == "bmm" else 1, N, K, H200)
    if path == "bmm":
        portable.launch_bmm(layer.o, layer.w, layer.scale.flatten()[:1], layer.y, tile)
    else:
        portable.launch_gloop(layer.o, layer.w, layer.scale, layer.y, tile, overlap)


def registers(layer: Layer, overlap: bool) -> None:
    hopper.launch_registers(layer.o, layer.w, layer.scale, layer.y, overlap)


def over_cluster(layer: Layer, shape: tiles.Cluster, powers: bool = False) -> None:
    warpgroup.launch_warpgroup(layer.o, layer.w, layer.scale, layer.y, shape, powers=powers)


FLOORS = ("read fp8", "read fp8 16 KiB")  # the better of the two is the floor


@dataclass(frozen=True)
class Variant:
    """``exact`` is False for what does not compute the product: floors, and kernels with a piece left out."""

    name: str
    run: Run
    exact: bool = True


def variants(g: int, m: int, powers: bool = False) -> Iterator[Variant]:
    """The candidates for ``m`` tokens of ``g`` groups, baselines first. The first word of a name is its suite.

    Args:
        powers: with those for scales that are powers of two.
    """
    yield Variant("einsum bf16", einsum)
    yield Variant("read fp8", read, False)
    yield Variant("read fp8 16 KiB", partial(read, size=16384), False)
    yield Variant("read fp8 pdl", partial(read, pdl=True), False)
    if m <= 16 and g <= 4:
        yield Variant("registers early", partial(registers, overlap=False))
        yield Variant("registers pdl", partial(registers, overlap=True))
    for n, warps, stages in SPLIT if m <= 16 else SPLIT_64 if m <= 64 else ():
        tile = tiles.Tile(max(8, triton.next_power_of_2(m)), n, warps, stages)
        yield Variant(f"split n{n} w{warps} s{stages}", partial(split, tile=tile))
        yield Variant(f"split n{n} w{warps} s{stages} pdl", partial(split, tile=tile, pdl=True))
    for tokens, columns, cluster, slots in WARPGROUP.get((g, m), MANY_TOKENS if m >= 256 else ()):
        name, shape = f"warpgroup t{tokens} n{columns} c{cluster} s{slots}", tiles.Cluster(tokens, columns, cluster, slots)
        if tokens <= 128:  # the sums of 256 do not fit in registers twice
            yield Variant(name, partial(over_cluster, shape=shape))
        if powers:
            yield Variant(f"{name} powers", partial(over_cluster, shape=shape, powers=True))
    yield Variant("generic", generic)
    yield Variant("generic pdl", partial(generic, pdl=True))
    for n, warps, stages in GENERIC[m <= 16]:
        tile = tiles.Tile(16 if m <= 16 else min(m, 64), n, warps, stages)
        yield Variant(f"generic n{n} w{warps} s{stages} pdl", partial(generic, tile=tile, pdl=True))
    yield from quantised_variants(m)


def quantised_variants(m: int) -> Iterator[Variant]:
    """``bmm`` and ``gloop``."""
    for path in ("bmm", "gloop"):
        yield Variant(path, partial(quantised, path=path), False)
        for rows, n, warps, stages in QUANTISED[16 if m <= 16 else 64 if m <= 64 else 256]:
            tile = tiles.Tile(rows, n, warps, stages)
            yield Variant(f"{path} m{rows} n{n} w{warps} s{stages}", partial(quantised, path=path, tile=tile), False)
    yield Variant("gloop one group after another", partial(quantised, path="gloop", overlap=False), False)
    for n, warps, stages in SPLIT if m <= 16 else ():
        tile = tiles.Tile(max(8, triton.next_power_of_2(m)), n, warps, stages)
        yield Variant(f"bmm split n{n} w{warps} s{stages} pdl", partial(split, tile=tile, pdl=True, bmm=True), False)


WARPGROUP = {  # G, M -> tokens and columns of a block, blocks of a cluster, steps of 128 features in shared memory
    (2, 16): ((16, 64, 4, 8), (16, 64, 4, 5), (16, 64, 8, 4)),
    (2, 64): ((64, 64, 4, 8), (64, 64, 4, 4), (64, 64, 4, 3), (64, 64, 8, 3), (32, 64, 4, 3), (64, 128, 4, 6)),
    (1, 16): ((16, 64, 8, 4), (16, 64, 4, 5)),
    (1, 64): ((64, 64, 8, 3), (64, 64, 4, 4)),
    (1, 256): ((64, 64, 4, 4), (64, 64, 8, 3), (128, 64, 4, 4), (128, 64, 8, 4)),
    (2, 256): ((64, 128, 2, 6), (64, 64, 2, 4), (64, 64, 1, 4), (128, 64, 2, 4), (128, 64, 4, 4), (256, 64, 4, 3)),
    (8, 16): ((16, 128, 2, 5), (16, 64, 1, 8), (16, 64, 2, 5)),
    (8, 64): ((64, 128, 2, 6), (64, 64, 1, 8), (64, 64, 2, 4)),
    (16, 16): ((16, 128, 1, 5), (16, 64, 1, 8), (16, 64, 1, 5)),
    (16, 64): ((64, 128, 1, 6), (64, 64, 1, 4)),
}
MANY_TOKENS = ((64, 64, 1, 4), (64, 128, 1, 4), (128, 64, 1, 4), (128, 128, 1, 4), (128, 128, 1, 3), (256, 64, 1, 3))
SPLIT = ((16, 4, 3), (16, 4, 4), (32, 4, 2), (32, 4, 3), (64, 4, 3))
SPLIT_64 = ((16, 4, 2), (32, 4, 2), (32, 4, 3))
GENERIC = {
    True: ((32, 4, 4), (64, 4, 4), (64, 4, 6)),
    False: ((32, 4, 4), (64, 4, 4)),
}
QUANTISED = {
    16: ((16, 16, 4, 4), (16, 32, 4, 4), (16, 64, 4, 4)),
    64: ((16, 64, 4, 6), (64, 32, 4, 4), (64, 64, 4, 4), (64, 128, 4, 4)),
    256: ((64, 64, 4, 4), (64, 128, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3), (64, 256, 8, 3), (64, 256, 8, 2)),
}


# ---- measuring ----------------------------------------------------------------------------------------------------------------
def make_layers(m: int, g: int, count: int, powers: bool = False) -> list[Layer]:
    """Random operands: FP8 values of every magnitude, float32 scales that are no powers of two, or with ``powers`` are."""
    layers = []
    for seed in range(count):
        generator = torch.Generator("cuda").manual_seed(seed)
        bits = torch.randint(0, 256, (g, N, K), dtype=torch.uint8, device="cuda", generator=generator)
        bits[(bits & 0x7F) >= 0x70] &= 0x8F  # no NaN, and the largest values do not drown the others
        w = bits.view(torch.float8_e4m3fn)
        scale = torch.rand(g, N // 128, K // 128, device="cuda", generator=generator) * 0.01 + 0.001
        scale = torch.exp2(scale.log2().floor()) if powers else scale
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


def measure(
    cases: list[tuple[int, int]], suites: list[str], only: str, replays: int, powers: bool
) -> dict[str, dict[tuple[int, int], str]]:
    """The table: variant -> (G, M) -> text."""
    table: dict[str, dict[tuple[int, int], str]] = {}
    for g, m in cases:
        layers = make_layers(m, g, 32 if g <= 2 else 16, powers)
        base = floor = float("inf")
        for variant in variants(g, m, powers):
            wanted = only in variant.name and (not suites or variant.name.split()[0] in suites)
            if not wanted and variant.name not in ("einsum bf16", *FLOORS):
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
    for g, m in ((2, 4), (2, 16), (2, 64), (8, 4), (8, 64)):
        o, y = torch.zeros(m, g, K).bfloat16(), torch.zeros(m, g, N).bfloat16()
        w = torch.zeros(g, N, K, dtype=torch.uint8).view(torch.float8_e4m3fn)
        layer = Layer(o, w, torch.ones(g, N // 128, K // 128), torch.empty(g, N, K, dtype=torch.bfloat16), y)
        for variant in variants(g, m):
            if variant.name.split()[0] == "read":
                print(f"G={g} M={m:3} {variant.name:26} ", end="", flush=True)
                variant.run(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="2:1,2:4,2:16,2:64,8:4,16:1,16:16", help="G:M, separated by commas")
    parser.add_argument("--suite", default="", help="first words of names, separated by commas")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--powers", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--replays", type=int, default=31)
    options = parser.parse_args()
    if options.compile:
        global compile_only
        compile_only = True
        compile_all()
        return
    cases = [tuple(int(x) for x in case.split(":")) for case in options.cases.split(",")]
    table = measure(cases, [s for s in options.suite.split(",") if s], options.only, options.replays, options.powers)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; us ± quartile range, ")
    print("e: over einsum, f: over the FP8 read floor of the same run")
    print(f"{'':26}" + "".join(f"{f'G={g} M={m}':>26}" for g, m in cases))
    for name, row in table.items():
        print(f"{name:26}" + "".join(f"{row.get(case, ''):>26}" for case in cases))


if __name__ == "__main__":
    main()
