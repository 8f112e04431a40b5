"""The forms of ``generate()`` as a table of 80 columns."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from graphs.bench.harness.rows import BenchRow, Results
from graphs.bench.harness.table import make_table, microseconds, where

BASE = "dynamic"  # what the other forms are compared with
_COLUMNS = ("mode", "first\ncall s", "us per\nstep", "tokens\nper s", "quartiles", "equal\ntokens", "record-\nings", "gain")


def generate_table(results: Results) -> Any:
    """A rich table with a line for each model and form."""
    table = make_table(_COLUMNS, "generate(): tokens per second")
    measured = [row for row in results.rows if row.workload == "generate"]
    runs = min((row.host_us.runs for row in measured), default=0)
    lines = [
        f"{where(results.machine)}, transformers {results.machine.transformers}",
        f"Medians of {runs} runs. Equal tokens, gain: against the dynamic cache, eager.",
    ]
    table.caption = "\n".join([*lines, *results.notes])
    for case, of_case in groupby(measured, key=lambda row: row.case):
        rows = list(of_case)
        base = next((row for row in rows if row.mode == BASE), None)
        table.add_row(f"[bold]{case}[/bold]")
        for row in rows:
            table.add_row(*cells(row, base))
        table.add_section()
    return table


def cells(row: BenchRow, base: BenchRow | None) -> tuple[str, ...]:
    """One line as text; ``base`` is the row that the gain is taken against."""
    rate = row.tokens_per_second
    return (
        row.mode,
        f"{row.first_call_seconds:.2f}",
        microseconds(row.host_us.median),
        f"{rate.median:,.0f}",
        f"{rate.low:,.0f}-{rate.high:,.0f}",
        "-" if row.equal_tokens is None else f"{row.equal_tokens:.0%}",
        str(row.recordings),
        f"{rate.median / base.tokens_per_second.median:.2f}x" if base is not None else "",
    )
