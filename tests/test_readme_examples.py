"""The short examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("program", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "transformers" in program:
        pytest.importorskip("transformers.models.deepseek_v4", reason="transformers with DeepSeek-V4 is not installed")
    if "to_mlir" in program:
        pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    exec(program, {"__name__": "readme"})
    promised = re.findall(r"print\(.*\)  # (.*)", program)
    assert capsys.readouterr().out.splitlines() == promised
