"""The programs in ``examples/`` run as they stand; each compares itself with eager and ends with an error where they differ."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRINTS = {  # a line of each program that only holds if calls were replayed
    "decode_loop": r"graphs: 1 recording\(s\) on (cpu|cuda\S*), 23 replay\(s\), 1 eager call\(s\), mode graph",
    "engine": r"graphs: 4 recording\(s\) on (cpu|cuda\S*), 35 replay\(s\), 0 eager call\(s\), mode graph",
    "metrics_opentelemetry": r"graphs\.replays \{'step': 'feed-forward', 'size': 'input\[4, 64\]'\} 6\n",
    "metrics_prometheus": r"graphs_replays_total\{size=\"8 rows\",step=\"feed-forward\"\} 2\.0\n",
    "own_operator": r"graphs: 1 recording\(s\) on (cpu|cuda\S*), 16 replay\(s\), 0 eager call\(s\), mode graph",
    "torch_compile": r"8 replay\(s\), 0 compiled call\(s\)",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_an_example_runs_and_is_replayed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "decode_loop":
        pytest.importorskip("transformers", reason="transformers is not installed")
    if name == "metrics_prometheus":
        pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    if name == "metrics_opentelemetry":
        pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    if name == "torch_compile":
        if not importlib.metadata.entry_points(group="torch_dynamo_backends").select(name="graphs"):
            pytest.skip("stepgraphs is not installed here, so torch.compile does not know the backend by name")
        torch.compiler.reset()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "the same eager and" in printed or "the same tokens eager and" in printed
    assert re.search(PRINTS[name], printed), printed
