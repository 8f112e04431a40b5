"""How launch overhead amortises, as one figure: time per step over batch, and cumulative time over calls."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from graphs.bench.decode.amortise import Amortisation
from graphs.bench.harness.optional import optional_module
from graphs.bench.harness.rows import Machine

HOST, DEVICE, REPLAY = "#b45309", "#6b7280", "#2563a8"
_SIZE, _DPI = (10.0, 4.8), 150  # inches, and dots per inch
_SENTENCE_WIDTH = 112  # characters per line above the panels
_HEADROOM = 1.25  # of what is drawn, so that the legend stands above it
_SHOWN = 2.5  # of the calls until break-even
_SHOWN_WITHOUT = 1000  # calls, where there is no break-even


def draw_amortisation(found: Amortisation, machine: Machine, path: Path) -> None:
    """Write a PNG to ``path``: the sentence, a panel over batch sizes, a panel over calls at the smallest batch."""
    optional_module("matplotlib").use("Agg")
    plt = optional_module("matplotlib.pyplot")
    figure, (steps, calls) = plt.subplots(1, 2, figsize=_SIZE, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.08)
    _draw_steps(steps, found)
    _draw_calls(calls, found)
    sentence = re.sub(r"(\d) (ms|s|calls)\b", "\\1\u00a0\\2", found.sentence())  # a number stays with its unit
    figure.suptitle(textwrap.fill(sentence, _SENTENCE_WIDTH), x=0.01, ha="left", fontsize=10.5)
    toolkit = [machine.toolkit] if machine.toolkit not in ("", "none") else []
    versions = ", ".join([machine.device, f"torch {machine.torch}", *toolkit])
    figure.supxlabel(versions, x=0.99, ha="right", fontsize=8, color="#6b7280")
    figure.savefig(path)
    plt.close(figure)


def _draw_steps(axis: Any, found: Amortisation) -> None:
    lines = [
        ("eager, host", found.host_us, HOST),
        ("eager, device", found.device_us, DEVICE),
        ("replay", found.replay_us, REPLAY),
    ]
    if not found.on_device:
        lines = [("eager", found.eager_us, HOST), ("operator tape", found.replay_us, REPLAY)]
    for name, times, colour in lines:
        axis.plot(range(len(times)), [us / 1e3 for us in times], color=colour, marker="o", markersize=4, label=name)
    axis.set_xticks(range(len(found.batches)), [str(batch) for batch in found.batches])
    axis.set_xlim(-0.3, len(found.batches) - 0.7)
    _label(axis, "Time per decode step", "batch size (sequences)", "time per step (ms)")


def _draw_calls(axis: Any, found: Amortisation) -> None:
    """Two straight lines: eager from zero, recorded from the cost of the recording; they meet where that is paid back."""
    eager, replay, cost, even = found.eager_us[0] / 1e6, found.replay_us[0] / 1e6, found.capture_seconds[0], found.break_even[0]
    last = round(_SHOWN * even) if even is not None else _SHOWN_WITHOUT
    axis.plot([0, last], [0, eager * last], color=HOST, label="eager")
    axis.plot([0, last], [cost, cost + replay * last], color=REPLAY, label="recording, then replays")
    axis.set_xlim(0, last)
    if even is not None:
        axis.plot([even, even], [0, eager * even], ":", color="black", linewidth=1)
        axis.plot(even, eager * even, "o", color="black", markersize=5)
        text = f"break-even:\n{even:,} calls"
        axis.annotate(text, (even, eager * even), (8, -10), textcoords="offset points", va="top", fontsize=9)
    else:
        axis.text(0.97, 0.03, "no break-even", transform=axis.transAxes, ha="right", fontsize=9)
    _label(axis, f"Cumulative time at batch {found.batches[0]}", "calls", "time since the first call (s)")


def _label(axis: Any, title: str, across: str, up: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(across, fontsize=9)
    axis.set_ylabel(up, fontsize=9)
    axis.set_ylim(0, _HEADROOM * max(max(line.get_ydata()) for line in axis.get_lines()))
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(facecolor="white", edgecolor="none", framealpha=1, fontsize=9, loc="upper left", ncols=3)
