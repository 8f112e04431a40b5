"""What a type checker says of programs that use the package: nothing of right ones, and the line of each mistake."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
from collections.abc import Callable

import torch
from torch import Tensor, nn

import graphs


class Decoder(nn.Module):
    def forward(self, token: Tensor, *, scale: float = 1.0) -> tuple[Tensor, int]:
        return token * scale, 1


def double(x: Tensor, times: int = 2) -> Tensor:
    return x * times


def told(event: graphs.Event) -> None:
    print(event.step, event.kind)


token = torch.ones(1)
step, function = graphs.capture(Decoder()), graphs.capture(double, name="double")

logits, count = step(token, scale=2.0)
total: int = count + 1
doubled: Tensor = function(token, times=3)
parent = nn.Sequential(step, nn.ReLU())
module: nn.Module = step
plain: Callable[..., Tensor] = function
module_of_unknown_arguments: graphs.CapturedModule[..., object] = step
nn.Linear(1, 1).add_module("captured", graphs.capture(nn.Linear(1, 1)))
graphs.capture(nn.Linear(1, 1))(token)
anything = step.config.hidden_size
step.mode = "eager"
step.eval()
everything = graphs.capture(
    double, mode="graph", buckets=[1, 2], batch_dims={"x": 0}, static=["x"], padding={"x": "zero", "y": graphs.sentinel(3)},
    outputs="borrowed", verify="always", strict=True, max_recordings=3, compiler="auto", compiler_options={"max_autotune": True},
    passes=["bounded"], bounds={"n": 3}, name="all", ranges=False,
)
graphs.capture(double, passes="off")
handle = graphs.on_event(told)
handle.remove()
graphs.capture(graphs.capture(double))(token)
with graphs.on_event(lambda event: None), graphs.eager():
    pass

graphs.capture(double, mode="grpah")  # wrong
graphs.capture(double, verify="never")  # wrong
graphs.capture(double, outputs="mine")  # wrong
graphs.capture(double, compiler="inductr")  # wrong
graphs.capture(double, passes="on")  # wrong
graphs.capture(double, passes=["adressing"])  # wrong
graphs.capture(double, padding={"x": "reflect"})  # wrong
graphs.capture(double, bucket=[1])  # wrong
graphs.capture(3)  # wrong
step.mode = "grpah"  # wrong
function(token, time=3)  # wrong
function("token")  # wrong
function()  # wrong
step(token, scale="large")  # wrong
step(token, 2.0)  # wrong
count = function(token)  # wrong
graphs.on_event(3)  # wrong
graphs.on_event(lambda event, more: None)  # wrong
nn.Sequential(function)  # wrong
graphs.GroupedProjection(token, path="fusd")  # wrong
graphs.route(nn.Linear(1, 1), path="fusd")  # wrong
"""


@pytest.mark.slow
def test_a_type_checker_finds_each_mistake_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.chdir(ROOT)  # where the settings are, and what `make lint` has found out of torch
    out, err, _ = api.run([str(program), "--hide-error-context", f"--python-executable={sys.executable}"])
    found = {int(line) for line in re.findall(r"program\.py:(\d+): error: ", out)}
    wrong = {number for number, line in enumerate(PROGRAM.splitlines(), start=1) if line.endswith("# wrong")}
    assert err == "" and found == wrong, out


@pytest.mark.parametrize("package", ["graphs", "passes"])
def test_the_mark_of_a_typed_package_is_shipped(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert f'{package} = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()
