"""Measuring again which path ``auto`` should take on this machine, and keeping the answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from graphs.bench.choices import OPERATORS
from graphs.bench.harness.progress import Progress, make_console
from graphs.bench.harness.rows import BenchRow
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a.measure import measure_wo_a, selection_for
from graphs.environment import choice
from graphs.errors import ConfigError
from graphs.ops.wo_a import auto_path, tuned_path


def tune(operator: str, settings: BenchSettings, console: Any = None) -> Path:
    """Time the paths of ``auto`` at every G and M, write the rules that follow, and return the file they are in.

    Projections built from then on, with these versions and on such a device, follow them.

    Raises:
        ConfigError: no such operator, or a path that ``auto`` never takes.
        WrongResult: a path computes something else than float64.
        OSError: the file cannot be written.
    """
    choice("operator", operator, OPERATORS)
    if not set(settings.paths) <= set(auto_path.EXACT):
        raise ConfigError("--paths", ",".join(settings.paths), f"some of {', '.join(auto_path.EXACT)}: auto takes no other")
    console = console or make_console()
    paths = settings.paths or auto_path.EXACT
    selection = selection_for(dataclasses.replace(settings, paths=paths))
    cases = measure_wo_a(settings, Progress(console), selection).cases
    rows = [row for case in cases for row in case.rows if row.mode == "graph" and row.case in paths]
    rules = tuned_path.rules_from(times_of(rows))
    measured = [{"groups": row.groups, "tokens": row.rows, "path": row.case, "us": round(row.call_us, 3)} for row in rows]
    path = tuned_path.write(settings.device, rules, measured)
    for groups, limits in rules.items():
        console.print(f"G={groups}: " + ", ".join(f"{name} up to M={limit}" for limit, name in limits) + " and beyond")
    console.print(f"{selection.describe()}\nWritten to {path}", soft_wrap=True)
    return path


def times_of(rows: list[BenchRow]) -> dict[tuple[int, int], dict[str, float]]:
    """``(G, M) -> path -> microseconds``."""
    times: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        times.setdefault((row.groups, row.rows), {})[row.case] = row.call_us
    return times
