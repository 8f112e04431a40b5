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


class Cluster(NamedTuple):
    """Launch parameters of the warpgroup kernel: tokens and columns of a block, blocks that share K, steps held at a time."""

    tokens: int
    columns: int
    blocks: int
    slots: int


HOPPER = Arch("cuda", 9, 0)
WIDE = 4096  # columns over all groups from which narrow tiles are not needed to occupy every multiprocessor
MEASURED: dict[str, tuple[tuple[int, Tile], ...]] = {  # path -> (up to this many tokens, best tile tried at G = 2)
    "bmm": (
        (16, Tile(16, 16, 4, 8)),  # 15.2 us; two warps or one: 23.3 and 47.9
        (64, Tile(16, 64, 4, 6)),  # 17.6 us; 64 rows: 33.6, because so few warps then quantise so much of o
        (256, Tile(64, 64, 4, 5)),  # 26.6 us; 128 columns: 35.8
        (2**31, Tile(64, 128, 4, 3)),  # 43.9 us at 1024 tokens on an H100; a fourth stage: 59.5, 128 x 128: 66.9
    ),
    "gloop": (  # all groups and the quantisation together, groups side by side
        (16, Tile(16, 16, 2, 6)),  # 12.7 us; 21.1 one group after another
        (64, Tile(64, 16, 4, 6)),  # 14.3 us; 23.7
        (512, Tile(64, 64, 4, 5)),  # 15.6 us at 256 tokens; 24.5
        (2**31, Tile(128, 128, 8, 3)),  # 32.2 us at 1024 tokens; with 64 rows and columns 37.3
    ),
}
MANY_COLUMNS: tuple[tuple[int, Tile], ...] = (  # `bmm` above WIDE columns, on an H100
    (16, Tile(16, 64, 4, 4)),  # 19.3 us at G = 8, 28.8 at G = 16; 32 columns 23.4 and 32.8
    (2**31, Tile(64, 64, 4, 4)),  # 28.3 us at G = 8, 37.1 at G = 16, both with 64 tokens; 16 rows 37.1 and 68.4
)
BROAD = Tile(64, 256, 8, 3)  # `bmm` for many tokens: 37.6 us at G = 2 and 142 at G = 8 (128 columns: 43.9 and 165), M = 1024
WARPGROUP: tuple[tuple[int, int, Cluster], ...] = (  # up to this many columns and tokens -> shape of the warpgroup kernel, H100
    (2048, 64, Cluster(64, 64, 8, 3)),  # G = 2: 10.0 us at 64 tokens, einsum 10.2; 128 columns 11.7, clusters of four 10.5
    (8192, 16, Cluster(16, 64, 1, 8)),  # G = 8: 15.4 us at 16 tokens, einsum 26.7; 128 columns 16.5, `split` 16.7
    (8192, 64, Cluster(64, 64, 1, 8)),  # 18.9 us at 64 tokens, einsum 28.2; 128 columns 21.2
    (2**31, 16, Cluster(16, 64, 1, 5)),  # G = 16: 28.2 us at 16 tokens, einsum 50.3; 128 columns 29.1, `split` 29.7
    (2**31, 64, Cluster(64, 64, 1, 4)),  # 32.8 us at 64 tokens, einsum 54.2; 128 columns 34.3
)
MANY_TOKENS = Cluster(64, 64, 1, 4)  # above 64: 17.2 us at 256 tokens, G = 2; cluster of eight 25.5, portable kernel 24.8
SPLIT: tuple[tuple[int, int, Tile], ...] = (  # up to this many columns and tokens -> tile of the kernel that splits K over warps
    (2048, 16, Tile(16, 16, 4, 4)),  # G = 2: 7.4 us at 16 tokens; the portable kernel 12.5
    (2048, 32, Tile(32, 16, 4, 3)),
    (2048, 64, Tile(64, 16, 4, 2)),  # 15.9 us at 64 tokens; 32 columns 18.4, the portable kernel 19.4
    (8192, 8, Tile(8, 16, 4, 3)),  # G = 8: 11.4 us at 4 tokens; 32 columns 11.8, the portable kernel 15.8
    (8192, 16, Tile(16, 32, 4, 3)),  # 16 columns would read 67 MB of o from L2
    (2**31, 8, Tile(8, 64, 4, 3)),  # G = 16: 20.4 us at 1 token; 32 columns 20.5, the portable kernel 21.8
    (2**31, 16, Tile(16, 32, 4, 3)),  # 24.0 us at 16 tokens; the portable kernel 22.6, but not with its options
)


def quantised_gemm(path: str, m: int, g: int, n: int, k: int, arch: Arch) -> Tile:
    """Tile of the ``bmm`` kernel, or of one group of ``gloop`` (then with ``g = 1``).

    Few tokens: narrow columns, because the weight must be read by as many multiprocessors as possible. Many tokens: a square
    tile, because each weight tile is read once per row of tiles.
    """
    if arch != HOPPER or (path != "bmm" and m <= 16 and g * n > WIDE):
        return _unmeasured(m, g, n, arch)
    if path == "bmm" and n % BROAD.block_n == 0 and m * g * n >= 2**21:
        return BROAD
    table = MANY_COLUMNS if path == "bmm" and g * n > WIDE else MEASURED[path]
    return next(tile for tokens, tile in table if m <= tokens)


def quantised_fused(m: int, g: int, n: int, k: int, arch: Arch) -> Tile:
    """Tile of the portable ``fused`` kernel with FP8 activations: that of ``bmm``, but with one block scale per step."""
    tile = quantised_gemm("bmm", m, g, n, k, arch)
    return Tile(64, 128, 4, 3) if tile == BROAD else tile


def warpgroup(m: int, g: int, n: int, k: int, arch: Arch) -> Cluster | None:
    """Shape of the warpgroup kernel, or ``None`` where it should not run: it was measured on sm_90 only.

    Up to 8 tokens the kernel that splits K over warps is faster; with 2048 columns so is, up to 16, the one that keeps the weight
    in registers. Above 64 tokens a block takes 64 of them at a time.
    """
    if arch != HOPPER or m <= 8:
        return None
    shape = next((shape for columns, tokens, shape in WARPGROUP if g * n <= columns and m <= tokens), MANY_TOKENS)
    return shape if k >= 256 * shape.blocks else None


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


def split(m: int, g: int, n: int, k: int, arch: Arch, plain: bool = False) -> Tile | None:
    """Tile of the kernel for few tokens that splits K over the warps of a block, or ``None`` where it should not run.

    ``plain``: bfloat16 activations without rotary embedding. The options take registers, so that 64 tokens would spill; without
    them the portable kernel was faster in one case. Only sm_90 was measured. Elsewhere the same reasons hold for up to 16 tokens:
    four times as many bytes in flight, a quarter of the steps. AMD's matrix instructions take no fewer than 16 tokens, and 64 KiB
    of shared memory hold two stages.
    """
    if k % 512 or m > (64 if plain and arch == HOPPER else 16):
        return None
    if plain and arch == HOPPER and g * n > 8192 and m > 8:
        return None
    tile = next((tile for columns, tokens, tile in SPLIT if g * n <= columns and m <= tokens), None)
    if tile is None or arch == HOPPER:
        return tile and tile._replace(block_m=8 if m <= 8 else tile.block_m)
    narrow = tile._replace(block_n=min(tile.block_n, 32))  # with 64 columns sm_100 spills
    if arch.vendor == "hip":
        return narrow._replace(block_m=16, num_stages=2)
    return narrow._replace(block_m=8 if m <= 8 else 16)


def registers(m: int, g: int, n: int, k: int, arch: Arch) -> bool:
    """Whether the kernel that holds its share of the weight in registers runs (compute capability 9.0 only).

    Measured on an H200 in a graph, at K = 4096 and N = 1024: at G = 2 6.6 us at 16 tokens (split: 7.4), but 19.7 to 11.4 us at
    G = 8, M = 4: one block of it fills a multiprocessor, so waves do not overlap.
    """
    return arch == HOPPER and m <= 16 and g * n <= 2048 and k % 1024 == 0 and k <= 4096


def overlaps(arch: Arch) -> bool:
    """Whether a kernel can be launched before the one in front has finished (programmatic dependent launch)."""
    return arch.vendor == "cuda" and arch.major >= 9


def starts_early(columns: int, arch: Arch) -> bool:
    """Whether the kernel that splits K asks for its weight before the one in front has ended.

    Measured on an H200: with 2048 columns (G = 2) ``bmm`` at 4 tokens 11.4 us instead of 15.2. With 8192 columns 13.4 instead of
    11.4: the weight of one kernel then drives that of the other out of L2. With 16384 and 64 columns per block 25.4 instead of
    27.0 (H100, one token). The portable kernel never does: 34.7 instead of 22.6 at G = 16, M = 16.
    """
    return overlaps(arch) and (columns <= 2048 or columns > 8192)


def quantise_rows(groups: int) -> int:
    """How many 128-wide groups one program of the quantisation kernel handles: a power of two, at most 16."""
    return next(rows for rows in (16, 8, 4, 2, 1) if rows <= max(groups, 1))


def skinny(m: int, n: int, k: int, vendor: str = "cuda", *, turned: bool = False, gated: bool = False) -> tuple[Tile, int] | None:
    """Tile of ``skinny_linear`` for ``n`` columns in all, and features per warp and step; None where a library multiplies.

    Measured on an H100 at 4 rows, us, against cuBLAS with a launch per weight. K = 2048: N = 2048 + 512 + 512 7.1 (17.5), N =
    2048 5.1 (6.1), N = 2 * 8192 26.0 (28.2), N = 32000 45.8 (50.2). K = 8192, N = 2048: 13.9 (15.4). K = 512: N = 512 + 128 +
    128 2.8 (10.0), N = 2 * 2048 4.1 (7.6). With eight warps, or 64 columns per block, up to 1.6 times as long. AMD's matrix
    instructions take 16 rows or none.

    With ``gated`` a block reads the same columns of two weights, so that half as many steps of it are in flight.

    A weight that lies as ``[K, N]`` is turned. On an H200 with one row, with a bias, against cuBLAS: K = 768: N = 2304 4.2 (4.2),
    N = 768 3.2 (3.7), N = 3072 4.6 (5.1); K = 3072, N = 768 6.5 (6.8). As it is, K = 768, N = 50257: 22.9 (30.0).
    """
    if not (0 < m <= 16 and n > 0 and k > 0) or k % 256:
        return None
    narrow = k % 512 != 0 or k <= 1024
    deep = narrow or n <= 2048
    stages = 2 if vendor == "hip" or gated else 4 if deep else 3
    return Tile(8 if m <= 8 and vendor != "hip" else 16, 32 if turned and n > 1024 else 16, 4, stages), 64 if narrow else 128
