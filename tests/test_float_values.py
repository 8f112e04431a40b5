"""Fractions that the host reads are Python's: NaN, infinities, rounding and the sign of zero; tensors picked by a number."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

import graphs
from passes.host_values.integer_widths import limit_of

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


WHOLE = {
    "hash": lambda n: (n * 2654435761) % 2**32 % 7,
    "power": lambda n: n**5 % 1000003,
    "branch": lambda n: 1 if n * n * n * n * n > 10**18 else 0,
    "fraction": lambda n: float(n * n * n * n * n),
    "shift": lambda n: (n << 40) % 97,
    "wide": lambda n: (n * 6364136223846793005 + 1442695040888963407) % 2**64 >> 33,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_do_not_wrap_at_64_bits(name: str, mode: Any) -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + WHOLE[name](int(t))

    step, x = graphs.capture(model), torch.zeros(3, dtype=torch.float64)
    with mode():
        for value in (1, 2, 3, 12345, 1000003, -7, 999999937, 3):
            assert torch.equal(step(x, torch.tensor(value)), model(x, torch.tensor(value)))


def test_only_numbers_that_can_leave_64_bits_get_a_limit() -> None:
    n, m = sympy.symbols("n m", integer=True)
    assert limit_of((n * 4096 + 3) * 2, {n: None}) is None
    assert limit_of(n * m * 4096, {n: 100_000, m: 100_000}) is None
    assert limit_of(n**5, {n: None}) == 2**12
    assert limit_of(sympy.Integer(2) ** n, {n: None}) == 61
    with pytest.raises(OverflowError, match="64 bits"):
        limit_of(n * 2**63, {n: None})
