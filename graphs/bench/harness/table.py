"""The results as tables for a terminal of 100 columns."""

from __future__ import annotations

from typing import Any

from graphs.bench.harness.optional import optional_module
from graphs.bench.harness.rows import BarRow, BenchRow, Results

_COLUMNS = ("workload", "rows", "mode", "host\nus", "device\nus", "launches", "tokens\nper s", "break-even\ncalls", "gain")


def results_table(results: Results) -> Any:
    """A rich table with two lines, eager and graph, for each batch size of decoding."""
    table = make_table(_COLUMNS, "Decode steps, eager and replayed")
    table.caption = caption(results)
    found = [(eager, graph) for eager, graph in pairs(results) if eager.workload != "wo_a"]
    for (eager, graph), following in zip(found, [*found[1:], None], strict=True):
        last = following is None or following[0].case != graph.case
        for row in (eager, graph):
            table.add_row(*cells(row, eager), end_section=last and row is graph)
    return table


def bars_table(results: Results) -> Any:
    """A rich table of the bars: limit, measured ratio or difference, both sides, and whether the bar is met."""
    table = make_table(("bar", "limit", "measured", "quartiles", "outcome"), "Overhead")
    for bar in (bar for bar in results.bars if not bar.where):
        name = f"{bar.name}\n[dim]{_sides(bar)}[/dim]"
        quartiles = f"{bar.measured.low:.3g}-{bar.measured.high:.3g}"
        table.add_row(name, bar.bar, f"{bar.measured.median:.3g} {bar.unit}", quartiles, outcome(bar), end_section=True)
    return table


def pairs(results: Results) -> list[tuple[BenchRow, BenchRow]]:
    """Eager and graph rows of each workload, in the order measured."""
    found: dict[tuple[str, str, int, int], dict[str, BenchRow]] = {}
    for row in results.rows:
        found.setdefault((row.workload, row.case, row.groups, row.rows), {})[row.mode] = row
    return [(modes["eager"], modes["graph"]) for modes in found.values() if len(modes) == 2]


def cells(row: BenchRow, eager: BenchRow) -> tuple[str, ...]:
    """One line of the table as text; ``eager`` is the row that the gain is taken against."""
    graph = row.mode == "graph"
    return (
        f"{row.workload}, {row.case}",
        str(row.rows),
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


def make_table(columns: tuple[str, ...], title: str) -> Any:
    """An empty rich table; the first column, modes, limits and outcomes stand left, numbers right."""
    table = optional_module("rich.table").Table(title=title, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        wide = index == 0
        table.add_column(
            column,
            justify="left" if wide or column in ("mode", "limit", "outcome") else "right",
            no_wrap=wide and column == "workload",
        )
    return table


def caption(results: Results) -> str:
    """Where and how the results were measured."""
    machine = results.machine
    counted = "submissions of the host" if machine.driver != "none" else "operators dispatched"
    lines = [
        f"{machine.device}, driver {machine.driver}, torch {machine.torch}, triton {machine.triton}, Python {machine.python}, "
        f"{machine.threads} CPU thread(s)",
        f"Medians of {results.runs} runs. Launches: {counted}. Gain: tokens per second, graph over eager. "
        "Break-even: calls that pay for the recording.",
        *results.notes,
    ]
    return "\n".join(lines)


def microseconds(us: float) -> str:
    """As text, with a digit after the point where it says something."""
    return f"{us:,.1f}" if us < 100 else f"{us:,.0f}"


def _rate(per_second: float) -> str:
    return f"{per_second / 1e6:,.1f}M" if per_second >= 1e6 else f"{per_second:,.0f}"


def _sides(bar: BarRow) -> str:
    return ", ".join(f"{name} {microseconds(spread.median)} us" for name, spread in bar.sides.items())
