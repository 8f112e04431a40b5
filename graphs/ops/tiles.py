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


HOPPER = ("cuda", 9, 0)
MEASURED: dict[str, tuple[tuple[int, Tile], ...]] = {  # path -> (up to this many tokens, the best tile tried on an H200)
    "bmm": (
        (16, Tile(16, 16, 4, 8)),  # G = 2: 15.4 us; two warps or one: 23.3 and 47.9
        (64, Tile(16, 64, 4, 6)),  # 17.0 us; 64 rows: 33.6, a block then quantises all of o by itself
        (256, Tile(64, 64, 4, 5)),  # 29.9 us
        (2**31, Tile(128, 128, 8, 3)),  # not measured: as many bytes per block as the shape allows
    ),
    "gloop": (  # of one group, which has 1024 columns
        (16, Tile(16, 16, 2, 6)),  # 21.3 us for both groups
        (64, Tile(64, 16, 4, 6)),  # 24.4 us; 32 rows: 28.1
        (2**31, Tile(64, 64, 4, 5)),  # 24.8 us at 256 tokens
    ),
}


def quantised_gemm(path: str, m: int, g: int, n: int, k: int, arch: Arch) -> Tile:
    """Tile of the ``bmm`` kernel, or of one group of ``gloop`` (then with ``g = 1``).

    Few columns in all: narrow tiles, because the weight must be read by as many multiprocessors as possible. Many tokens: a
    square tile, because each weight tile is read once per row of tiles. The measured choices hold for up to 4096 columns.
    """
    if arch == HOPPER and g * n <= 4096:
        return next(tile for tokens, tile in MEASURED[path] if m <= tokens)
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
