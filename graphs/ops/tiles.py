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


HOPPER = Arch("cuda", 9, 0)
WIDE = 4096  # columns over all groups from which narrow tiles are not needed to occupy every multiprocessor
MEASURED: dict[str, tuple[tuple[int, Tile], ...]] = {  # path -> (up to this many tokens, best tile tried on an H200 at G = 2)
    "bmm": (
        (16, Tile(16, 16, 4, 8)),  # 15.4 us; two warps or one: 23.3 and 47.9
        (64, Tile(16, 64, 4, 6)),  # 17.0 us; 64 rows: 33.6, because so few warps then quantise so much of o
        (256, Tile(64, 64, 4, 5)),  # 29.9 us; 128 columns: 35.8
        (2**31, Tile(128, 128, 8, 3)),  # not measured here; the best of a like kernel at 1024 tokens
    ),
    "gloop": (
        (16, Tile(16, 16, 2, 6)),  # 21.3 us, both groups and the quantisation together
        (64, Tile(64, 16, 4, 6)),  # 24.4 us; 32 rows and 32 columns: 28.1
        (2**31, Tile(64, 64, 4, 5)),  # 24.8 us at 256 tokens; 128 columns: 36.4
    ),
}


def quantised_gemm(path: str, m: int, g: int, n: int, k: int, arch: Arch) -> Tile:
    """Tile of the ``bmm`` kernel, or of one group of ``gloop`` (then with ``g = 1``).

    Few tokens: narrow columns, because the weight must be read by as many multiprocessors as possible. Many tokens: a square
    tile, because each weight tile is read once per row of tiles.
    """
    if arch == HOPPER and (m > 16 or g * n <= WIDE):
        return next(tile for tokens, tile in MEASURED[path] if m <= tokens)
    return _unmeasured(m, g, n, arch)


def _unmeasured(m: int, g: int, n: int, arch: Arch) -> Tile:
    stages = 2 if arch.vendor == "hip" else 4
    if m <= 16:
        return Tile(16, 16 if g * n <= WIDE else 64, 4, stages)
    if m <= 64:
        return Tile(32 if m <= 32 else 64, 32 if g * n <= WIDE else 64, 4, stages)
    return Tile(64, 64 if m * g * n <= 2**21 else 128, 4, min(stages, 3))


def fused(m: int, g: int, n: int, k: int, arch: Arch) -> Tile:
    """Tile of the portable ``fused`` kernel.

    Measured on an H200: at G = 8, M = 4 32 columns 15.7 us, 64 columns 16.4; at G = 16, M = 1 24.2 and 21.4 us. At 128 columns a
    stage less than usual, because rows of bfloat16 are twice as wide as of FP8.
    """
    if arch == HOPPER and m <= 16 and WIDE < g * n <= 8192:
        return Tile(16, 32, 4, 4)
    tile = _unmeasured(m, g, n, arch)
    return tile._replace(num_stages=min(tile.num_stages, 3)) if tile.block_n == 128 else tile


def registers(m: int, g: int, n: int, k: int, arch: Arch) -> bool:
    """Whether the kernel that holds its share of the weight in registers runs (compute capability 9.0 only).

    Measured on an H200 in a graph, at K = 4096 and N = 1024, against the portable kernel: 5.4 to 12.4 us at G = 2, M = 1 and
    7.2 to 12.7 us at M = 16, but 19.7 to 16.4 us at G = 8: one block of it fills a multiprocessor, so waves do not overlap.
    """
    return arch == HOPPER and m <= 16 and g * n <= 4096 and k % 1024 == 0 and k <= 4096


def overlaps(arch: Arch) -> bool:
    """Whether a kernel can be launched before the one in front has finished (programmatic dependent launch)."""
    return arch.vendor == "cuda" and arch.major >= 9


def quantise_rows(groups: int) -> int:
    """How many 128-wide groups one program of the quantisation kernel handles: a power of two, at most 16."""
    return next(rows for rows in (16, 8, 4, 2, 1) if rows <= max(groups, 1))
