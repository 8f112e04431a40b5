"""The grouped projection as one figure: eager and graph bars at each M, a panel for each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphs.bench.choices import OURS
from graphs.bench.harness.optional import optional_module
from graphs.bench.harness.rows import BenchRow, Results
from graphs.bench.harness.table import pairs

_COLOURS = {"eager": "#b0b7c3", "graph": "#2563a8"}
_WIDTH = 0.38


def draw_projections(results: Results, path: Path) -> None:
    """Write a PNG to ``path``: one panel for each path, each with its own scale from zero."""
    optional_module("matplotlib").use("Agg")
    plt = optional_module("matplotlib.pyplot")
    panels = _panels(results)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels) + 0.6, 4.0), squeeze=False, layout="constrained")
    for axis, (title, found) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, title, found)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    machine = results.machine
    figure.suptitle(f"Eager and replayed on {machine.device}, torch {machine.torch}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panels(results: Results) -> dict[str, list[tuple[BenchRow, BenchRow]]]:
    """Rows of each panel by its title; of the grouped projection the paths of this project, at the smallest G."""
    panels: dict[str, list[tuple[BenchRow, BenchRow]]] = {}
    found = [pair for pair in pairs(results) if pair[0].workload == "wo_a"]
    fewest = min(eager.groups for eager, _ in found)
    for eager, graph in found:
        if eager.groups == fewest and eager.case in OURS:
            panels.setdefault(eager.case, []).append((eager, graph))
    return panels


def _draw_panel(axis: Any, title: str, found: list[tuple[BenchRow, BenchRow]]) -> None:
    for offset, mode in ((-_WIDTH / 2, "eager"), (_WIDTH / 2, "graph")):
        times = [(eager if mode == "eager" else graph).call_us for eager, graph in found]
        places = [index + offset for index in range(len(times))]
        drawn = axis.bar(places, times, _WIDTH, color=_COLOURS[mode], label=mode)
        axis.bar_label(drawn, [f"{time:.3g}" if time < 1000 else f"{time:.0f}" for time in times], fontsize=7, padding=1)
    axis.margins(y=0.1)
    axis.set_xticks(range(len(found)), [str(eager.rows) for eager, _ in found])
    axis.set_xlabel("tokens M")
    axis.set_ylabel("us per projection", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
