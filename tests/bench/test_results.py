from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from graphs.bench.harness.rows import BarRow, BenchRow, Machine, Results, with_capture_cost
from graphs.bench.harness.sampling import Spread
from graphs.bench.harness.table import bars_table, launches, results_table
from graphs.bench.wo_a.plot import draw_results

MACHINE = Machine("a GPU", "580", "2.11", "3.6", "5.17", "3.12", "Linux", 1, "2026-01-01T00:00:00+00:00")


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


def printed(table: object) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_break_even_is_the_capture_over_what_a_call_saves() -> None:
    eager, graph = row("decode", "Llama", 1, "eager", 100.0, None), row("decode", "Llama", 1, "graph", 60.0, None)
    assert with_capture_cost(eager, graph, 0.001, 0)[1].break_even_calls == 25
    assert with_capture_cost(eager, eager, 0.001, 0)[1].break_even_calls is None
    eager, graph = row("wo_a", "bmm", 1, "eager", 2.0, None), row("wo_a", "bmm", 1, "graph", 1.0, None)
    assert with_capture_cost(eager, graph, 0.001, 0)[1].break_even_calls == 32  # calls of 32 projections


def test_table_has_the_promised_columns_and_fits_100(results: Results) -> None:
    text = printed(results_table(results))
    assert max(map(len, text.splitlines())) <= 100
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
    graph = next(line for line in text.splitlines() if "Llama" in line and "graph" in line)
    assert [cell.strip() for cell in graph.strip("│").split("│")] == [
        "decode, Llama",
        "4",
        "graph",
        "30.0",
        "3,000",
        "1",
        "1,333",
        "100",
        "4.00x",
    ]


def test_launches_per_operation(results: Results) -> None:
    assert [launches(row) for row in results.rows] == ["600", "1", "3", "1/32"]
    assert launches(row("decode", "Llama", 1, "eager", 1.0, None, None)) == "-"


def test_bars_say_whether_they_are_met(results: Results) -> None:
    text = printed(bars_table(results))
    assert [bar.met for bar in results.bars] == [True, False]
    assert "met" in text and "missed" in text and "captured 12.0 us" in text


def test_json_schema(results: Results) -> None:
    found = json.loads(results.to_json())
    assert set(found) == {"machine", "runs", "quick", "notes", "rows", "bars", "schema"}
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
    }
    assert len(found["rows"]) == 4
    assert set(found["rows"][0]["host_us"]) == {"median", "low", "high", "runs"}
    assert {"tokens_per_second", "launches", "break_even_calls", "device_us"} <= set(found["rows"][0])
    assert [bar["met"] for bar in found["bars"]] == [True, False]


def test_figure_is_a_png(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'stepgraphs[bench]'")
    draw_results(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
