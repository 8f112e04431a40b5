"""Arguments that the step writes: in place where they stay, copied in and back where they are new at each call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed

Tensor = torch.Tensor
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        yield


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


def doubled(x: Tensor) -> Tensor:
    return x.mul_(2)


def written_row(x: Tensor, y: Tensor) -> Tensor:
    x[1] = y.sum()
    return x.sum() + y


def written_and_read(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    before = x * 3
    x.add_(y)
    return before, x[0]


STEPS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "returned": (doubled, lambda: (random(3, 4),)),
    "a row": (written_row, lambda: (random(3, 4), random(4))),
    "read before and after": (written_and_read, lambda: (random(3, 4), random(4))),
    "two": (lambda x, y: (x.add_(y), y.mul_(x.sum())), lambda: (random(3), random(3))),
    "transposed": (written_and_read, lambda: (random(4, 3).t(), random(4))),
    "with holes": (written_and_read, lambda: (random(3, 8)[:, ::2], random(4))),
    "conjugated": (doubled, lambda: (torch.randn(3, dtype=torch.complex64).conj(),)),
    "conjugated with holes": (doubled, lambda: (torch.randn(6, dtype=torch.complex64).conj()[::2],)),
    "given twice": (written_and_read, lambda: (lambda x: (x, x))(random(3, 4))),
    "in a dict": (lambda d: d["x"].clamp_(min=0).sum(), lambda: ({"x": random(5)},)),
    "random numbers": (lambda x: x.normal_() * 2, lambda: (random(5),)),
    "integers": (lambda x: x.add_(1), lambda: (torch.arange(5) + 0,)),
}


def kept(value: Any) -> Any:
    """A copy of arguments with their layout, identity and bits."""
    return copy.deepcopy(value)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STEPS)
def test_an_argument_new_at_each_call_is_written_as_in_eager(name: str, mode: str) -> None:
    model, arguments = STEPS[name]
    step, alive = graphs.capture(model), []
    with MODES[mode]():
        for call in range(7):
            torch.manual_seed(call)
            given = arguments()
            torch.manual_seed(call)
            wanted = arguments()
            alive.append(given)  # so that no address comes back
            torch.manual_seed(call)
            got = step(*given)
            torch.manual_seed(call)
            expected = model(*wanted)
            torch.testing.assert_close(tensors(got), tensors(expected), rtol=0, atol=0)
            torch.testing.assert_close(tensors(given), tensors(wanted), rtol=0, atol=0)
    assert step.report().replays == 7, str(step.report())
    assert step.report().eager_calls == 0


def test_the_returned_argument_is_the_argument() -> None:
    step = graphs.capture(doubled)
    with torch.no_grad():
        for _ in range(5):
            x = random(3)
            assert step(x) is x


def test_a_cache_that_stays_is_written_in_place_and_recorded_anew_when_it_moves() -> None:
    def model(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(x)
        return cache.sum() + x

    step = graphs.capture(model)
    with torch.no_grad():
        for _ in range(2):
            cache, expected = torch.zeros(3), torch.zeros(3)
            for _ in range(10):
                x = random(3)
                assert torch.equal(step(cache, x), model(expected, x)) and torch.equal(cache, expected)
    assert step.report().replays == 20 and not step._graphs_recordings.routes.moving


def test_a_written_argument_that_shares_memory_with_another_is_read_after_the_write() -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return y * 2

    step, alive = graphs.capture(model), []
    with torch.no_grad():
        for _ in range(4):
            alive.append(random(4))
            step(alive[-1], random(4))
        for overlap in range(4):
            base, again = torch.arange(8.0), torch.arange(8.0)
            x, y = base[:4], base[overlap : overlap + 4]
            assert torch.equal(step(x, y), model(again[:4], again[overlap : overlap + 4])) and torch.equal(base, again)
            x = base[:4]
            assert torch.equal(step(x, base[1:5]), model(again[:4], again[1:5]))


def test_a_written_argument_that_is_the_steps_own_state_is_read_after_the_write() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("h", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return self.h * 2 + x

    model, expected = Model(), Model()
    step, alive = graphs.capture(model), []
    with torch.no_grad():
        for _ in range(4):
            alive.append(random(3))
            step(alive[-1])
        for _ in range(2):
            assert torch.equal(step(model.h), expected(expected.h)) and torch.equal(model.h, expected.h)


def test_a_written_argument_is_compared_at_every_call_where_asked() -> None:
    step, alive = graphs.capture(written_and_read, verify="always"), []
    with torch.no_grad():
        for _ in range(5):
            x, y = random(3, 4), random(4)
            alive.append(x)
            wanted = x.clone()
            torch.testing.assert_close(step(x, y), written_and_read(wanted, y))
            assert torch.equal(x, wanted)


def test_a_declared_static_argument_that_moves_is_read_where_it_is() -> None:
    step, alive = graphs.capture(doubled, static=["x"]), []
    with torch.no_grad():
        for _ in range(4):
            alive.append(random(3))
            wanted = alive[-1] * 2
            assert torch.equal(step(alive[-1]), wanted)
    assert step.report().refusals == () and (step.report().recordings, step.report().moved) == (1, 3)


def test_a_declared_static_argument_of_another_form_stays_a_reason() -> None:
    step, alive = graphs.capture(doubled, static=["x"]), []
    with torch.no_grad():
        for start in range(4):
            alive.append(random(8))
            x = alive[-1][start : start + 3]
            wanted = x * 2
            assert torch.equal(step(x), wanted)
    assert [refusal.reason for refusal in step.report().refusals] == ["moved-static-tensor"]
