"""Steps that catch what their operators raise: such a call runs eagerly, once, under a reason of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
TABLE = torch.arange(8.0)


def factor(x: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(x)
    except torch.linalg.LinAlgError:
        return torch.linalg.cholesky(x + 10 * torch.eye(2))


def inverse(x: Tensor) -> Tensor:
    try:
        return torch.linalg.inv(x)
    except torch.linalg.LinAlgError:
        return torch.zeros(2, 2)


def row(x: Tensor) -> Tensor:
    try:
        return TABLE[(x.diagonal() * 2).long() + 3] * 2
    except IndexError:
        return TABLE[:2] * -1


class Counting(nn.Module):
    """Writes and draws before the operator that may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        noise = torch.rand(2)
        return row(x) + noise + self.calls


def results(step: Callable[[Tensor], Tensor], context: Any, values: list[float]) -> list[Any]:
    torch.manual_seed(0)
    with context():
        return [step(torch.eye(2) * value).tolist() for value in values]


VALUES = {factor: [1.0, 2.0, -1.0, 3.0, -2.0, 4.0], inverse: [1.0, 2.0, 0.0, 4.0, 0.0, 1.0], row: [1.0, 2.0, 4.0, 0.0, 9.0, 1.0]}


@contexts
@pytest.mark.parametrize("step", [factor, inverse, row])
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_what_the_step_catches_is_served_eagerly(step: Callable[[Tensor], Tensor], context: Any) -> None:
    captured = graphs.capture(step)
    values = VALUES[step]
    assert results(captured, context, values) == results(step, context, values)
    report = captured.report()
    assert "internal-error" not in {refusal.reason for refusal in report.refusals}, str(report)
    assert report.replays >= 3, str(report)
    assert report.replays + report.eager_calls == len(values), str(report)


@contexts
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_what_a_replay_did_before_it_raised_is_undone(context: Any) -> None:
    model, reference = Counting(), Counting()
    captured = graphs.capture(model)
    assert results(captured, context, VALUES[row]) == results(reference, context, VALUES[row])
    assert torch.equal(model.calls, reference.calls)
    assert [(refusal.reason, refusal.count) for refusal in captured.report().refusals] == [("step-raises", 2)]


def gathered(x: Tensor) -> Tensor:
    try:
        return torch.gather(TABLE, 0, (x.diagonal() * 2).long())
    except RuntimeError:
        return TABLE[:2] + 2


def divided(x: Tensor) -> Tensor:
    try:
        return 4 // x.diagonal().long()
    except RuntimeError:
        return x.diagonal().long() + 2


@contexts
@pytest.mark.parametrize(
    ("step", "values"), [(gathered, [9.0, 1.0, 2.0, 3.0, 9.0, 1.0]), (divided, [0.0, 1.0, 2.0, 0.0, 4.0, 1.0])]
)
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_what_the_first_call_raises_is_no_part_of_a_recording(
    step: Callable[[Tensor], Tensor], values: list[float], context: Any
) -> None:
    captured = graphs.capture(step)
    assert results(captured, context, values) == results(step, context, values)
    report = captured.report()
    assert report.replays >= 3 and {refusal.reason for refusal in report.refusals} == {"step-raises"}, str(report)


class Advancing(nn.Module):
    """Writes, draws and counts before the operator that may raise, and writes after it."""

    def __init__(self, catches: bool) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.steps, self.catches = 0, catches
        self.own = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        self.written.add_(1)
        self.steps += 1
        noise = torch.rand(2) + torch.rand(2, generator=self.own)
        try:
            y = TABLE[(x.diagonal() * 2).long()]
        except IndexError:
            if not self.catches:
                raise
            y = TABLE[:2]
        self.written.add_(3)
        return y + noise + self.written


@contexts
@pytest.mark.parametrize("catches", [True, False], ids=["caught", "raised"])
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_numbers_of_python_and_generators_are_where_eager_leaves_them(catches: bool, context: Any) -> None:
    model, twin = Advancing(catches), Advancing(catches)
    captured, seen = graphs.capture(model), list[Any]()
    for module, step in ((twin, twin), (model, captured)):
        torch.manual_seed(0)
        module.own.manual_seed(1)
        found: list[Any] = []
        for value in (1.0, 2.0, 3.0, 9.0, 1.0, 9.0, 2.0):
            with context():
                try:
                    found.append(step(torch.eye(2) * value).tolist())  # type: ignore[operator]
                except IndexError:
                    found.append("raised")
            found.append((module.steps, module.written.item(), torch.get_rng_state().sum().item()))
            found.append(module.own.get_state().sum().item())
        seen.append(found)
    assert seen[0] == seen[1]


def test_a_generator_is_drawn_from_once_where_a_replay_raises() -> None:
    def step(x: Tensor) -> Tensor:
        return TABLE[x.long()] + torch.rand(3)

    captured = graphs.capture(step)
    with torch.no_grad():
        for start in range(3):
            captured(torch.arange(3.0) + start)
        states = []
        for called in (step, captured):
            torch.manual_seed(0)
            with pytest.raises(IndexError):
                called(torch.tensor([0.0, 1.0, 9.0]))
            states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_call_that_raises_while_it_is_verified_has_taken_place_once() -> None:
    model, twin = Advancing(catches=False), Advancing(catches=False)
    captured = graphs.capture(model, verify="always")
    for module, step in ((twin, twin), (model, captured)):
        torch.manual_seed(0)
        module.own.manual_seed(1)
        for value in (1.0, 2.0, 9.0, 3.0):
            with torch.no_grad():
                try:
                    step(torch.eye(2) * value)  # type: ignore[operator]
                except IndexError:
                    assert value == 9.0
    assert torch.equal(model.written, twin.written) and model.steps == twin.steps
    assert torch.equal(model.own.get_state(), twin.own.get_state())
