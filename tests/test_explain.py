"""``graphs.explain``: what passes changed, what was routed and fused, launches, and why a step is not recorded."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from graphs.__main__ import main
from graphs.explain import Explanation, explain

Tensor = torch.Tensor


class Step(nn.Module):
    """A host value, a host constant, a grouped projection and a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.cache[int(position)] = x[0]  # reads the position
        y = nn.functional.silu(x + self.cache) * 2 + torch.tensor([1.0, 2.0]).repeat(4)
        return torch.einsum("sgd,grd->sgr", y.view(4, 2, 4), self.weight)


def factory() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Step().eval(), (torch.randn(4, 8), torch.tensor(2))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_each_pass_is_shown_as_a_diff_of_the_printed_graph() -> None:
    model, args = factory()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = explain(model, args, fuse=False)
    effects = {effect.name: effect for effect in found.effects}
    assert list(effects) == ["remove_host_values", "hoist_constants", "routing"]
    assert "_local_scalar_dense" in found.graph
    removed, added = (
        [line for effect in found.effects for line in effect.diff.splitlines() if line.startswith(sign)] for sign in "-+"
    )
    for name, where in (("_local_scalar_dense", removed), ("lift_fresh", removed), ("_hoisted_constant_", added)):
        assert any(name in line for line in where)
    assert effects["routing"].changes == 1 and "wo_a_einsum" in effects["routing"].diff
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def windowed(x: Tensor, position: Tensor) -> Tensor:
    start = int(position)
    return x[start : start + 2].sum(0) + x[: start + 1].amax(0)


def test_on_a_gpu_what_is_fused_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphs.first_call.candidates._is_fused", lambda step: True)
    found = explain(windowed, (torch.randn(8, 3), torch.tensor(2)), fuse=False)
    effects = {effect.name: effect for effect in found.effects}
    assert effects["fuse_exact"].changes == 1 and "exact_0" in effects["fuse_exact"].diff


def test_launches_pieces_and_the_recording_are_shown() -> None:
    model, args = factory()
    found = explain(model, args, fuse=False)
    assert found.launches["recorded"] < found.launches["eager"]
    line = next(
        number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# reads the position" in text
    )
    assert [(piece.line, Path(piece.file).name) for piece in found.pieces if piece.ends] == [(line, Path(__file__).name)]
    assert found.report.replays and found.fusion is None
    printed = str(found)
    for title in ("# Graph of the step", "# Pass routing: 1 change(s)", "# Launches per step", "# Pieces of", "# Recording"):
        assert title in printed


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_step_that_cannot_be_recorded_says_why() -> None:
    found = explain(lambda x: x * x.new_tensor(x.numpy().sum().item()), (torch.ones(3),), fuse=False)
    assert "recorded" not in found.launches
    assert [refusal.file for refusal in found.report.refusals if refusal.reason == "host-sync"] == [__file__]
    assert f"{Path(__file__).name}" in (found.untraced or str(found))


@pytest.mark.slow
def test_a_step_that_raises_leaves_the_state_before_it() -> None:
    calls, total = [], torch.zeros(1)

    def step(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        total.add_(x)
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        explain(step, (torch.ones(1),), fuse=False)
    assert total.item() == 0 and calls == []


def test_fusion_counts_kernels() -> None:
    found = explain(lambda x: (x * 2 + 1).relu().sum(), (torch.ones(64),))
    assert found.fusion is not None and found.fusion.refusal == ""
    assert found.fusion.scheduled >= found.fusion.generated == 1
    assert "1 generated kernel(s)" in str(found)
    assert found.fusion.kernels == ("mul, add, relu, sum_1",) and "  mul, add, relu, sum_1\n" in str(found)


def test_the_command_line_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer", reason="typer is not installed")
    with pytest.raises(SystemExit) as done:
        main(["explain", "tests.test_explain:factory", "--no-fuse"])
    assert done.value.code == 0
    assert "# Pass hoist_constants: 2 change(s)" in capsys.readouterr().out


def test_the_conclusion_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer", reason="typer is not installed")
    with pytest.raises(SystemExit):
        main(["explain", "tests.test_explain:factory", "--no-fuse"])
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Recorded: \d+ operators per replay, \d+ per eager step\.", first)
    assert second == "Changed by passes: remove_host_values 3x, hoist_constants 2x, routing 1x."
    assert third == "# Graph of the step, on cpu"


def reads_on_the_host(x: Tensor) -> Tensor:
    return x * x.new_tensor(x.numpy().sum().item())  # no pass takes this away


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_refused_step_begins_with_why_and_what_to_change() -> None:
    found = explain(reads_on_the_host, (torch.ones(3),), fuse=False)
    head, why, *_ = str(found).splitlines()
    assert head == "Not recorded." and why.startswith("Why: host-sync at ") and not found.recorded
    line = reads_on_the_host.__code__.co_firstlineno + 1
    told = " ".join(found.conclusion.split())
    assert f"{__file__}:{line}" in told and f"Change: {found.report.refusals[0].remedy}" in told
    assert all(len(one) <= 80 for one in found.conclusion.splitlines() if __file__ not in one)


def test_json_holds_the_conclusion_and_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer", reason="typer is not installed")
    with pytest.raises(SystemExit) as done:
        main(["explain", "tests.test_explain:factory", "--no-fuse", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert done.value.code == 0 and found["recorded"] and found["conclusion"].startswith("Recorded: ")
    assert {field.name for field in dataclasses.fields(Explanation)} | {"recorded", "conclusion"} == set(found)
    assert found["report"]["replays"] > 0 and found["launches"]["recorded"] < found["launches"]["eager"]


def drawing(x: Tensor, t: Tensor) -> Tensor:
    if t > 0:
        x = x * 2
    if t > 1:
        x = x + torch.rand_like(x)
    return x


def test_branches_that_stay_assumptions_are_named_with_the_reason() -> None:
    told = explain(drawing, (torch.ones(3), torch.tensor(0)), fuse=False)
    line = drawing.__code__.co_firstlineno + 3
    assert told.assumed == {f"{__file__}:{line}": "a side draws random numbers"}
    assert f"{__file__}:{line}: a side draws random numbers" in str(told)
