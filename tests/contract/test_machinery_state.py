"""What torch, Python and this package note for themselves in closures that a step leads to is no state of the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # so that no first call is put off for having imported it
from torch import Tensor, nn

import graphs
from graphs.dispatch.call_log import NotReplayed

contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


@torch.library.custom_op("machinery_state::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("machinery_state::advance", mutates_args=("cache",))
def advance(x: Tensor, cache: Tensor) -> None:
    cache.add_(x)


twice.register_fake(lambda x: torch.empty_like(x))


class Holding(nn.Module):
    """Has its operators as attributes, and decides by a value of the device."""

    def __init__(self, op: Any, update: Any) -> None:
        super().__init__()
        self.op, self.update = op, update
        self.cache = nn.Buffer(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.update(x, self.cache)
        y = self.op(x) + self.cache
        if x.sum() > 0:
            return y + 1
        return y - 1


def holding() -> Callable[[Tensor], Tensor]:
    return Holding(twice, advance)


def closing_over() -> Callable[[Tensor], Tensor]:
    op = twice

    def step(x: Tensor) -> Tensor:
        y = op(x)
        return y + 1 if x.sum() > 0 else y - 1

    return step


def registered() -> Callable[[Tensor], Tensor]:
    @graphs.register_op(name="machinery_state::rows", mutates_args=("cache",))
    def rows(cache: Tensor, x: Tensor, slot: Tensor) -> None:
        for index in range(2):
            if slot[index] >= 0:
                cache[slot[index]] = x[index]

    cache = torch.zeros(4)

    def step(x: Tensor) -> Tensor:
        rows(cache, x, x.long())
        return cache * 2

    return step


@contexts
@pytest.mark.parametrize("make", [holding, closing_over, registered])
def test_a_step_that_leads_to_an_operator_of_pythons_reads_host_values(make: Callable[[], Any], context: Any) -> None:
    step, expected = make(), make()
    captured = graphs.capture(step)
    with context():
        for call in range(4):
            x = torch.tensor([1.0, -2.0, 3.0, -1.0]).roll(call) - call
            assert torch.equal(captured(x), expected(x))
    report = captured.report()
    assert report.refusals == () and report.replays == 4


@contexts
def test_what_an_operator_keeps_in_a_closure_of_the_users_is_state(context: Any) -> None:
    count = 0

    @torch.library.custom_op(f"machinery_state::counted_{context.__name__}", mutates_args=())
    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * 2

    counted.register_fake(lambda x: torch.empty_like(x))
    captured = graphs.capture(lambda x: counted(x))
    with context(), pytest.warns(NotReplayed):
        for call in range(3):
            captured(torch.ones(4))
            assert count == call + 1


@contexts
def test_what_singledispatch_finds_for_classes_of_a_tracer_is_no_state(context: Any) -> None:
    @functools.singledispatch
    def activation(x: Any) -> Any:
        raise TypeError

    count = [0]

    @activation.register
    def _(x: Tensor) -> Tensor:
        count[0] += 1
        return x * 2

    captured = graphs.capture(lambda x: activation(x) + 1 if x.sum() > 0 else activation(x))
    with context():
        for call in range(4):
            assert captured(torch.ones(4)).tolist() == [3.0] * 4
            assert count == [call + 1]
    assert captured.report().replays == 4
