"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer is not installed")

import graphs
from graphs.__main__ import main
from graphs.cli import Dialect
from passes.mlir import DIALECTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls of `run_bench`, recorded instead of run."""
    calls: list[tuple] = []
    monkeypatch.setattr("graphs.bench.run_bench", lambda *arguments: calls.append(arguments))
    return calls


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert isinstance(done.value.code, int)
    return done.value.code


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on the error stream, without the frame around it."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_options_reach_the_bench(ran: list[tuple], tmp_path: Path) -> None:
    assert status("bench", "wo_a", "--out", str(tmp_path), "--runs", "25", "--quick", "--device", "cpu") == 0
    (experiment, settings, out) = ran[0]
    assert (experiment, out, settings.runs, settings.quick, settings.device.type) == ("wo_a", tmp_path, 25, True, "cpu")


def test_the_projection_can_be_narrowed_down(ran: list[tuple]) -> None:
    assert status("bench", "wo_a", "--device", "cpu", "--groups", "2", "--tokens", "1,4", "--paths", "fused,aiter bmm") == 0
    settings = ran[0][1]
    assert (settings.groups, settings.tokens, settings.paths) == ((2,), (1, 4), ("fused", "aiter bmm"))


def test_tune_reaches_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr("graphs.bench.tune", lambda *arguments: calls.append(arguments))
    assert status("tune", "wo_a", "--device", "cpu", "--groups", "2") == 0
    assert calls[0][0] == "wo_a" and calls[0][1].groups == (2,)


def test_everything_is_the_default(ran: list[tuple]) -> None:
    assert status("bench", "--device", "cpu") == 0
    assert ran[0][0] == "all" and ran[0][1].runs == 20 and ran[0][2] == Path("results")


@pytest.mark.parametrize(
    ("arguments", "option", "legal"),
    [
        (["bench", "--device", "gpu"], "--device", "'auto', 'cpu', 'cuda'"),
        (["bench", "--runs", "5"], "--runs", "20"),
        (
            ["bench", "prefill", "--device", "cpu"],
            "experiment",
            "'all', 'decode', 'wo_a', 'overhead', 'compile', 'syncs', 'generate', 'deepseek_v4'",
        ),
        (["bench", "--groups", "2,x"], "--groups", "positive integers separated by commas"),
        (["bench", "--tokens", "0"], "--tokens", "positive integers separated by commas"),
        (["bench", "generate", "--model", "bert"], "--model", "'gpt2', 'llama'"),
        (["bench", "generate", "--forms", "eager"], "--forms", "'dynamic', 'static', 'auto-compile', 'graphs', 'inductor'"),
        (["bench", "deepseek_v4", "--forms", "static"], "--forms", "'eager', 'recorded', 'recorded+mhc', 'inductor'"),
        (["bench", "--paths", "einsum,cutlass"], "--paths", "'einsum', 'bmm', 'gloop', 'fused', 'auto', 'aiter bmm'"),
        (["tune", "wo_b"], "operator", "'wo_a'"),
        (["tune", "wo_a", "--runs", "19"], "--runs", "20"),
        (["parity", "a:b", "--calls", "7"], "--calls", "8"),
        (["parity", "a:b", "--contexts", "no_grad,eager"], "--contexts", "'no_grad'"),
        (["lower", "a:b", "--dialect", "llvm"], "--dialect", "'torch', 'linalg', 'stablehlo', 'tosa'"),
    ],
)
def test_a_bad_value_is_one_message_with_the_legal_ones(
    arguments: list[str], option: str, legal: str, ran: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    said = message(capsys)
    assert f"Invalid value for '{option}'" in said and legal in said and "Traceback" not in said
    assert not ran and not Path("results").exists()


def test_results_need_a_directory_that_can_be_written_to(ran: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("")
    for out in ("taken", "taken/below"):
        assert status("bench", "--device", "cpu", "--out", out) == 2
        assert f"Invalid value for '--out': {out} is no directory that can be written to" in message(capsys)
    assert not ran


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version") == 0
    assert capsys.readouterr().out == f"stepgraphs {graphs.__version__}\n"


def test_the_dialects_are_those_of_passes() -> None:
    assert tuple(one.value for one in Dialect) == tuple(DIALECTS)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["bench", "--help"], ["bench", "--runs", "5"], ["audit", "decode.py:factory"]]
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments: list[str]) -> None:
    script = (
        "import sys; sys.argv[0] = 'graphs'; from graphs.__main__ import main\n"
        f"try: main({arguments})\n"
        "finally: print('torch' in sys.modules, 'passes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_module_runs_from_the_source_tree() -> None:
    command = [sys.executable, "-m", "graphs", "bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout


STEP = """
import torch, graphs
def layer():
    return torch.nn.Linear(4, 4), (torch.ones(2, 4),)
def captured():
    step = graphs.capture(torch.nn.Linear(4, 4), buckets=[1, 2], batch_dims={"input": 0})
    return step, (torch.ones(2, 4),)
"""


def test_a_step_is_recorded_at_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_record.py").write_text(STEP)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert status("record", "of_record:layer", "--sizes", "1,4", "--batch-dims", "input=0", "--memory-budget", "1GiB") == 0
    assert capsys.readouterr().out.startswith("graphs: 2 of 2 sizes recorded on cpu\n")
    assert status("record", "of_record:captured", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(size["size"], size["recorded"]) for size in found["sizes"]] == [(2, True), (1, True)]
    assert status("record", "of_record:layer", "--sizes", "1,4") == 2
    assert "batch_dims" in message(capsys)
    with pytest.warns(UserWarning, match="memory-budget"):
        assert status("record", "of_record:layer", "--sizes", "7,8", "--batch-dims", "input=0", "--memory-budget", "300B") == 1


@pytest.mark.parametrize(
    ("arguments", "legal"),
    [
        (["--sizes", "0"], "positive integers separated by commas"),
        (["--batch-dims", "x"], "input_ids=0"),
        (["--memory-budget", "lots"], "'512MiB'"),
    ],
)
def test_options_of_record_are_checked_first(arguments: list[str], legal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("record", "no.such:thing", *arguments) == 2
    assert legal in message(capsys)
