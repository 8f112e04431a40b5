"""Two results files side by side: what both measured with the ratio and its spread, and what only one of them has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs.bench.harness.progress import make_console
from graphs.bench.harness.rows import BenchRow, Results, read_results
from graphs.bench.harness.sampling import Spread
from graphs.bench.harness.table import make_table, microseconds


@dataclass(frozen=True)
class Figure:
    """One measured value, in ``unit``."""

    spread: Spread
    unit: str

    def __str__(self) -> str:
        median = self.spread.median
        return f"{microseconds(median) if self.unit == 'us' else format(median, '.3g')} {self.unit}".strip()


@dataclass(frozen=True)
class Change:
    """What both files measured."""

    name: str
    first: Figure
    second: Figure

    @property
    def ratio(self) -> float | None:
        """Second over first, by medians; None where the first is not positive."""
        first = self.first.spread.median
        return self.second.spread.median / first if first > 0 else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The least and the largest ratio of quartiles; None where a quartile of the first is not positive."""
        first, second = self.first.spread, self.second.spread
        return (second.low / first.high, second.high / first.low) if first.low > 0 else None


@dataclass(frozen=True)
class Comparison:
    """What two results have in common, in the order of the first, and the names that only one of them has."""

    changes: tuple[Change, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare(first: Results, second: Results) -> Comparison:
    """Match rows by workload, case, sizes and mode, and bars by what they compare."""
    ours, theirs = _figures(first), _figures(second)
    both = tuple(Change(name, figure, theirs[name]) for name, figure in ours.items() if name in theirs)
    return Comparison(
        both, tuple(name for name in ours if name not in theirs), tuple(name for name in theirs if name not in ours)
    )


def print_comparison(first: Path, second: Path, console: Any = None) -> None:
    """Print the table of both files, and what only one of them holds.

    Raises:
        UnreadableResults: a file holds no results, or results of another schema; the message names it.
    """
    results = read_results(first), read_results(second)
    found = compare(*results)
    console = console or make_console()
    for name, path, one in zip("AB", (first, second), results, strict=True):
        console.print(f"{name}: {path} ({one.machine.device}, torch {one.machine.torch}, {one.machine.date})", markup=False)
    console.print(comparison_table(found) if found.changes else "Nothing was measured in both.")
    for name, only in (("A", found.only_first), ("B", found.only_second)):
        if only:
            console.print(f"Only in {name}: {'; '.join(only)}", markup=False)


def comparison_table(found: Comparison) -> Any:
    """A rich table with a line for each figure that both files hold."""
    table = make_table(("measured", "A", "B", "B / A", "spread"), "Compared")
    table.caption = "Medians. Spread: ratios of the quartiles that are farthest apart, from least to largest."
    for change in found.changes:
        ratio = f"{change.ratio:.3f}x" if change.ratio is not None else "-"
        spread = "{:.3f}-{:.3f}".format(*change.spread) if change.spread is not None else "-"
        table.add_row(change.name, str(change.first), str(change.second), ratio, spread)
    return table


def _figures(results: Results) -> dict[str, Figure]:
    figures = {_name(row): Figure(row.call, "us") for row in results.rows}
    return figures | {" ".join(filter(None, [bar.name, bar.where])): Figure(bar.measured, bar.unit) for bar in results.bars}


def _name(row: BenchRow) -> str:
    size = f"M={row.rows} G={row.groups}" if row.groups else f"{'M' if row.workload == 'wo_a' else 'batch'}={row.rows}"
    return f"{row.workload} {row.case} {size} {row.mode}"
