"""Effects that no operator tells of: generators that are set, draws of trips that do not take place, memory given to NumPy."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
own = random.Random(1)


def seeds_python(x: Tensor) -> Tensor:
    random.seed(0)
    return x + random.random()


def seeds_numpy(x: Tensor) -> Tensor:
    numpy.random.seed(0)
    return x + float(numpy.random.rand())


def seeds_without_drawing(x: Tensor) -> Tensor:
    random.seed(5)
    return x + 1


def seeds_one_of_its_own(x: Tensor) -> Tensor:
    own.seed(7)
    return x + own.random()


def sets_and_puts_back(x: Tensor) -> Tensor:
    before = random.getstate()
    random.seed(5)
    y = x + random.random()
    random.setstate(before)
    return y


def draws_from_a_new_one(x: Tensor) -> Tensor:
    return x + random.Random(3).random() + float(numpy.random.default_rng(3).random())


STEPS: dict[Callable[[Tensor], Tensor], bool] = {
    **{seeds_python: False, seeds_numpy: False, seeds_without_drawing: False, seeds_one_of_its_own: False},
    **{sets_and_puts_back: True, draws_from_a_new_one: True},
}


def _seeded(step: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    random.seed(99)
    numpy.random.seed(99)
    own.seed(99)
    made = step(torch.zeros(3)).tolist()
    return made, random.random(), float(numpy.random.rand()), own.random()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generators_are_left_as_eager_leaves_them(step: Callable[[Tensor], Tensor], mode: Any) -> None:
    captured = graphs.capture(step)
    with mode():
        for _ in range(3):
            captured(torch.zeros(3))
        assert _seeded(captured) == _seeded(step)
    report = captured.report()
    assert (report.eager_calls == 0) is STEPS[step]
    assert STEPS[step] or {refusal.reason for refusal in report.refusals} == {"changing-value"}


@pytest.mark.parametrize("named", [False, True], ids=["default", "named"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_trip_that_does_not_take_place_draws_nothing(mode: Any, named: bool) -> None:
    generator = torch.Generator().manual_seed(3) if named else torch.default_generator

    def step(x: Tensor, kept: Tensor) -> Tensor:
        for _ in kept.nonzero()[:, 0]:
            torch.rand(3, generator=generator)  # nobody reads it
        return x

    captured, masks = graphs.capture(step), torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]])
    left = []
    for called in (captured, step):
        generator.manual_seed(7)
        with mode():
            for kept in masks:
                called(torch.ones(3), kept)
                left.append(generator.get_state())
    assert all(map(torch.equal, left[: len(masks)], left[len(masks) :]))


def _writes_by_numpy(x: Tensor, held: Tensor) -> Tensor:
    array = x.numpy()
    array += 1
    return x * 2


def _writes_by_a_tensor_over_an_array(x: Tensor, held: Tensor) -> Tensor:
    torch.from_numpy(held.numpy()).add_(1)
    return x + held


@pytest.mark.parametrize("step", [_writes_by_numpy, _writes_by_a_tensor_over_an_array])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_memory_that_numpy_was_given_is_written_once(step: Callable[[Tensor, Tensor], Tensor], mode: Any) -> None:
    captured, left = graphs.capture(step), []
    for called in (captured, step):
        held = torch.zeros(3)
        with mode():
            for index in range(3):
                x = torch.arange(3.0) + index
                left.append([called(x, held).tolist(), x.tolist(), held.tolist()])
    assert left[:3] == left[3:]
    assert "undeclared-write" in {refusal.reason for refusal in captured.report().refusals}


@pytest.mark.parametrize("trips", [(3, 0, 1), (0, 3, 2), (1, 3, 0)])
def test_a_number_that_counts_trips_is_of_this_call(trips: tuple[int, ...]) -> None:
    def step(x: Tensor, kept: Tensor) -> tuple[Tensor, float]:
        weight = 1.0
        for row in kept.nonzero()[:, 0]:
            x[row].mul_(2)
            weight = weight * 0.5
        return x + 0, weight

    captured = graphs.capture(step)
    with torch.no_grad():
        for count in trips:
            kept = torch.arange(3) < count
            assert captured(torch.ones(3, 2), kept)[1] == step(torch.ones(3, 2), kept)[1]
