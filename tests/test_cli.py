"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer is not installed")

from graphs.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls of `run_bench`, recorded instead of run."""
    calls: list[tuple] = []
    monkeypatch.setattr("graphs.bench.run_bench", lambda *arguments: calls.append(arguments))
    return calls


def test_options_reach_the_bench(ran: list[tuple], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "wo_a", "--out", str(tmp_path), "--runs", "25", "--quick", "--device", "cpu"])
    assert done.value.code == 0
    (experiment, settings, out) = ran[0]
    assert (experiment, out, settings.runs, settings.quick, settings.device.type) == ("wo_a", tmp_path, 25, True, "cpu")


def test_the_projection_can_be_narrowed_down(ran: list[tuple]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "wo_a", "--device", "cpu", "--groups", "2", "--tokens", "1,4", "--paths", "fused,aiter bmm"])
    settings = ran[0][1]
    assert (settings.groups, settings.tokens, settings.paths) == ((2,), (1, 4), ("fused", "aiter bmm"))


def test_tune_reaches_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr("graphs.bench.tune", lambda *arguments: calls.append(arguments))
    with pytest.raises(SystemExit) as done:
        main(["tune", "wo_a", "--device", "cpu", "--groups", "2"])
    assert done.value.code == 0 and calls[0][0] == "wo_a" and calls[0][1].groups == (2,)


def test_everything_is_the_default(ran: list[tuple]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cpu"])
    assert ran[0][0] == "all" and ran[0][1].runs == 20 and ran[0][2] == Path("results")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--device", "gpu"], "'auto', 'cpu', 'cuda'"),
        (["bench", "--runs", "5"], "at least 20"),
        (["bench", "prefill", "--device", "cpu"], "'all', 'decode', 'wo_a', 'overhead'"),
    ],
)
def test_a_bad_value_is_one_message_with_the_legal_ones(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    error = capsys.readouterr().err
    assert done.value.code == 2
    assert message in error and "Traceback" not in error


def test_module_runs_from_the_source_tree() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphs", "bench", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout
