"""Compile every kernel for chips that are not here, and read registers, spills, shared memory and matrix instructions off.

Triton carries compilers for both vendors, so this needs no GPU and no ROCm. ``python -m graphs.ops.offline`` prints the table;
with a path it also writes it there as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphs.ops.attention.operator import attention_kernel
from graphs.ops.experts.operator import expert_kernel
from graphs.ops.mhc import tiles as mhc
from graphs.ops.mhc.operator import mhc_kernel
from graphs.ops.skinny.operator import skinny_kernel
from graphs.ops.wo_a import tiles
from graphs.ops.wo_a.operators import hopper, kernels, split_k, warpgroup

TARGETS = {  # name -> (Triton back end, its architecture, warp width, arch for the tile choice, FP8 type)
    "gfx942": ("hip", "gfx942", 64, tiles.Arch("hip", 9, 4), "fp8e4b8"),
    "gfx950": ("hip", "gfx950", 64, tiles.Arch("hip", 9, 5), "fp8e4nv"),
    "sm_90": ("cuda", 90, 32, tiles.Arch("cuda", 9, 0), "fp8e4nv"),
    "sm_100": ("cuda", 100, 32, tiles.Arch("cuda", 10, 0), "fp8e4nv"),
}
SHARED_LIMIT = {"gfx942": 65536, "gfx950": 163840, "sm_90": 232448, "sm_100": 232448}  # bytes a workgroup may use
SHAPE = (2, 1024, 4096)  # G, N, K of the tile choice
MATRIX = re.compile(r"v_mfma\w+|wgmma\.mma_async\S*?f32\.\w+\.\w+|mma\.sync\S+|tcgen05\.mma\S*?kind::\w+")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one chip: registers per lane, spills in registers (AMD) or bytes (NVIDIA), bytes shared."""

    kernel: str
    tokens: int
    target: str
    registers: int
    spills: int
    shared: int
    matrix: tuple[str, ...]
    option: str = ""


@dataclass(frozen=True)
class Case:
    """A kernel, the Triton types of its arguments, its constants and launch options, as a step of ``tokens`` rows uses it."""

    kernel: str
    tokens: int
    types: dict[str, str]
    constants: dict[str, Any]
    tile: tiles.Tile
    option: str = ""


def cases(target: str, tokens: tuple[int, ...] = (4, 64)) -> Iterator[Case]:
    """Every kernel as it is launched on ``target`` for each number of tokens."""
    *_, arch, fp8 = TARGETS[target]
    limit = 240.0 if fp8 == "fp8e4b8" else 448.0
    gemm = {"o": "*bf16", "weight": "*" + fp8, "scale": "*fp32", "y": "*bf16", "M": "i32", "N": "i32", "K": "i32"}
    strides = {"stride_om": "i32", "stride_og": "i32", "stride_ok": "constexpr"}
    block = {"q": "*" + fp8, "q_scale": "*fp32", "weight": "*" + fp8, "scale": "*fp32", "y": "*bf16", "g": "i32", "G": "i32"}
    plain = {"stride_ok": 1, "positions": None, "table": None}
    early = tiles.overlaps(arch)
    for m in tokens:
        bmm = tiles.quantised_gemm("bmm", m, *SHAPE, arch)
        gloop = tiles.quantised_gemm("gloop", m, 1, *SHAPE[1:], arch)
        fused = tiles.fused(m, *SHAPE, arch)
        yield Case("wo_a_bmm_kernel", m, gemm | strides, _blocks(bmm) | {"stride_ok": 1, "FP8_LIMIT": limit}, bmm)
        for option, tile, extra in _options(fused, tiles.quantised_fused(m, *SHAPE, arch), plain, limit):
            begin = {"AHEAD": 128 * tile.num_stages, "OVERLAP": early}
            types = gemm | strides | {"positions": "*i64", "table": "*fp32"}
            yield Case("wo_a_fused_kernel", m, types, _blocks(tile) | extra | begin, tile, option)
        sizes = {"M": "i32", "N": "i32", "K": "i32"}
        yield Case("wo_a_block_gemm_kernel", m, block | sizes, _blocks(gloop) | {"OVERLAP": early}, gloop)
    quantise = {"o": "*bf16", "q": "*" + fp8, "scale": "*fp32", "M": "i32", "K": "i32"} | strides
    rows = tiles.quantise_rows(SHAPE[2] // 128)
    yield Case(
        "wo_a_quantise_kernel", tokens[0], quantise, {"stride_ok": 1, "ROWS": rows, "FP8_LIMIT": limit}, tiles.Tile(0, 0, 4, 1)
    )
    yield from _split_cases(arch, gemm | strides, plain, limit)
    yield from _skinny_cases(arch.vendor)
    yield from _expert_cases()
    yield from _attention_cases()
    yield from _mhc_cases()
    special = hopper() if target == "sm_90" else None
    if special is not None:
        constants = {"N": SHAPE[1], "K": SHAPE[2], "SPLIT": special.WARPS, "OVERLAP": True} | special.layouts(special.WARPS)
        for m in (8, 16):
            tile = tiles.Tile(m, special.COLUMNS, special.WARPS, 1)
            yield Case("wo_a_registers_kernel", m, gemm | strides | {"weight": "*i8"}, constants | {"BLOCK_M": m}, tile)
    if target == "sm_90":
        yield from _warpgroup_cases()


def _options(
    bf16: tiles.Tile, fp8: tiles.Tile, plain: dict[str, Any], limit: float
) -> tuple[tuple[str, tiles.Tile, dict[str, Any]], ...]:
    """The options of ``fused``: name, tile, constants."""
    return (
        ("", bf16, plain | {"FP8_LIMIT": 0.0}),
        ("fp8", fp8, plain | {"FP8_LIMIT": limit}),
        ("rotary", bf16, {"stride_ok": 1, "FP8_LIMIT": 0.0}),
    )


def _split_cases(arch: tiles.Arch, types: dict[str, str], plain: dict[str, Any], limit: float) -> Iterator[Case]:
    """The kernel for few tokens, in every tile that is launched anywhere."""
    types = types | {"positions": "*i64", "table": "*fp32"}
    seen: set[tiles.Tile] = set()
    for groups, m in ((2, 4), (2, 16), (2, 32), (2, 64), (8, 4), (8, 16), (16, 4), (16, 16)):
        size = (m, groups, *SHAPE[1:], arch)
        tile = tiles.split(*size) or tiles.split(*size, True)
        if tile is None or tile in seen:
            continue
        seen.add(tile)
        common = _blocks(tile) | {"SPLIT": tile.num_warps, "AHEAD": 512 * tile.num_stages, "OVERLAP": tiles.overlaps(arch)}
        ways = [(option, extra | {"SINGLE": False}) for option, _, extra in _options(tile, tile, plain, limit)]
        ways.append(("bmm", plain | {"FP8_LIMIT": limit, "SINGLE": True}))
        for option, extra in ways if tiles.split(*size) else ways[:1]:
            yield Case("wo_a_split_kernel", m, types, common | extra, tile, f"n{tile.block_n} {option}".rstrip())


def _warpgroup_cases() -> Iterator[Case]:
    """The kernel that shares K over clusters, in every shape that is launched anywhere."""
    special = warpgroup()
    if special is None:
        return
    for _, m, shape in tiles.WARPGROUP:
        constants = {"N": SHAPE[1], "K": SHAPE[2]} | special.constants(SHAPE[2], shape)
        tile = tiles.Tile(shape.tokens, shape.columns, shape.columns // 16, shape.slots)
        yield Case("wo_a_warpgroup_kernel", m, special.TYPES, constants, tile, f"n{shape.columns} c{shape.blocks}")


def _skinny_cases(vendor: str) -> Iterator[Case]:
    """The kernel of ``skinny_linear`` in every tile that is launched: for one weight, for three, and with what is around them."""
    types = dict.fromkeys(("x", "w0", "w1", "w2", "b0", "b1", "b2", "y0", "y1", "y2", "gain", "shift", "residual"), "*bf16")
    types |= {name: "i32" for name in ("M", "N0", "N1", "N2", "K")} | {"eps": "fp32"}
    nothing = {
        "gain": None,
        "shift": None,
        "residual": None,
        "NORM": "none",
        "ONE_PASS": False,
        "ACTIVATION": "none",
        "GATED": False,
    }
    sizes = ((4, 3072, 512, False), (4, 2048, 2048, True), (4, 16384, 2048, False), (16, 16384, 2048, False))
    for (m, n, k, single), turned, even in (*((size, False, True) for size in sizes), ((1, 50257, 768, True), True, False)):
        found = tiles.skinny(m, n, k, vendor, turned=turned)
        assert found is not None, "these sizes have a tile"
        tile, block_k = found
        constants = _blocks(tile) | {
            "SPLIT": tile.num_warps,
            "BLOCK_K": block_k,
            "SINGLE": single,
            "TURNED": turned,
            "EVEN": even,
        }
        none = {} if turned else {"b0": None, "b1": None, "b2": None}
        yield Case("skinny_linear_kernel", m, types, constants | nothing | none, tile, f"n{n} k{k}")
    yield from _around_cases(vendor, types, nothing)


def _around_cases(vendor: str, types: dict[str, str], nothing: dict[str, Any]) -> Iterator[Case]:
    """The same kernel with a norm before the product, and an activation or a sum behind it, as a Llama and GPT-2 have them."""
    rms = {"NORM": "rms", "ONE_PASS": True, "gain": "*bf16"}
    layer = {"NORM": "layer", "gain": "*bf16", "shift": "*bf16"}
    ways: tuple[tuple[str, int, int, int, bool, dict[str, Any]], ...] = (
        ("rms", 4, 3072, 2048, False, rms),
        ("rms silu gated", 4, 8192, 2048, False, rms | {"ACTIVATION": "silu", "GATED": True}),
        ("residual", 4, 2048, 8192, False, {"residual": "*bf16"}),
        ("layer", 1, 2304, 768, True, layer),
        ("layer gelu_tanh", 1, 3072, 768, True, layer | {"ACTIVATION": "gelu_tanh"}),
        ("layer gelu", 8, 3072, 768, False, layer | {"ACTIVATION": "gelu"}),
    )
    for option, m, n, k, turned, around in ways:
        gated = "GATED" in around
        found = tiles.skinny(m, n, k, vendor, turned=turned, gated=gated)
        assert found is not None, "these sizes have a tile"
        tile, block_k = found
        sizes = {"SPLIT": tile.num_warps, "BLOCK_K": block_k, "SINGLE": not gated and n != 3072, "TURNED": turned, "EVEN": True}
        none = {name: None for name in ("b0", "b1", "b2") if not turned}
        constants = _blocks(tile) | sizes | {name: value for name, value in (nothing | none | around).items() if value != "*bf16"}
        yield Case("skinny_linear_kernel", m, types, constants, tile, f"n{n} k{k} {option}")


def _attention_cases() -> Iterator[Case]:
    """The kernels of ``one_query_attention`` for a short cache and for one of several parts."""
    module = attention_kernel()
    tensors = dict.fromkeys(("query", "key", "value", "mask", "result"), "*bf16") | {"parts": "*fp32", "scale": "fp32"}
    types = dict.fromkeys(module.attend_part_kernel.arg_names, "i32") | tensors
    for length, width, shared, mask in ((192, 64, 1, "*bf16"), (192, 64, 1, "*i1"), (4096, 128, 4, "*i1")):
        part, warps = module.part_of(length, width)
        several = part < length
        tile = tiles.Tile(module.ROWS, part, warps, 1)
        constants = {"SHARED": shared, "WIDTH": width, "ROWS": module.ROWS, "q_d": 1, "k_d": 1, "v_d": 1}
        option = f"s{length} d{width} {mask[1:]}"
        yield Case(
            "attend_part_kernel", 1, types | {"mask": mask}, constants | {"PART": part, "WHOLE": not several}, tile, option
        )
        if several:
            join = {name: constants[name] for name in ("SHARED", "WIDTH", "ROWS")} | {"JOINED": module.JOINED}
            yield Case("join_parts_kernel", 1, types, join, tiles.Tile(0, 0, 4, 1), f"s{length} d{width}")


def _expert_cases() -> Iterator[Case]:
    """The kernel of ``expert_linear`` for wide and narrow experts."""
    types = {"x": "*bf16", "weights": "*bf16", "experts": "*i64", "y": "*bf16"}
    types |= {name: "i32" for name in ("P", "E", "N", "K", "stride_e", "stride_n")}
    module = expert_kernel()
    for n, k in ((1024, 4096), (4096, 512)):
        block_n, block_k = module.blocks(n, k)
        tile = tiles.Tile(0, block_n, module.WARPS, module.STAGES)
        constants = {"stride_k": 1, "BLOCK_N": block_n, "BLOCK_K": block_k}
        yield Case("expert_linear_kernel", 4, types, constants, tile, f"n{n} k{k}")


def _mhc_cases() -> Iterator[Case]:
    """The kernels of ``mhc_*`` at the width of DeepSeek-V4: for a block, behind a block, for the head."""
    streams, width, iterations = 4, 4096, 20
    names = ("out", "streams", "y", "mixed"), ("post", "comb", "weight", "sums", "base", "scale")
    types = dict.fromkeys(names[0], "*bf16") | dict.fromkeys(names[1], "*fp32")
    types |= {"M": "i32", "norm_eps": "fp32", "eps": "fp32"}
    for m in (4, 64):
        found = mhc.few(m, streams, width)
        assert found is not None, "these sizes have a tile"
        common = {"D": width, "H": streams}
        four = tiles.Tile(0, 0, 4, 3)  # four warps
        yield Case("mhc_spread_kernel", m, types, common | {"BLOCK": found.spread}, four)
        for option, behind, head in (("", False, False), ("behind", True, False), ("head", False, True)):
            split = {"STRIDE": mhc.power_of_two((2 + streams) * streams + 1), "HEAD": head}
            sums = {"BEHIND": behind, "BLOCK": found.columns, "ROWS": found.rows}
            yield Case("mhc_sums_kernel", m, types, common | split | sums, tiles.Tile(0, 0, found.warps, 3), option)
            programs = width // found.columns
            mix = {"PROGRAMS": programs, "CHUNKS": mhc.power_of_two(programs), "BLOCK": found.mixed}
            if not behind:
                yield Case(
                    "mhc_mix_kernel", m, types, common | split | mix | {"ITERATIONS": 0 if head else iterations}, four, option
                )


def _source(function: Any, signature: dict[str, str], constants: dict[str, Any], aligned: dict[Any, Any]) -> Any:
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(function, signature, constants, aligned)
    return kernels().triton.compiler.ASTSource(function, signature, constants, aligned)


def compile_case(case: Case, target: str) -> Resources:
    """Compile one kernel for one chip and read its resources off the assembly."""
    triton = kernels().triton
    vendor, arch, width, *_ = TARGETS[target]
    modules = (kernels(), split_k(), skinny_kernel(), attention_kernel(), expert_kernel(), mhc_kernel(), hopper(), warpgroup())
    function = next(found for module in modules if (found := getattr(module, case.kernel, None)) is not None)
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind != "constexpr" and name in ("N", "N0", "N1", "N2", "K", "stride_om", "stride_og"))
    }
    source = _source(function, signature, case.constants, aligned)
    chip = triton.backends.compiler.GPUTarget(vendor, arch, width)
    options = {"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=chip, options=options)
    text = compiled.asm["amdgcn" if vendor == "hip" else "ptx"]
    registers, spills = amd_registers(text) if vendor == "hip" else nvidia_registers(compiled.asm["cubin"])
    matrix = tuple(sorted(set(MATRIX.findall(text))))
    return Resources(case.kernel, case.tokens, target, registers, spills, compiled.metadata.shared, matrix, case.option)


def table(target: str) -> list[Resources]:
    """Every kernel on one chip."""
    return [compile_case(case, target) for case in cases(target)]


def _blocks(tile: tiles.Tile) -> dict[str, Any]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


def amd_registers(text: str) -> tuple[int, int]:
    """Vector registers and spilled registers, from the metadata at the end of AMD assembly."""
    count, spills = (re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
    assert count and spills, "the assembly carries no kernel metadata"
    return int(count[1]), int(spills[1])


def nvidia_registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread of an NVIDIA binary (the stack is where spills go)."""
    from triton.backends.nvidia import compiler

    tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]) + int(found[3])


def main(arguments: list[str]) -> None:
    """Print the table; ``arguments`` may hold one path to write it to."""
    rows = [row for target in TARGETS for row in table(target)]
    print(f"{'kernel':25} {'M':>3} {'target':7} {'regs':>4} {'spill':>5} {'shared':>7}  matrix instruction")
    for row in rows:
        figures = f"{row.registers:4} {row.spills:5} {row.shared:7}"
        name = f"{row.kernel} {row.option}"
        print(f"{name:25} {row.tokens:3} {row.target:7} {figures}  {' '.join(row.matrix)}")
    if arguments:
        Path(arguments[0]).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
