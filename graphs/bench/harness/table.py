"""The results as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from graphs.bench.harness.optional import optional_module
from graphs.bench.harness.rows import BarRow, BenchRow, Machine, Results

_COLUMNS = ("batch", "mode", "host\nus", "device\nus", "launches", "tokens\nper s", "break-even\ncalls", "gain")
_LEFT = ("batch", "bar", "measured", "mode", "limit", "outcome", "path", "worst", "missed at")


def results_table(results: Results) -> Any:
    """A rich table with two lines, eager and graph, for each batch size of decoding."""
    table = make_table(_COLUMNS, "Decode steps, eager and replayed")
    table.caption = caption(results)
    found = [pair for pair in pairs(results) if pair[0].workload != "wo_a"]
    for case, of_case in groupby(found, key=lambda pair: f"{pair[0].workload}, {pair[0].case}"):
        table.add_row(f"[bold]{case}[/bold]")
        for eager, graph in of_case:
            table.add_row(*cells(eager, eager))
            table.add_row(*cells(graph, eager), end_section=True)
    return table


def bars_table(results: Results) -> Any:
    """A rich table of the bars: limit, measured ratio or difference, both sides, and whether the bar is met."""
    table = make_table(("bar", "limit", "median", "quartiles", "outcome"), "Overhead", {"limit": 13})
    for bar in (bar for bar in results.bars if not bar.where):
        name = f"{escape(bar.name)}\n[dim]{escape(_sides(bar))}[/dim]"
        quartiles = f"{bar.measured.low:.3g}-{bar.measured.high:.3g}"
        table.add_row(name, bar.bar, f"{bar.measured.median:.3g} {bar.unit}", quartiles, outcome(bar), end_section=True)
    return table


def pairs(results: Results) -> list[tuple[BenchRow, BenchRow]]:
    """Eager and graph rows of each workload, in the order measured."""
    found: dict[tuple[str, str, int, int], dict[str, BenchRow]] = {}
    for row in results.rows:
        found.setdefault((row.workload, row.case, row.groups, row.rows), {})[row.mode] = row
    return [(modes["eager"], modes["graph"]) for modes in found.values() if modes.keys() == {"eager", "graph"}]


def cells(row: BenchRow, eager: BenchRow) -> tuple[str, ...]:
    """One line of the table as text; ``eager`` is the row that the gain is taken against."""
    graph = row.mode == "graph"
    return (
        f"{row.rows:>5}",
        row.mode,
        microseconds(row.host_us.median),
        microseconds(row.device_us.median) if row.device_us is not None else "-",
        launches(row),
        _rate(row.tokens_per_second.median),
        ("never" if row.break_even_calls is None else f"{row.break_even_calls:,}") if graph else "",
        f"{row.tokens_per_second.median / eager.tokens_per_second.median:.2f}x" if graph else "",
    )


def launches(row: BenchRow) -> str:
    """Submissions per operation; a fraction where one launch serves several operations."""
    if row.launches is None:
        return "-"
    if row.launches < row.operations:
        return f"{row.launches}/{row.operations}"
    return f"{row.launches / row.operations:.4g}"


def outcome(bar: BarRow) -> str:
    """``met`` or ``missed``."""
    return "[green]met[/green]" if bar.met else "[red]missed[/red]"


def make_table(columns: tuple[str, ...], title: str, widths: Mapping[str, int] | None = None, *, gap: int = 2) -> Any:
    """An empty rich table: text stands left and wraps, numbers stand right on one line.

    Args:
        columns: headings, those of text in `_LEFT`.
        title: above the table.
        widths: of columns that do not take what their cells need, in characters.
        gap: spaces between columns, at least 1.
    """
    rich_table, box = optional_module("rich.table"), optional_module("rich.box")
    layout = {"box": box.SIMPLE_HEAD, "padding": (0, gap - 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = rich_table.Table(title=title, title_justify="left", caption_justify="left", **layout)
    for column in columns:
        text = column in _LEFT
        width, overflow = (widths or {}).get(column), "fold" if text else "ellipsis"
        table.add_column(column, justify="left" if text else "right", width=width, no_wrap=not text, overflow=overflow)
    return table


def caption(results: Results) -> str:
    """Where and how the results were measured."""
    counted = "submissions of the host" if results.machine.driver != "none" else "operators dispatched"
    lines = [
        where(results.machine),
        f"Medians of {results.runs} runs. Launches: {counted}. Gain: tokens per second, graph over eager. "
        "Break-even: calls that pay for the recording.",
        *results.notes,
    ]
    return "\n".join(lines)


def where(machine: Machine) -> str:
    """The machine and the versions."""
    toolkit = f" with {machine.toolkit}" if machine.toolkit not in ("", "none") else ""
    return (
        f"{machine.device}, driver {machine.driver}, torch {machine.torch}{toolkit}, triton {machine.triton}, "
        f"Python {machine.python}, {machine.threads} CPU thread(s)"
    )


def microseconds(us: float) -> str:
    """As text, with a digit after the point where it says something."""
    return f"{us:,.1f}" if us < 100 else f"{us:,.0f}"


def escape(text: str) -> str:
    """``text`` for a cell, with brackets that are no markup."""
    return str(optional_module("rich.markup").escape(text))


def _rate(per_second: float) -> str:
    return f"{per_second / 1e6:,.1f}M" if per_second >= 1e6 else f"{per_second:,.0f}"


def _sides(bar: BarRow) -> str:
    return ", ".join(f"{name} {microseconds(spread.median)} us" for name, spread in bar.sides.items())
