"""A parity report as a table for a terminal of 80 columns."""

from __future__ import annotations

import io
import os

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphs.parity.rows import ParityDifference, ParityRow, Rows

_WIDTH = 80


def as_text(report: Rows) -> str:
    """The conclusion in one sentence, a row for each context and variation, and the first difference."""
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH)
    console.print(Text(conclusion(report)))
    console.print(_table(report))
    if report.first is not None:
        console.print(Text("\n".join(_first(report.first))))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def conclusion(report: Rows) -> str:
    """What came out, in one sentence."""
    calls, replays = sum(row.calls for row in report.rows), sum(row.replays for row in report.rows)
    wrong = sum(row.differences for row in report.rows)
    told = f"{calls} calls of {report.name} on {report.device} captured and eager, {replays} replayed"
    return f"{told}: {'all the same.' if report.ok else f'{wrong} DIFFER.'}"


def _table(report: Rows) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, width=_WIDTH)
    table.add_column("variation", ratio=1, overflow="fold")
    for name in ("tried", "calls", "replays", "eager", "differ"):
        table.add_column(name, justify="right", no_wrap=True)
    context = None
    for row in report.rows:
        if row.context != context:
            context = row.context
            table.add_row(Text(context, "bold"))
        tried = f"{row.tried}/{row.found}" if row.found else ""
        differ = Text(str(row.differences), "red" if row.differences else "")
        table.add_row(_variation(row), tried, str(row.calls), str(row.replays), str(row.eager_calls), differ)
    return table


def _variation(row: ParityRow) -> Text:
    text = Text(f"  {row.variation}")
    for reason in row.reasons:
        text.append(f"\n    eager: {reason}", "dim")
    return text


def _first(first: ParityDifference) -> list[str]:
    lines = ["", f"First difference: {first.context}, {first.variation}, call {first.call}: {first.what}", f"  {first.detail}"]
    if first.toggled:
        lines.append(f"  after {first.toggled}")
    if first.file:
        lines.append(f"  {os.path.relpath(first.file) if first.file.startswith(os.getcwd()) else first.file}:{first.line}")
        lines.append(f"    {first.source}")
    return lines
