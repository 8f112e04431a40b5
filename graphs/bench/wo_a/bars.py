"""The bars of the grouped projection: limits on times, errors and sizes, each held against what one run measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from graphs.bench.harness.rows import BarRow
from graphs.bench.harness.sampling import Spread, ratios


class Bar(NamedTuple):
    """``path`` over ``base`` at these G and M (empty: all), at most ``limit``; ``goal`` is what one would like."""

    path: str
    base: str
    groups: tuple[int, ...]
    tokens: tuple[int, ...]
    limit: float
    goal: float | None

    @property
    def name(self) -> str:
        """What is compared, and where."""
        places = [f"{letter}={','.join(map(str, sizes))}" for letter, sizes in (("G", self.groups), ("M", self.tokens)) if sizes]
        return ", ".join([f"{self.path} over {self.base}", *places])


FLOOR = "read floor"  # only reading the weight
FEW = (1, 4, 16)
TIMES = (
    Bar("fused", "einsum", (2,), (1,), 0.62, 0.45),
    Bar("fused", "einsum", (2,), (4, 16), 0.75, 0.50),
    Bar("fused", "einsum", (2,), (64,), 0.95, 0.60),
    Bar("auto", "einsum", (), (1, 4, 16, 64, 256), 1.02, 0.8),
    Bar("auto", "einsum", (), (1024,), 1.02, None),
    Bar("fused", "einsum", (8, 16), FEW, 0.65, 0.55),
    Bar("fused", FLOOR, (16,), FEW, 1.35, 1.15),
    Bar("bmm", "aiter bmm", (), (), 1.0, 0.6),
    Bar("gloop", "aiter gloop", (), (), 1.0, 0.6),
)
ERROR = 0.002  # of `fused` against float64 on the dequantised weight, relative
WEIGHT = 0.51  # bytes of an FP8 path over those of `einsum`
SMALL_WEIGHTS = ("bmm", "gloop", "fused")


def bars_of(
    groups: int,
    tokens: int,
    times: Mapping[str, list[float]],
    errors: Mapping[str, float],
    weight_bytes: Mapping[str, int],
    device: str,
) -> list[BarRow]:
    """The bars that one G and M are held to, as far as both sides were measured.

    Args:
        groups: G.
        tokens: M.
        times: path, or ``read floor`` -> microseconds of each run in graph mode; runs of one index are neighbours in time.
        errors: path -> relative error.
        weight_bytes: path -> bytes of one weight.
        device: where.
    """
    where = f"G={groups} M={tokens}"
    found = []
    for bar in TIMES:
        fits = groups in (bar.groups or (groups,)) and tokens in (bar.tokens or (tokens,))
        if fits and bar.path in times and bar.base in times:
            sides = {side: Spread.of(times[side]) for side in (bar.path, bar.base)}
            found.append(_row(bar.name, "x", ratios(times[bar.path], times[bar.base]), bar.limit, bar.goal, where, sides, device))
    if "fused" in errors:
        found.append(_row("error of fused against float64", "", [errors["fused"]], ERROR, None, where, {}, device))
    for path in SMALL_WEIGHTS if "einsum" in weight_bytes else ():
        if path in weight_bytes:
            share = weight_bytes[path] / weight_bytes["einsum"]
            found.append(_row(f"bytes of {path} over einsum", "x", [share], WEIGHT, None, where, {}, device))
    return found


def _row(
    name: str, unit: str, values: list[float], limit: float, goal: float | None, where: str, sides: dict[str, Spread], device: str
) -> BarRow:
    text = f"at most {limit:g}{unit}" + (f", goal {goal:g}{unit}" if goal is not None else "")
    return BarRow(name, text, unit, Spread.of(values), limit, False, sides, device, where, goal)
