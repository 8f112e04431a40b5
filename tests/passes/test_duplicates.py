"""`passes.optimize.cse`: what is merged, and what only looks alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.steps import check, printed, rewritten

Step = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]


def twice(x: Tensor, t: Tensor) -> Tensor:
    return (x * 2).sin() + (x * 2).cos() * t.item()


def count(step: Step, operator: str) -> int:
    graph = rewritten(step, torch.ones(3), torch.tensor(2.0))
    check(graph, step, torch.randn(3), torch.tensor(3.0))
    return printed(graph.module).count(f"= {operator}")


def test_equal_operators_are_one() -> None:
    assert count(twice, "mul.Tensor(arg0_1, 2)") == 1


def written_between(x: Tensor, t: Tensor) -> Tensor:
    first = x * 2
    x.add_(t.item())
    return first + x * 2


def written_through_a_view(x: Tensor, t: Tensor) -> Tensor:
    first = x * 2
    x[1:].mul_(t.item())
    return first - x * 2


def two_buffers(x: Tensor, t: Tensor) -> Tensor:
    a, b = torch.zeros_like(x), torch.zeros_like(x)
    a.add_(1)
    return a + b * t.item()


@pytest.mark.parametrize(
    ("step", "operator"),
    [(written_between, "mul.Tensor"), (written_through_a_view, "mul.Tensor"), (two_buffers, "zeros_like.default")],
)
def test_memory_that_is_written_keeps_operators_apart(step: Step, operator: str) -> None:
    assert count(step, operator) >= 2


def test_what_is_returned_twice_stays_two_tensors() -> None:
    graph = rewritten(lambda x, t: (x * 2, x * 2, x * t.item()), torch.ones(3), torch.tensor(2.0))
    first, second, _ = graph(torch.ones(3), torch.tensor(2.0))[0]
    assert first.data_ptr() != second.data_ptr()


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    graph = rewritten(lambda x, t: torch.rand(3) - torch.rand(3) + t.item(), torch.ones(3), torch.tensor(2.0))
    assert printed(graph.module).count("= rand.default") == 2
