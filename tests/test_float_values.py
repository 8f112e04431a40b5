"""Fractions that the host reads are Python's: NaN, infinities, rounding and the sign of zero; tensors picked by a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphs

STEPS = {
    "nan guard": lambda f: f != f,
    "difference": lambda f: f - f == 0,
    "zero product": lambda f: f * 0 == 0,
    "bounded": lambda f: f <= float("inf"),
    "rounded": lambda f: (f + 1) - 1 == f,
    "floor": lambda f: f // 2 == f // 2,
    "remainder": lambda f: f % -0.3 < 0,
}
VALUES = (0.5, 2.0, float("nan"), float("inf"), 9007199254740993.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", STEPS)
def test_branches_on_fractions_go_as_in_python(name: str, mode: Any) -> None:
    def model(t: torch.Tensor) -> torch.Tensor:
        return t.new_ones(()) if STEPS[name](t.item()) else t.new_zeros(())

    step = graphs.capture(model)
    with mode():
        for value in VALUES:
            t = torch.tensor(value, dtype=torch.float64)
            assert torch.equal(step(t), model(t))


def test_sign_of_zero_of_a_side() -> None:
    def model(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        k = 0.0
        if n > 4:
            k = -0.0
        return x * k

    step = graphs.capture(model)
    with torch.no_grad():
        for n in (3, 5, 2, 6):
            made, expected = (f(torch.ones(2), torch.tensor(n)) for f in (step, model))
            assert torch.equal(torch.signbit(made), torch.signbit(expected))


class Ring:
    def __init__(self) -> None:
        self.buffers, self.place = [torch.zeros(3) for _ in range(3)], 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        buffer = self.buffers[self.place]
        self.place = (self.place + 1) % 3
        buffer.add_(x)
        return torch.stack(self.buffers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_buffers_picked_by_a_number_are_written_once(mode: Any) -> None:
    eager, captured = Ring(), Ring()
    step = graphs.capture(captured)
    with mode():
        for k in range(7):
            assert torch.equal(step(torch.full((3,), k + 1.0)), eager(torch.full((3,), k + 1.0)))
    assert captured.place == eager.place
