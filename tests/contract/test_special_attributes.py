"""What a step changes that no dictionary holds: the class of an object, its dictionary as a whole, the defaults of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")


class Plain:
    number = 1.0

    def factor(self) -> float:
        return self.number


class Double(Plain):
    def factor(self) -> float:
        return 2 * self.number


def exchanges_the_class() -> Callable[[Tensor], Tensor]:
    held = Plain()

    def step(x: Tensor) -> Tensor:
        held.__class__ = Double if type(held) is Plain else Plain
        return x * held.factor()

    return step


def replaces_the_dictionary() -> Callable[[Tensor], Tensor]:
    held = Plain()

    def step(x: Tensor) -> Tensor:
        held.__dict__ = {"number": held.number + 1}
        return x * held.factor()

    return step


def moves_a_default() -> Callable[[Tensor], Tensor]:
    def own(x: Tensor, by: float = 1.0) -> Tensor:
        return x * by

    def step(x: Tensor) -> Tensor:
        own.__defaults__ = (own.__defaults__[0] + 1,)  # type: ignore[index]
        return own(x)

    return step


def moves_a_default_by_name() -> Callable[[Tensor], Tensor]:
    def own(x: Tensor, *, by: float = 1.0) -> Tensor:
        return x * by

    def step(x: Tensor) -> Tensor:
        own.__kwdefaults__["by"] += 1
        return own(x)

    return step


STEPS = [exchanges_the_class, replaces_the_dictionary, moves_a_default, moves_a_default_by_name]


@pytest.mark.parametrize("make", STEPS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_changed_once_in_each_call(make: Callable[[], Callable[[Tensor], Tensor]], mode: Any) -> None:
    captured, eager = graphs.capture(make()), make()
    with mode():
        for _ in range(6):
            assert torch.equal(captured(torch.ones(2)), eager(torch.ones(2)))
    assert {refusal.reason for refusal in captured.report().refusals} == {"changing-value"}
