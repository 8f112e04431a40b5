"""``python -m graphs lower`` as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer is not installed")

from graphs.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """
import torch
import graphs

def projection():
    weight = torch.randn(2, 128, 128).bfloat16()
    return graphs.GroupedProjection(weight, path="fused"), (torch.randn(3, 2, 128).bfloat16(),)

def keywords():
    return torch.sum, (torch.ones(2, 3),), {"dim": 1}

def eigenvalues():
    return torch.linalg.eigvals, (torch.ones(2, 2),)
"""


@pytest.fixture(autouse=True)
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steps_to_lower.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "steps_to_lower", raising=False)


@pytest.fixture
def torch_mlir() -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")


@pytest.mark.usefixtures("torch_mlir")
@pytest.mark.parametrize("dialect", ["torch", "linalg", "stablehlo", "tosa"])
def test_the_text_is_printed(dialect: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["lower", "steps_to_lower:projection", "--dialect", dialect])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "func.func @main" in text and "f8E4M3FN" in text and "wo_a" not in text


@pytest.mark.usefixtures("torch_mlir")
def test_linalg_is_the_default_and_keywords_are_passed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lower", "steps_to_lower:keywords"])
    assert "tensor<2x3xf32>) -> tensor<2xf32>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lower", "steps_to_lower:absent"], "name one of: "),
        (["lower", "steps_to_lower"], "package.module:factory"),
    ],
)
def test_a_bad_value_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    error = capsys.readouterr().err
    assert done.value.code == 2 and message in error and "Traceback" not in error


@pytest.mark.usefixtures("torch_mlir")
def test_a_failure_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graphs", "lower", "steps_to_lower:eigenvalues"]
    variables = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2 and "[aten.linalg_eig]" in done.stderr and "Reproduce: python -m passes.mlir" in done.stderr
    assert "Traceback" not in done.stderr
