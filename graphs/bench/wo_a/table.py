"""The grouped projection as two tables: times of both modes side by side, and the bars."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from graphs.bench.harness.rows import BarRow, BenchRow, Results
from graphs.bench.harness.table import caption, launches, make_table, microseconds, outcome, pairs
from graphs.bench.wo_a.bars import FLOOR

BASE = "einsum"  # what the other paths are compared with
_COLUMNS = (
    "path", "laun-\nches", "eager\nus", "graph\nus", "eager\nover\neinsum", "graph\nover\neinsum", "gap\nre-\nmoved",
    "graph\nover\nfloor", "error", "MB", "first\ncall s",
)  # fmt: skip
_BARS = {"bar": 17, "limit": 11, "worst": 12, "met": 8, "outcome": 7, "missed at": 14}  # characters


def projections_table(results: Results) -> Any:
    """A rich table with a line for each G, M and path."""
    table = make_table(_COLUMNS, "Grouped projections: us per projection, eager and replayed", {"path": 11}, gap=1)
    table.caption = caption(results) + (
        "\nGap removed: the share of what a path takes more than einsum in eager mode that it no longer takes in graph mode. "
        "MB: weight and scales of one projection."
    )
    found = [(eager, graph) for eager, graph in pairs(results) if eager.workload == "wo_a"]
    floors = {(row.groups, row.rows): row for row in results.rows if row.case == FLOOR}
    for (groups, tokens), rows in groupby(found, key=lambda pair: (pair[0].groups, pair[0].rows)):
        lines = list(rows)
        base = next((pair for pair in lines if pair[0].case == BASE), None)
        floor = floors.get((groups, tokens))
        table.add_row(f"[bold]G={groups} M={tokens}[/bold]")
        if floor:
            table.add_row(FLOOR, "", "", microseconds(floor.call_us))
        for eager, graph in lines:
            table.add_row(*cells(eager, graph, base, floor))
        table.add_section()
    return table


def cells(eager: BenchRow, graph: BenchRow, base: tuple[BenchRow, BenchRow] | None, floor: BenchRow | None) -> tuple[str, ...]:
    """One line as text; ``base`` are the rows of einsum at the same G and M, ``floor`` that of only reading the weight."""
    over = [f"{row.call_us / other.call_us:.2f}x" for row, other in zip((eager, graph), base, strict=True)] if base else ["", ""]
    return (
        eager.case,
        launches(eager),
        microseconds(eager.call_us),
        microseconds(graph.call_us),
        *over,
        gap_removed(eager, graph, base),
        f"{graph.call_us / floor.call_us:.2f}x" if floor else "",
        f"{eager.error:.4f}" if eager.error is not None else "",
        f"{eager.weight_bytes / 1e6:.3g}",
        f"{eager.first_call_seconds:.2f}",
    )


def gap_removed(eager: BenchRow, graph: BenchRow, base: tuple[BenchRow, BenchRow] | None) -> str:
    """How much of the distance to einsum in eager mode is gone in graph mode; nothing for a path that is not behind."""
    if base is None or eager.call_us <= base[0].call_us:
        return "-"
    return f"{1 - (graph.call_us - base[1].call_us) / (eager.call_us - base[0].call_us):.0%}"


def projection_bars_table(results: Results) -> Any:
    """A rich table with a line for each limit: the worst case it holds for, how many cases meet it, and which do not."""
    table = make_table(
        ("bar", "limit", "worst", "met", "outcome", "missed at"), "Bars of the grouped projection, graph mode", _BARS
    )
    grouped: dict[str, list[BarRow]] = {}
    for bar in results.bars:
        if bar.where:
            grouped.setdefault(bar.name, []).append(bar)
    for name, bars in grouped.items():
        worst = max(bars, key=lambda bar: bar.measured.median)
        missed = [f"{bar.where}: {bar.measured.median:.3g}" for bar in bars if not bar.met]
        measured = f"{worst.measured.median:.3g}{worst.unit} ({worst.where})"
        met = f"{len(bars) - len(missed)} of {len(bars)}"
        table.add_row(name, worst.bar.removeprefix("at most "), measured, met, outcome(worst), "; ".join(missed))
    return table
