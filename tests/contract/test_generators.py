"""A step that sets a random generator is eager by name, also where it sets the same state whenever it is called."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.ledger.NotReplayed")
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
