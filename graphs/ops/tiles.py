"""Tile sizes as pure functions of the problem and the device: nothing is tuned, timed or looked up while a step runs."""

from __future__ import annotations

from typing import NamedTuple


class Arch(NamedTuple):
    """What a tile choice may depend on. ``vendor`` is ``cuda`` or ``hip``; ``major``, ``minor`` the compute capability."""

    vendor: str
    major: int
    minor: int


class Tile(NamedTuple):
    """Launch parameters of one kernel: output rows and columns per program, warps, software-pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def quantised_gemm(m: int, g: int, n: int, k: int, arch: Arch) -> Tile:
    """Tile of the ``bmm`` kernel and of one group of ``gloop`` (then with ``g = 1``).

    Few tokens: narrow columns, because the weight must be read by as many multiprocessors as possible. Many tokens: a square
    tile, because each weight tile is read once per row of tiles.
    """
    stages = 2 if arch.vendor == "hip" else 4
    if m <= 16:
        return Tile(16, 16 if g * n <= 4096 else 64, 4, stages)
    if m <= 64:
        return Tile(32 if m <= 32 else 64, 32 if g * n <= 4096 else 64, 4, stages)
    return Tile(64, 64 if m * g * n <= 2**21 else 128, 4, min(stages, 3))


def fused(m: int, g: int, n: int, k: int, arch: Arch) -> Tile:
    """Tile of the ``fused`` kernel: the quantised GEMM's, a stage less at 128 columns because bfloat16 rows are twice as wide."""
    tile = quantised_gemm(m, g, n, k, arch)
    return tile._replace(num_stages=min(tile.num_stages, 3)) if tile.block_n == 128 else tile


def registers(m: int, g: int, n: int, k: int, arch: Arch) -> bool:
    """Whether the kernel that holds its share of the weight in registers runs (compute capability 9.0 only).

    Measured on an H200 in a graph, at K = 4096 and N = 1024, against the portable kernel: 5.8 to 12.4 us at G = 2, M = 1 and
    7.7 to 12.7 us at M = 16, but 19.7 to 16.6 us at G = 8: one block of it fills a multiprocessor, so waves do not overlap.
    """
    return arch == ("cuda", 9, 0) and m <= 16 and g * n <= 4096 and k % 1024 == 0 and k <= 4096


def quantise_rows(groups: int) -> int:
    """How many 128-wide groups one program of the quantisation kernel handles: a power of two, at most 16."""
    return next(rows for rows in (16, 8, 4, 2, 1) if rows <= max(groups, 1))
