"""`passes.core.values.value_ranges`: which indices cannot leave their tensor, and are not guarded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.steps import check, printed, rewritten

Step = Callable[[Tensor, Tensor], Tensor]


def branching(body: Callable[[Tensor], Tensor]) -> Step:
    """A step that assumes something, so that its indices are guarded, with ``body`` in it."""

    def step(x: Tensor, t: Tensor) -> Tensor:
        return body(x) * 2 if t.item() > 0 else body(x)

    return step


def shifted(x: Tensor) -> Tensor:
    order = x.argsort()
    order[:1] += 1
    return x[order % 4]


def moved(x: Tensor) -> Tensor:
    order = x.argsort()
    head = order[:2]
    head.sub_(1)
    return x[order]


CERTAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "places of a sort": lambda x: x[x.argsort()],
    "of a part of them, halved": lambda x: x[x.argsort()[:2] // 2],
    "of the largest": lambda x: x[x.topk(2).indices],
    "a remainder": lambda x: x[(x.abs() * 3).long() % 4],
    "kept within": lambda x: x[(x * 3).long().clamp(0, 3)],
}
UNCERTAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "a number made of data": lambda x: x[(x.abs() * 0).long()],
    "places of a longer tensor": lambda x: x[:2][torch.cat([x, x]).argsort()[-1:] * 0],
    "places that were moved": moved,
}


@pytest.mark.parametrize("name", CERTAIN)
def test_an_index_that_cannot_stray_is_not_guarded(name: str) -> None:
    step = branching(CERTAIN[name])
    graph = rewritten(step, torch.randn(4), torch.tensor(1))
    assert "any.default" not in printed(graph.module)
    check(graph, step, torch.randn(4), torch.tensor(1))


@pytest.mark.parametrize("name", UNCERTAIN)
def test_any_other_is(name: str) -> None:
    step = branching(UNCERTAIN[name])
    graph = rewritten(step, torch.randn(4), torch.tensor(1))
    assert "any.default" in printed(graph.module)
    check(graph, step, torch.randn(4), torch.tensor(1))


def test_memory_that_is_written_has_no_range() -> None:
    step = branching(shifted)
    graph = rewritten(step, torch.randn(4), torch.tensor(1))
    check(graph, step, torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor(1))
