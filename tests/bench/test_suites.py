"""The suites for pytest-benchmark: what their JSON tells, and how their cases are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'stepgraphs[bench]'")

ROOT = Path(__file__).resolve().parents[2]
CASE = "benchmarks/test_wo_a.py::test_projections[graph-M=4-G=2-einsum]"


def test_its_json_names_device_driver_and_versions(tmp_path: Path) -> None:
    file = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "--graphs-device=cpu", f"--benchmark-json={file}", CASE]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # a worker writes no JSON
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())
    (case,) = found["benchmarks"]
    assert case["name"] == "test_projections[graph-M=4-G=2-einsum]"
    machine = found["machine_info"]["graphs"]
    assert all(machine[name] for name in ("device", "driver", "toolkit", "torch", "triton", "python"))
