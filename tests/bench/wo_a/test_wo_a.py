from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from graphs.bench import tune
from graphs.bench.choices import OURS, PEERS
from graphs.bench.harness.progress import Progress, make_console
from graphs.bench.harness.rows import BenchRow, Machine, Results, WrongResult
from graphs.bench.harness.sampling import Spread
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a import measure as wo_a
from graphs.bench.wo_a import record as wo_a_record
from graphs.bench.wo_a.bars import TIMES, bars_of
from graphs.bench.wo_a.measure import Selection, activations, check, exact_results, make_weights, measure_wo_a
from graphs.bench.wo_a.paths import absent, build
from graphs.bench.wo_a.record import ProjectionStack, record
from graphs.bench.wo_a.table import gap_removed, projection_bars_table, projections_table
from graphs.errors import ConfigError, MissingDependency
from graphs.ops.wo_a import tuned_path

TINY = Selection("tiny", (2,), 128, 128, (1, 3), OURS, lambda groups: 2)
CPU = torch.device("cpu")


def test_every_path_at_every_number_of_tokens(settings: BenchSettings, progress: Progress) -> None:
    cases, bars, notes = measure_wo_a(settings, progress, TINY)
    assert notes == []
    assert [(case.rows[0].case, case.rows[0].rows) for case in cases] == [(path, m) for m in TINY.tokens for path in OURS]
    for case in cases:
        eager, graph = case.rows
        assert (eager.mode, graph.mode, eager.operations, eager.groups) == ("eager", "graph", 2, 2)
        assert eager.error is not None and eager.error == graph.error < 0.05
        assert graph.capture_seconds > 0 and eager.first_call_seconds > 0 and set(case.calls) == {"eager", "graph"}
        assert eager.weight_bytes == (2 if eager.case in ("einsum", "auto") else 1) * 2 * 128 * 128 + (
            {"bmm": 4, "gloop": 8, "fused": 8}.get(eager.case, 0)
        )
    names = {bar.name for bar in bars}
    assert names == {"error of fused against float64", *(f"bytes of {path} over einsum" for path in ("bmm", "gloop", "fused"))}
    assert all(bar.where in ("G=2 M=1", "G=2 M=3") for bar in bars)


def test_a_wrong_projection_is_an_error() -> None:
    loaded, o = make_weights(TINY, 2, CPU), activations(3, 2, 128, CPU)
    stack = ProjectionStack(loaded, "einsum")
    with torch.no_grad():
        exact = exact_results(loaded, o)
        good = stack(o)
        check(stack, good, o, exact)
        with pytest.raises(WrongResult, match=r"path einsum, M=3: relative error 0\.5"):
            check(stack, good * 1.5, o, exact)
        stack.projections[0].weight.mul_(1.5)
        with pytest.raises(WrongResult, match=r"relative error 0\.5"):
            check(stack, good, o, exact)


class Failing(torch.nn.Module):
    weight_bytes = 1

    def forward(self, o: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no toolkit")


def test_a_peer_that_fails_costs_no_other_row(
    settings: BenchSettings, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wo_a, "absent", lambda path, device: None)
    monkeypatch.setattr(wo_a_record, "build", lambda path, weight: Failing() if path == "deepgemm" else build(path, weight))
    selection = dataclasses.replace(TINY, tokens=(1,), paths=("deepgemm", "fused"))
    cases, _, notes = measure_wo_a(settings, progress, selection)
    assert [case.rows[0].case for case in cases] == ["fused"]
    assert notes == ["deepgemm was left out at G=2 M=1: RuntimeError: no toolkit"]
    monkeypatch.setattr(wo_a_record, "build", lambda path, weight: Failing())
    with pytest.raises(RuntimeError, match="no toolkit"):
        measure_wo_a(settings, progress, selection)


def test_a_recording_replays_what_a_call_computes() -> None:
    loaded, o = make_weights(TINY, 2, CPU), activations(3, 2, 128, CPU)
    stack = ProjectionStack(loaded, "gloop")
    with torch.no_grad():
        made = record(stack, o)
        assert torch.equal(made.replay(), stack(o)) and made.seconds > 0


def test_long_cases_get_fewer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BenchSettings(CPU, runs=50)
    monkeypatch.setattr(wo_a, "CASE_SECONDS", 0.0)
    assert len(wo_a.time_calls({"nothing": lambda: None}, settings)["nothing"].host_us) == wo_a.FEWEST_RUNS
    monkeypatch.setattr(wo_a, "CASE_SECONDS", 1e6)
    assert len(wo_a.time_calls({"nothing": lambda: None}, settings)["nothing"].host_us) == 50


def test_what_is_measured_by_default() -> None:
    settings = BenchSettings(CPU)
    full = wo_a.selection_for(settings)
    assert full == wo_a.SMALL and "reduced" in full.describe()
    assert wo_a.selection_for(dataclasses.replace(settings, quick=True)).tokens == full.tokens[:2]
    part = wo_a.selection_for(settings, "all")
    assert part.groups == full.groups[:1] and part.paths == OURS
    v4 = wo_a.V4
    assert (v4.groups, v4.k, v4.n, v4.tokens) == ((2, 8, 16), 4096, 1024, (1, 4, 16, 64, 256, 1024))
    assert all(g * v4.k * v4.n * v4.layers(g) >= 2**28 for g in v4.groups), "more than any cache holds"


def test_peers_that_are_absent_say_why() -> None:
    assert all(absent(path, CPU) is None for path in OURS)
    assert all(absent(path, CPU) == "it needs a GPU" for path in PEERS)
    with pytest.raises(MissingDependency, match=r"deep_gemm.*pip install git"):
        build("deepgemm", make_weights(TINY, 2, CPU)[0])
    assert "deep_gemm" in (absent("deepgemm", torch.device("cuda")) or "")


def spread(us: float) -> Spread:
    return Spread(us, us, us, 20)


def row(path: str, mode: str, us: float, groups: int = 2, launches: int | None = 32) -> BenchRow:
    return BenchRow(
        "wo_a", path, 4, mode, 32, spread(us), None, spread(1.0), 0.0016, launches, groups=groups, weight_bytes=8_400_000
    )


def test_the_share_of_the_eager_gap() -> None:
    base = row("einsum", "eager", 30.0), row("einsum", "graph", 9.0)
    assert gap_removed(row("gloop", "eager", 130.0), row("gloop", "graph", 19.0), base) == "90%"
    assert gap_removed(row("gloop", "eager", 130.0), row("gloop", "graph", 109.0), base) == "0%"
    assert gap_removed(row("fused", "eager", 29.0), row("fused", "graph", 5.0), base) == "-"
    assert gap_removed(*base, None) == "-"


def printed(table: object) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_both_tables_fit_a_terminal_and_hold_both_modes() -> None:
    machine = Machine("a GPU", "580", "2.11", "3.6", "5.17", "3.12", "Linux", 1, "2026-01-01T00:00:00+00:00")
    rows = [
        made
        for groups in (2, 8)
        for path, eager, graph in (("einsum", 30.0, 9.0), ("aiter gloop", 130.0, 19.0), ("fused", 29.0, 5.0))
        for made in (row(path, "eager", eager, groups), row(path, "graph", graph, groups, 1))
    ]
    rows.append(row("read floor", "graph", 4.0))
    bars = bars_of(2, 4, {"einsum": [9.0, 9.0], "fused": [5.0, 5.0]}, {"fused": 0.003}, {"einsum": 16, "fused": 8}, "a GPU")
    results = Results(machine, 20, False, (), tuple(rows), tuple(bars))
    text = printed(projections_table(results))
    assert max(map(len, text.splitlines())) <= 80
    gloop = next(line.split() for line in text.splitlines() if "aiter gloop" in line)
    assert gloop == ["aiter", "gloop", "1", "130", "19.0", "4.33x", "2.11x", "90%", "4.75x", "0.0016", "8.4", "0.00"]
    assert "G=2 M=4 read floor 4.0 einsum" in " ".join(text.split()) and "G=8 M=4 einsum" in " ".join(text.split())
    assert "…" not in text, "a heading was cut off"
    table = projection_bars_table(results)
    lines = ["|".join(line) for line in zip(*(column._cells for column in table.columns), strict=True)]
    for name, *words in (("fused over einsum, G=2, M=4,16", "0.556x", "1 of 1", "met"), ("error of fused", "0 of 1", "missed")):
        assert any(name in line and all(word in line for word in words) for line in lines)
    text = printed(table)
    assert max(map(len, text.splitlines())) <= 80 and "1 of 1  met" in text and "0 of 1  missed" in text


def test_bars_are_those_that_fit_the_place() -> None:
    times = {name: [10.0, 12.0] for name in ("einsum", "fused", "auto", "bmm", "aiter bmm", "read floor")}
    names = {m: {bar.name for bar in bars_of(16, m, times, {}, {}, "x")} for m in (1, 64, 1024)}
    assert "fused over read floor, G=16, M=1,4,16" in names[1] and "fused over einsum, G=8,16, M=1,4,16" in names[1]
    assert names[64] == {"auto over einsum, M=1,4,16,64,256", "bmm over aiter bmm"}
    assert names[1024] == {"auto over einsum, M=1024", "bmm over aiter bmm"}
    assert len(TIMES) == 9
    ratios = bars_of(2, 64, {"einsum": [10.0, 20.0, 30.0], "fused": [9.0, 20.0, 33.0]}, {}, {}, "x")
    assert ratios[0].measured.median == 1.0 and not ratios[0].met and ratios[0].goal == 0.6


def test_tuning_keeps_rules_that_projections_follow(
    settings: BenchSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHS_CACHE", str(tmp_path))
    monkeypatch.setattr(wo_a, "SMALL", TINY)
    path = tune("wo_a", settings, make_console(quiet=True))
    rules = tuned_path.read(CPU)
    assert rules is not None and path == tuned_path.file_of(CPU)
    measured = json.loads(path.read_text())["measured"]
    assert [(found["groups"], found["tokens"], found["path"]) for found in measured] == [
        (2, m, name) for m in (1, 3) for name in ("einsum", "fused")
    ]
    assert rules == tuned_path.rules_from(
        {(2, m): {found["path"]: found["us"] for found in measured if found["tokens"] == m} for m in (1, 3)}
    )


def test_only_what_can_be_tuned_is(settings: BenchSettings) -> None:
    with pytest.raises(ConfigError, match=r"operator = 'gemm' is not legal; it must be one of 'wo_a'"):
        tune("gemm", settings)
    with pytest.raises(ConfigError, match=r"--paths = 'bmm'.*einsum, fused"):
        tune("wo_a", dataclasses.replace(settings, paths=("bmm",)))
