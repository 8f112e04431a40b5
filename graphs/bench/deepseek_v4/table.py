"""The forms of a step as two tables of 80 columns: its time, and its kernels."""

from __future__ import annotations

from typing import Any

from graphs.bench.deepseek_v4.kinds import KINDS
from graphs.bench.harness.rows import BenchRow, Results
from graphs.bench.harness.table import make_table, where

_COLUMNS = ("mode", "first\ncall s", "ms per\nstep", "quartiles", "tokens\nper s", "kernels", "equal\ntokens", "gain")


def steps_table(results: Results) -> Any:
    """A rich table with a line for each form."""
    rows = _rows(results)
    table = make_table(_COLUMNS, "A decode step of DeepSeek-V4")
    runs = min((row.host_us.runs for row in rows), default=0)
    added = "+: with these rewrites too. Kernels: of a step; on a CPU, operators."
    table.caption = "\n".join([where(results.machine), f"Medians of {runs} runs.", added, *results.notes])
    base = next((row for row in rows if row.mode == "eager"), None)
    for row in rows:
        table.add_row(*cells(row, base))
    return table


def cells(row: BenchRow, base: BenchRow | None) -> tuple[str, ...]:
    """One line as text; ``base`` is the row that the gain is taken against."""
    times = row.host_us
    return (
        row.mode,
        f"{row.first_call_seconds:.1f}",
        f"{times.median / 1e3:.2f}",
        f"{times.low / 1e3:.2f}-{times.high / 1e3:.2f}",
        f"{row.tokens_per_second.median:,.0f}",
        f"{sum(row.kernels.values()):,}",
        "-" if row.equal_tokens is None else f"{row.equal_tokens:.0%}",
        f"{base.host_us.median / times.median:.2f}x" if base is not None else "",
    )


def kernels_table(results: Results) -> Any:
    """A rich table with a line for each form: kernels per layer by kind."""
    kinds = tuple(kind for kind, _ in KINDS)
    table = make_table(("mode", "all", *kinds), "Kernels per layer by kind", gap=1)
    for row in _rows(results):
        counts = (sum(row.kernels.values()), *(row.kernels.get(kind, 0) for kind in kinds))
        table.add_row(row.mode, *(f"{count / row.operations:.1f}" for count in counts))
    return table


def _rows(results: Results) -> list[BenchRow]:
    return [row for row in results.rows if row.workload == "deepseek_v4"]
