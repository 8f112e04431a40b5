from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from graphs.bench import experiment, run_bench
from graphs.bench.decode import measure as decode
from graphs.bench.decode.llama import LlamaSize
from graphs.bench.harness.optional import optional_module
from graphs.bench.harness.progress import make_console
from graphs.bench.harness.rows import WrongResult
from graphs.bench.overhead import tape_bar
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a import measure as wo_a
from graphs.errors import ConfigError, MissingDependency


@pytest.fixture
def small(tiny: LlamaSize, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiments at sizes of a test."""
    monkeypatch.setattr(decode, "size_for", lambda device: tiny)
    monkeypatch.setattr(decode, "batch_sizes", lambda settings: (2,))
    tiny_projections = wo_a.Selection("tiny", (2, 4), 128, 128, (1, 3), wo_a.PATHS, lambda groups: 2)
    monkeypatch.setattr(wo_a, "SMALL", tiny_projections)
    monkeypatch.setattr(experiment, "measure_bars", lambda settings, progress: [tape_bar(settings, progress, tiny)])


@pytest.mark.usefixtures("small")
def test_everything_leaves_tables_json_and_figure(settings: BenchSettings, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'stepgraphs[bench]'")
    threads = torch.get_num_threads()
    results = run_bench("all", settings, out)
    printed = " ".join(capsys.readouterr().out.split())
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "results.png"]
    found = json.loads((out / "results.json").read_text())
    assert [(r["workload"], r["case"], r["rows"], r["mode"]) for r in found["rows"]][:3] == [
        ("decode", "tiny Llama", 2, "eager"),
        ("decode", "tiny Llama", 2, "graph"),
        ("wo_a", "einsum", 1, "eager"),
    ]
    assert all(r["launches"] > 0 for r in found["rows"])
    assert len(results.rows) == 2 + 2 * 5 * 2 and [bar["where"] for bar in found["bars"]].count("") == 1
    assert found["conclusion"] == results.conclusion and results.conclusion.startswith("At batch 2 a decode step takes ")
    for text in ("G=2 M=3", "No GPU was used", "eager over tape replay", "decode, batch 2", results.conclusion):
        assert text in printed


@pytest.mark.usefixtures("small")
def test_one_experiment_writes_files_of_its_own_name(settings: BenchSettings, out: Path) -> None:
    results = run_bench("overhead", settings, out, make_console(quiet=True))
    assert not results.rows and len(results.bars) == 1 and results.conclusion == ""
    assert [path.name for path in out.iterdir()] == ["overhead.json"]


@pytest.mark.usefixtures("small")
def test_the_projections_alone_are_the_whole_comparison(
    settings: BenchSettings, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_bench("wo_a", settings, out)
    printed = " ".join(capsys.readouterr().out.split())
    assert {(row.groups, row.rows, row.case) for row in results.rows} == {
        (g, m, p) for g in (2, 4) for m in (1, 3) for p in wo_a.OURS
    }
    assert "deepgemm was not measured: it needs a GPU" in printed and "aiter gloop was not measured" in printed
    asked = dataclasses.replace(settings, groups=(4,), tokens=(1,), paths=("einsum", "fused"))
    results = run_bench("wo_a", asked, out, make_console(quiet=True))
    assert [(row.groups, row.rows, row.case, row.mode) for row in results.rows] == [
        (4, 1, path, mode) for path in ("einsum", "fused") for mode in ("eager", "graph")
    ]


@pytest.mark.usefixtures("small")
def test_a_failing_part_keeps_what_was_measured(settings: BenchSettings, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise WrongResult("a test")

    monkeypatch.setattr(experiment, "measure_bars", fail)
    with pytest.raises(WrongResult):
        run_bench("all", settings, out, make_console(quiet=True))
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 22


def test_bad_settings_name_the_legal_ones(settings: BenchSettings, out: Path) -> None:
    with pytest.raises(ConfigError, match=r"'prefill'.*'all', 'decode', 'wo_a', 'overhead'"):
        run_bench("prefill", settings, out)
    with pytest.raises(ConfigError, match=r"'gpu'.*'auto', 'cpu', 'cuda'"):
        BenchSettings.resolve("gpu")
    with pytest.raises(ConfigError, match=r"19.*at least 20"):
        BenchSettings.resolve("cpu", 19)
    with pytest.raises(ConfigError, match=r"--groups = '2,x' .* positive integers separated by commas"):
        BenchSettings.resolve("cpu", groups="2,x")
    with pytest.raises(ConfigError, match=r"--tokens = '0'"):
        BenchSettings.resolve("cpu", tokens="0")
    with pytest.raises(ConfigError, match=r"--paths = 'cutlass'.*'einsum', 'bmm', 'gloop', 'fused', 'auto', 'aiter bmm'"):
        BenchSettings.resolve("cpu", paths="einsum,cutlass")
    resolved = BenchSettings.resolve("cpu", groups="8, 2,8", tokens="16", paths="aiter bmm,fused")
    assert (resolved.groups, resolved.tokens, resolved.paths) == ((2, 8), (16,), ("aiter bmm", "fused"))


def test_cuda_where_there_is_none_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        BenchSettings.resolve("cuda")
    assert BenchSettings.resolve("auto").device.type == "cpu"


def test_a_missing_package_names_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"drawing .* pip install 'stepgraphs\[bench\]'"):
        optional_module("matplotlib.pyplot")
