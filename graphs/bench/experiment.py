"""The whole run: measure, count, print, and leave a JSON file and a figure behind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from graphs.bench.choices import EXPERIMENTS
from graphs.bench.compile.inductor import measure_compilers
from graphs.bench.decode.amortise import Amortisation
from graphs.bench.decode.llama import size_for
from graphs.bench.decode.measure import measure_decode
from graphs.bench.decode.plot import draw_amortisation
from graphs.bench.deepseek_v4.measure import measure_deepseek_v4, workload_for
from graphs.bench.deepseek_v4.table import kernels_table, steps_table
from graphs.bench.generate.measure import chosen_workloads, measure_generate
from graphs.bench.generate.table import generate_table
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.progress import Progress, make_console
from graphs.bench.harness.rows import BenchRow, Case, Results
from graphs.bench.harness.table import bars_table, results_table
from graphs.bench.overhead import measure_bars
from graphs.bench.settings import BenchSettings
from graphs.bench.syncs.measure import measure_syncs
from graphs.bench.wo_a.measure import measure_wo_a, selection_for
from graphs.bench.wo_a.paths import absent
from graphs.bench.wo_a.plot import draw_projections
from graphs.bench.wo_a.table import projection_bars_table, projections_table
from graphs.environment import choice
from graphs.observation.launches import count_launches


def run_bench(experiment: str, settings: BenchSettings, out: Path, console: Any = None) -> Results:
    """Run one experiment, or ``all``; print a sentence and tables, and write ``results.json`` and ``results.png`` into ``out``.

    A single experiment writes files of its own name. The JSON file is written after each part, so that a failure in
    a later one loses nothing.

    Raises:
        ConfigError: no such experiment.
        WrongResult: something to be timed computes another result than its reference.
        MissingDependency: a package that the experiment needs is not installed.
    """
    choice("experiment", experiment, EXPERIMENTS)
    console = console or make_console()
    out.mkdir(parents=True, exist_ok=True)
    stem = out / ("results" if experiment == "all" else experiment)
    with _one_cpu_thread():
        results = _measure(experiment, settings, Progress(console), stem)
    _print(results, console)
    written = [stem.with_suffix(".json").name]
    if _draw(results, stem.with_suffix(".png")):
        written.append(stem.with_suffix(".png").name)
    console.print(f"Written to {out}: {', '.join(written)}", markup=False)
    return results


def _print(results: Results, console: Any) -> None:
    """The sentence that all of it comes down to, then the tables of what was measured."""
    workloads = {row.workload for row in results.rows}
    if results.conclusion:
        console.print(f"\n{results.conclusion}\n", markup=False)
    if "decode" in workloads:
        console.print(results_table(results))
    if "wo_a" in workloads:
        console.print(projections_table(results))
        console.print(projection_bars_table(results))
    if "generate" in workloads:
        console.print(generate_table(results))
    if "deepseek_v4" in workloads:
        console.print(steps_table(results))
        console.print(kernels_table(results))
    if any(not bar.where for bar in results.bars):
        console.print(bars_table(results))


def _draw(results: Results, path: Path) -> bool:
    """One figure: how launch overhead amortises, or the paths of the projection where only those were measured; else none."""
    found = Amortisation.of(results)
    if found is not None:
        draw_amortisation(found, results.machine, path)
    elif projections := any(row.workload == "wo_a" for row in results.rows):
        draw_projections(results, path)
    return found is not None or projections


def _measure(experiment: str, settings: BenchSettings, progress: Progress, stem: Path) -> Results:
    """Everything that is asked for, written to the JSON file as it comes in."""
    results = Results(describe_machine(settings.device), settings.runs, settings.quick, _notes(experiment, settings))
    cases: list[Case] = []
    if experiment in ("all", "decode"):
        cases += measure_decode(settings, progress)
        results = _kept(results, stem, rows=_rows(cases))
    if experiment in ("all", "wo_a"):
        found = measure_wo_a(settings, progress, selection_for(settings, experiment))
        cases += found.cases
        results = _kept(results, stem, rows=_rows(cases), bars=tuple(found.bars), notes=(*results.notes, *found.notes))
    if experiment in ("all", "overhead"):
        results = _kept(results, stem, bars=(*results.bars, *measure_bars(settings, progress)))
    if experiment == "compile":  # takes minutes, so it is not part of "all"
        results = _kept(results, stem, bars=tuple(measure_compilers(settings, progress)))
    if experiment == "syncs":
        results = _kept(results, stem, bars=tuple(measure_syncs(settings, progress)))
    if experiment == "generate":  # minutes too, for two models are compiled
        rows, bars = measure_generate(settings, progress)
        results = _kept(results, stem, rows=tuple(rows), bars=tuple(bars))
    if experiment == "deepseek_v4":
        rows, bars = measure_deepseek_v4(settings, progress)
        results = _kept(results, stem, rows=tuple(rows), bars=tuple(bars))
    return _kept(results, stem, rows=tuple(_count(cases, settings, progress))) if cases else results


def _rows(cases: list[Case]) -> tuple[BenchRow, ...]:
    return tuple(row for case in cases for row in case.rows)


def _kept(results: Results, stem: Path, **parts: Any) -> Results:
    """``results`` with ``parts`` replaced and concluded from, on disk as well."""
    results = dataclasses.replace(results, **parts)
    found = Amortisation.of(results)
    results = dataclasses.replace(results, conclusion=found.sentence() if found is not None else "")
    stem.with_suffix(".json").write_text(results.to_json())
    return results


@contextlib.contextmanager
def _one_cpu_thread() -> Iterator[None]:
    """Operators on the CPU use one thread: toy sizes gain nothing from more, and their times would scatter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _count(cases: list[Case], settings: BenchSettings, progress: Progress) -> list[BenchRow]:
    """The rows with their submissions: counted last, since a profiler can slow down the launches after it."""
    rows = []
    with progress.case("counting launches", sum(len(case.calls) for case in cases)) as tick:
        for case in cases:
            for row in case.rows:
                if row.mode in case.calls:
                    row = dataclasses.replace(row, launches=count_launches(case.calls[row.mode], settings.device))
                    tick()
                rows.append(row)
    return rows


def _notes(experiment: str, settings: BenchSettings) -> tuple[str, ...]:
    """What was measured, and that it is smaller where it is."""
    notes = []
    if experiment in ("all", "decode"):
        notes.append(size_for(settings.device).describe())
    if experiment in ("all", "wo_a"):
        selection = selection_for(settings, experiment)
        notes.append(selection.describe())
        notes += [f"{path} was not measured: {why}" for path in selection.paths if (why := absent(path, settings.device))]
    if experiment == "generate":
        notes += [workload.describe() for workload in chosen_workloads(settings)]
    if experiment == "deepseek_v4":
        notes.append(workload_for(settings.device).describe())
    if settings.device.type != "cuda" and notes:
        notes.append("No GPU was used: the model and the shapes are smaller than on a GPU, and graph mode is the operator tape.")
    return tuple(notes)
