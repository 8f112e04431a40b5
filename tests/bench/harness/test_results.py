from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.markup import render

from graphs.bench.harness.compare import compare, comparison_table
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.rows import BarRow, BenchRow, Machine, Results, read_results, with_capture_cost
from graphs.bench.harness.sampling import Spread
from graphs.bench.harness.table import bars_table, launches, results_table
from graphs.bench.wo_a.plot import draw_projections
from graphs.bench.wo_a.table import projection_bars_table, projections_table

MACHINE = Machine("a GPU", "580", "2.11", "3.6", "5.17", "3.12", "Linux", 1, "2026-01-01T00:00:00+00:00", "CUDA 13.0")
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def spread(median: float) -> Spread:
    return Spread(median, median * 0.9, median * 1.1, 20)


def row(workload: str, case: str, rows: int, mode: str, host: float, device: float | None, launched: int | None = 1) -> BenchRow:
    operations = 32 if workload == "wo_a" else 1
    rate = spread(rows * 1e6 / max(host, device or 0.0))
    return BenchRow(
        workload, case, rows, mode, operations, spread(host), spread(device) if device else None, rate, None, launched
    )


@pytest.fixture
def results() -> Results:
    decode = with_capture_cost(
        row("decode", "Llama", 4, "eager", 12000.0, 3500.0, 600), row("decode", "Llama", 4, "graph", 30.0, 3000.0), 0.9, 1 << 20
    )
    wo_a = with_capture_cost(
        row("wo_a", "gloop", 64, "eager", 200.0, 30.0, 96), row("wo_a", "gloop", 64, "graph", 0.3, 30.0), 0.5, 0
    )
    bars = (
        BarRow("captured over bare", "at most +20 us", "us", spread(9.0), 20.0, False, {"captured": spread(12.0)}, "a GPU"),
        BarRow(
            "reduce-overhead over captured", "at least 10x", "x", spread(5.0), 10.0, True, {"captured": spread(30.0)}, "a GPU"
        ),
    )
    return Results(MACHINE, 20, False, ("sizes of a test",), (*decode, *wo_a), bars)


def printed(table: Any) -> str:
    """The table at 80 columns: no line is longer, and no word of a cell is cut."""
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    words = text.split()
    for column in table.columns:
        for cell in column._cells:
            assert set(render(str(cell)).plain.split()) <= set(words), cell
    return text


def test_break_even_is_the_capture_over_what_a_call_saves() -> None:
    eager, graph = row("decode", "Llama", 1, "eager", 100.0, None), row("decode", "Llama", 1, "graph", 60.0, None)
    assert with_capture_cost(eager, graph, 0.001, 0)[1].break_even_calls == 25
    assert with_capture_cost(eager, eager, 0.001, 0)[1].break_even_calls is None
    eager, graph = row("wo_a", "bmm", 1, "eager", 2.0, None), row("wo_a", "bmm", 1, "graph", 1.0, None)
    assert with_capture_cost(eager, graph, 0.001, 0)[1].break_even_calls == 32  # calls of 32 projections


def test_the_table_of_decode_steps(results: Results) -> None:
    text = printed(results_table(results))
    for word in (
        "host",
        "device",
        "launches",
        "tokens",
        "break-even",
        "decode, Llama",
        "sizes of a test",
        "a GPU",
    ):
        assert word in text
    graph = next(line for line in text.splitlines() if "graph" in line and "3,000" in line)
    assert graph.split() == ["4", "graph", "30.0", "3,000", "1", "1,333", "100", "4.00x"]


def test_tables_hold_large_numbers(results: Results) -> None:
    slow = with_capture_cost(
        row("decode", "a Llama of a long name", 1024, "eager", 999_999.0, 888_888.0, 12_345),
        row("decode", "a Llama of a long name", 1024, "graph", 888_888.0, 888_887.0, 12_345),
        99_999.0,
        0,
    )
    wide = with_capture_cost(
        row("wo_a", "aiter gloop", 1024, "eager", 99_999.0, 88_888.0, 96),
        row("wo_a", "aiter gloop", 1024, "graph", 0.3, 88_888.0),
        0.5,
        0,
    )
    wide = tuple(
        dataclasses.replace(one, groups=16, error=0.0379, weight_bytes=67_000_000, first_call_seconds=123.4) for one in wide
    )
    floor = dataclasses.replace(row("wo_a", "read floor", 1024, "graph", 1.0, 12_345.0), groups=16)
    results = dataclasses.replace(results, rows=(*slow, *wide, floor))
    assert "899,992" in printed(results_table(results))
    text = printed(projections_table(results))
    assert "G=16 M=1024" in text and "aiter gloop" in text and "99,999" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*_*.json")), ids=lambda path: path.stem)
def test_tables_of_real_results_hold_at_80_columns(path: Path) -> None:
    if "rows" not in json.loads(path.read_text()):
        pytest.skip(f"{path.name} is no result of `graphs bench`")
    results = read_results(path)
    for table in (results_table, bars_table, projections_table, projection_bars_table):
        printed(table(results))
    printed(comparison_table(compare(results, results)))


def test_launches_per_operation(results: Results) -> None:
    assert [launches(row) for row in results.rows] == ["600", "1", "3", "1/32"]
    assert launches(row("decode", "Llama", 1, "eager", 1.0, None, None)) == "-"


def test_bars_say_whether_they_are_met(results: Results) -> None:
    text = printed(bars_table(results))
    assert [bar.met for bar in results.bars] == [True, False]
    assert "met" in text and "missed" in text and "captured 12.0 us" in text


def test_json_schema(results: Results) -> None:
    found = json.loads(results.to_json())
    assert set(found) == {"machine", "runs", "quick", "notes", "rows", "bars", "schema", "conclusion"}
    assert found["schema"] == 1
    assert set(found["machine"]) == {
        "device",
        "driver",
        "torch",
        "triton",
        "transformers",
        "python",
        "platform",
        "threads",
        "date",
        "toolkit",
    }
    assert len(found["rows"]) == 4
    assert set(found["rows"][0]["host_us"]) == {"median", "low", "high", "runs"}
    assert {"tokens_per_second", "launches", "break_even_calls", "device_us"} <= set(found["rows"][0])
    assert [bar["met"] for bar in found["bars"]] == [True, False]


def test_results_are_read_as_they_were_written(results: Results, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(results.to_json())
    assert read_results(file) == results


def test_results_of_an_earlier_run_have_defaults(results: Results, tmp_path: Path) -> None:
    plain = json.loads(results.to_json())
    del plain["conclusion"], plain["machine"]["toolkit"], plain["rows"][0]["groups"]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(plain))
    assert read_results(file) == dataclasses.replace(results, machine=dataclasses.replace(MACHINE, toolkit=""))


def test_the_machine_is_described() -> None:
    machine = describe_machine(torch.device("cpu"))
    assert machine.torch == torch.__version__ and machine.python == platform.python_version()
    assert machine.device and machine.toolkit and machine.driver == "none"


def test_the_figure_of_the_projections_is_a_png(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'stepgraphs[bench]'")
    draw_projections(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
