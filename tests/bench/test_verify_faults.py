"""The count of false refusals and caught faults, at toy size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[bench]'")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "verify_faults.py"
    spec = importlib.util.spec_from_file_location("verify_faults", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verify_faults", module)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_a_toy_llama_has_no_false_refusal_and_every_fault_is_caught(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--models", "llama", "--layers", "2", "--width", "64", "--compiler", "none", "--starts", "2"]
    monkeypatch.setattr(sys, "argv", ["verify_faults.py", "--device", "cpu", *sizes, "--json", str(tmp_path / "rows.json")])
    script.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["starts"], row["false refusals"]) == (2, 0)
    for fault in ("visible row", "stale input", "missed write"):
        assert row[f"{fault}, caught"] == row[f"{fault}, planted"] == 2, row
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in printed[-3:])
