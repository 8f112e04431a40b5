"""The Triton kernels without a GPU: run in Triton's interpreter, compiled for four chips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot be interpreted or compiled")

from graphs.ops import offline
from graphs.ops.wo_a import operators, tiles

OPTIONS = ("", " fp8", " rotary", " fp8 rotary")
SCRIPT = Path(__file__).with_name("interpret_kernels.py")
ROOT = SCRIPT.parents[2]
PATHS = ["bmm", "gloop", "split bmm", *(kernel + option for kernel in ("fused", "split") for option in OPTIONS)]
QUANTISED = {"bmm", "gloop", "fp8"}


@pytest.fixture(scope="module")
def interpreted() -> dict:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [1, 5, 17, "fnuz"])
def test_interpreted_kernel_agrees_with_the_reference(interpreted: dict, path: str, case: object) -> None:
    errors = interpreted[f"{path}-{case}"]
    assert errors["reference"] < 1e-5
    assert errors["exact"] < (0.03 if QUANTISED & set(path.split()) else 1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_interpreted_kernel_keeps_odd_values_in_their_row(interpreted: dict, path: str, value: str) -> None:
    assert interpreted[f"{path}-{value}"] == {"propagates": True, "elsewhere_finite": True}


@pytest.mark.parametrize("path", PATHS)
def test_interpreted_kernel_maps_zeros_to_zeros(interpreted: dict, path: str) -> None:
    assert interpreted[f"{path}-zeros"] == 0


@pytest.fixture(scope="module", params=offline.TARGETS)
def compiled(request: pytest.FixtureRequest) -> list[offline.Resources]:
    return offline.table(request.param)


def test_no_kernel_spills_registers(compiled: list[offline.Resources]) -> None:
    assert [row for row in compiled if row.spills] == []


def test_shared_memory_fits_the_chip(compiled: list[offline.Resources]) -> None:
    assert [row for row in compiled if row.shared > offline.SHARED_LIMIT[row.target]] == []


EXPECTED = {  # kernels with FP8 activations, chip -> matrix instruction (any of)
    "gfx942": ("v_mfma_f32_16x16x32_fp8_fp8", "v_mfma_f32_32x32x16_fp8_fp8"),
    "gfx950": ("v_mfma_f32_16x16x128_f8f6f4", "v_mfma_f32_32x32x64_f8f6f4"),
    "sm_90": ("wgmma", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
}


WIDENING = (
    "wo_a_fused_kernel",
    "wo_a_split_kernel",
    "wo_a_registers_kernel",
    "wo_a_warpgroup_kernel",
    "skinny_linear_kernel",
)


def test_matrix_instructions(compiled: list[offline.Resources]) -> None:
    for row in compiled:
        if row.kernel == "attend_part_kernel":
            assert row.matrix, row  # of 16 bits, for scores and values
        elif row.kernel in ("wo_a_quantise_kernel", "expert_linear_kernel", "join_parts_kernel") or row.kernel.startswith("mhc_"):
            assert row.matrix == ()
        elif row.kernel in WIDENING and not QUANTISED & set(row.option.split()):
            assert row.matrix and all("bf16" in name or "kind::f16" in name for name in row.matrix), row
        else:
            assert row.matrix and all(name.startswith(EXPECTED[row.target]) for name in row.matrix), row


PICKS = (partial(tiles.quantised_gemm, "bmm"), partial(tiles.quantised_gemm, "gloop"), tiles.fused, tiles.quantised_fused)


def test_tiles_divide_every_legal_size_and_depend_on_nothing_else() -> None:
    for arch in (tiles.Arch("cuda", 9, 0), tiles.Arch("cuda", 10, 0), tiles.Arch("hip", 9, 5)):
        for m in (1, 16, 17, 64, 65, 257, 4096):
            for g, n in ((1, 128), (2, 1024), (8, 1024), (16, 1024)):
                for pick in PICKS:
                    tile = pick(m, g, n, 4096, arch)
                    assert tile == pick(m, g, n, 4096, arch) and n % tile.block_n == 0 and tile.block_m >= 16
                    assert tile.block_n <= 128 or pick is PICKS[0], "a block of several scales is for one scale only"


def test_tiles_measured_on_one_chip_are_not_used_on_another() -> None:
    hopper, other = tiles.Arch("cuda", 9, 0), tiles.Arch("cuda", 10, 0)
    assert tiles.quantised_gemm("bmm", 64, 2, 1024, 4096, hopper) == tiles.Tile(16, 64, 4, 6)
    assert tiles.quantised_gemm("gloop", 4, 1, 1024, 4096, hopper) == tiles.Tile(16, 16, 2, 6)
    assert tiles.split(4, 16, 1024, 4096, hopper) == tiles.Tile(8, 64, 4, 3)
    assert tiles.split(4, 16, 1024, 4096, other) == tiles.Tile(8, 32, 4, 3)
    assert tiles.fused(4, 8, 1024, 4096, hopper) == tiles.Tile(16, 32, 4, 4)
    assert (
        tiles.quantised_gemm("bmm", 64, 2, 1024, 4096, other) == tiles.fused(64, 2, 1024, 4096, other) == tiles.Tile(64, 32, 4, 4)
    )
    assert tiles.quantised_gemm("bmm", 4, 16, 1024, 4096, hopper).block_n == 64, "narrow tiles are for few columns"


def test_the_warpgroup_kernel_runs_where_it_was_measured_to_be_faster() -> None:
    hopper = tiles.Arch("cuda", 9, 0)
    assert tiles.warpgroup(8, 16, 1024, 4096, hopper) is None, "few tokens: K over warps"
    assert tiles.warpgroup(16, 8, 1024, 4096, hopper) == tiles.Cluster(16, 64, 1, 8)
    assert tiles.warpgroup(64, 16, 1024, 4096, hopper) == tiles.warpgroup(4096, 16, 1024, 4096, hopper)
    assert tiles.warpgroup(64, 2, 1024, 1920, hopper) is None, "each block of a cluster takes two steps at least"
    assert not any(tiles.warpgroup(64, 8, 1024, 4096, tiles.Arch(v, 9, m)) for v, m in (("hip", 5), ("hip", 4), ("hip", 0)))
    assert tiles.warpgroup(64, 8, 1024, 4096, tiles.Arch("cuda", 10, 0)) is None


def test_a_cluster_of_more_blocks_than_there_are_steps_for_is_refused() -> None:
    special = operators.warpgroup()
    assert special is not None
    with pytest.raises(ValueError, match="K = 1024 is too little for a cluster of 8 blocks"):
        special.constants(1024, tiles.Cluster(64, 64, 8, 3))


def test_the_register_kernel_runs_where_it_was_measured_to_be_faster() -> None:
    hopper = tiles.Arch("cuda", 9, 0)
    assert tiles.registers(1, 2, 1024, 4096, hopper) and tiles.registers(16, 2, 1024, 4096, hopper)
    assert not tiles.registers(17, 2, 1024, 4096, hopper) and not tiles.registers(1, 8, 1024, 4096, hopper)
    assert not tiles.registers(1, 2, 1024, 4096 + 128, hopper), "K is shared by eight warps in blocks of 128"
    assert not any(tiles.registers(1, 2, 1024, 4096, tiles.Arch(v, 9, m)) for v, m in (("hip", 5), ("hip", 4), ("hip", 0)))


ARCHS = (tiles.Arch("cuda", 8, 9), tiles.Arch("cuda", 9, 0), tiles.Arch("cuda", 10, 0), tiles.Arch("hip", 9, 4))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_tile_that_splits_k_fits_the_problem(arch: tiles.Arch, plain: bool) -> None:
    for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 4096):
        for g, n in ((1, 128), (2, 1024), (3, 1024), (8, 1024), (16, 1024)):
            assert tiles.split(m, g, n, 4096 + 128, arch, plain) is None, "four warps share K"
            tile = tiles.split(m, g, n, 4096, arch, plain)
            if tile is not None:
                assert m <= tile.block_m <= 64 and 128 % tile.block_n == 0 and tile.num_warps == 4
                assert tile.block_m >= 16 or arch.vendor == "cuda", "AMD's matrix instructions take no fewer tokens"
            if m > 64 or (m > 16 and not (plain and arch == tiles.HOPPER)):
                assert tile is None
            elif m <= 8:
                assert tile is not None
