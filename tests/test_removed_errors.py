"""Removed host values for which the step raises, or goes a way of Python's own: eager decides, in each such call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
CONTEXTS = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
X = torch.arange(6.0)


def result(step: Callable[..., Any], *args: Any) -> Any:
    try:
        return step(*args)
    except Exception as error:  # what it raises is its result
        return f"{type(error).__name__}: {error}"


def compare(step: Callable[..., Any], numbers: Sequence[Any], context: Callable[[], Any], *, replays: int) -> None:
    captured = graphs.capture(step)
    for number in numbers:
        with context():
            wanted, made = (result(each, X.clone(), torch.tensor(number)) for each in (step, captured))
        torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True) if not isinstance(wanted, str) else None
        assert type(made) is type(wanted) and (not isinstance(wanted, str) or made == wanted)
    report = captured.report()
    assert report.replays >= replays and report.replays + report.eager_calls == len(numbers)
    assert "internal-error" not in {refusal.reason for refusal in report.refusals}


def inverse(x: Tensor, n: Tensor) -> Tensor:
    return x * (1.0 / n.item())


def whole(x: Tensor, n: Tensor) -> Tensor:
    return x * int(n)


def smaller(x: Tensor, n: Tensor) -> Tensor:
    return min(1.0, n.item()) * x


def larger(x: Tensor, n: Tensor) -> Tensor:
    return max(n.item(), 1.0) * x


def parts(x: Tensor, n: Tensor) -> list[Tensor]:
    return [part.sum() for part in x.split(n.tolist())]


def counts(x: Tensor, n: Tensor) -> Tensor:
    return torch.bincount(n, minlength=3)


def weighed(x: Tensor, n: Tensor) -> Tensor:
    return torch.histc(n.float(), bins=4, min=0, max=3) * (2 if n.sum() > 3 else 1)


def caught(x: Tensor, n: Tensor) -> Tensor:
    try:
        return x[n.item()]
    except IndexError:
        return x.sum() * 100


@CONTEXTS
@pytest.mark.parametrize(
    ("step", "numbers", "replays"),
    [
        (inverse, [2, 3, 0, 4], 3),
        (whole, [1.5, math.nan, math.inf, 1e30, 2.0], 2),
        (smaller, [0.5, math.nan, 2.0, -0.0], 4),
        (larger, [0.5, math.nan, 2.0], 3),
        (parts, [[1, 5], [2, 4], [1, 1], [3, 4], [-1, 7]], 2),
        (counts, [[0, 1, 2], [0, 1, 1], [0, 1, 5], [0, -1, 1]], 2),
        (weighed, [[0, 1, 2], [1, 2, 3], [0, 9, -2]], 3),
        (caught, [0, 3, 7, 1, -9, 2], 4),
    ],
)
def test_what_eager_does_with_unusual_values_is_what_the_caller_gets(
    step: Callable[..., Any], numbers: Sequence[Any], replays: int, context: Callable[[], Any]
) -> None:
    compare(step, numbers, context, replays=replays)


@CONTEXTS
def test_statistics_that_a_schema_does_not_name_are_put_back_with_a_failed_replay(context: Callable[[], Any]) -> None:
    model, reference = nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, momentum=None)  # type: ignore[arg-type]
    step = graphs.capture(model)
    for _ in range(4):
        x = torch.randn(5, 4)
        with context():
            assert torch.equal(step(x), reference(x))
        assert torch.equal(model.running_mean, reference.running_mean)  # type: ignore[arg-type]


KEPT = torch.zeros(6)


def given_or_held(x: Tensor, n: Tensor) -> Tensor:
    if n > 2:
        return KEPT
    return x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n: Any = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * self.n


@pytest.mark.parametrize("other", [7.5, True, 2**63])
def test_a_counter_that_is_set_to_something_else(other: Any) -> None:
    model, reference = Counts(), Counts()
    step = graphs.capture(model)
    for index in range(6):
        if index == 3:
            model.n = reference.n = other
        with torch.no_grad():
            assert torch.equal(step(X), reference(X))
        assert model.n == reference.n and type(model.n) is type(reference.n)


def decomposed(x: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(x)
    except torch.linalg.LinAlgError:
        return torch.linalg.cholesky(x + 10 * torch.eye(2))


def test_calls_in_which_the_step_raises_or_catches_are_counted_by_name() -> None:
    step = graphs.capture(decomposed)
    with torch.no_grad():
        for factor in (1, 2, -1, 3):
            assert torch.equal(step(torch.eye(2) * factor), decomposed(torch.eye(2) * factor))
    report = step.report()
    assert (report.replays, report.eager_calls) == (3, 1)
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [("step-raises", 1)]


def checked(x: Tensor, n: Tensor) -> Tensor:
    assert n > 0, "below"
    return x * n


def test_a_call_that_raises_is_counted() -> None:
    step = graphs.capture(checked)
    with torch.no_grad():
        for number in (1, 2, -1, 3):
            result(step, X, torch.tensor(number))
    report = step.report()
    assert (report.replays, report.eager_calls) == (3, 1)
    assert {refusal.reason for refusal in report.refusals} == {"step-raises"}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_more_rows_from_the_end_than_there_are_are_all_of_them(context: Any) -> None:
    def step(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return x[-n.item() :] * 2  # type: ignore[misc]

    captured, x = graphs.capture(step), torch.arange(1.0, 7.0)
    with context():
        for n in (2, 3, 0, 6, 1, 7, 9, 2):
            assert torch.equal(captured(x, torch.tensor(n)), step(x, torch.tensor(n))), n
    assert captured.report().replays == 8
