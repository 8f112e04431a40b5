"""How the kernels of ``graphs::mhc_*`` divide their work."""

from __future__ import annotations

from typing import NamedTuple

MOST_ROWS = 64
"""Rows above which a library multiplies: each program reads the linear layer anew for its rows."""
STREAMS = (2, 4, 8)
"""Numbers of streams that the kernels are written for: powers of two, whose weights fit in registers."""
LOADED = 512
"""Features of one token that a program holds of all streams."""


class Tile(NamedTuple):
    """Columns of each stream and rows of a program that sums; columns of one that mixes, and of one that only spreads.

    A warp of its own sums without waiting for others: 128 features are four for each of its lanes.
    """

    columns: int
    rows: int
    mixed: int
    spread: int
    warps: int = 1


def power_of_two(number: int) -> int:
    """The smallest one that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def few(rows: int, streams: int, width: int) -> Tile | None:
    """The tile for ``rows`` tokens of ``streams`` times ``width`` features; None where operators of torch compute.

    The linear layer is read by about as many programs as a GPU has multiprocessors: 128 of 32 columns at width 4096.
    """
    if not 0 < rows <= MOST_ROWS or streams not in STREAMS or width % 32:
        return None
    columns = min(max(32, power_of_two(width // 128)), LOADED // streams // (1 if streams < 8 else 2))
    return Tile(columns, min(power_of_two(rows), 4), min(1024, power_of_two(width)), min(256, power_of_two(width)))
