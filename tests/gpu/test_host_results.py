"""What a step on a device computes on the host: never left as it was recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphs

CALLS = 6


class Counts(nn.Module):
    """A position that lives on the host and is advanced by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.position = torch.tensor(0)
        self.rows = nn.Parameter(torch.arange(64.0).view(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.position += 1
        return x + self.rows[self.position]


class Holds(nn.Module):
    """A number on the host that a step reads in one of several ways; the user changes it in place."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.limit = torch.tensor(2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.limit)


class Draws(nn.Module):
    """A draw from the host's generator."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.total = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.sum(0))
        return self.how(x) + self.total


def branching(x: Tensor) -> Tensor:
    return x * 2 if torch.rand(()) > 0.5 else x - 1


def looping(x: Tensor) -> Tensor:
    turn = 0
    while turn < int(torch.randint(4, ())):
        x = x + 1
        turn += 1
    return x


DRAWS = {
    "picks a row": lambda x: x[int(torch.randint(4, ()))],
    "branches": branching,
    "counts trips": looping,
    "of no use": lambda x: x * 2 + 0 * len(torch.rand(3)),
    "uploaded": lambda x: x + torch.rand(4).to(x.device),
    "a mean": lambda x: x * float(torch.rand(8).mean()),
}
READS = {
    "as a length": lambda x, limit: x[: int(limit)].sum(0),
    "in a branch": lambda x, limit: x * 2 if limit > 2 else x - 1,
    "as a number": lambda x, limit: x * limit,
    "as an index": lambda x, limit: x[limit],
    "uploaded": lambda x, limit: x + limit.to(x.device),
    "computed with": lambda x, limit: x * float(limit * 2 + 1),
}


def driven(model: nn.Module, device: torch.device, change: Callable[[nn.Module, int], Any]) -> list[Any]:
    torch.manual_seed(5)
    found: list[Any] = []
    step = graphs.capture(model) if getattr(model, "captured", False) else model
    for call in range(CALLS):
        change(model, call)
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(call)).to(device)
        with torch.no_grad():
            found += [step(x), torch.get_rng_state(), *map(torch.clone, model.state_dict().values())]
    return found


def compared(model: nn.Module, device: torch.device, change: Callable[[nn.Module, int], Any] = lambda model, call: None) -> None:
    model = model.to(device)
    twin = copy.deepcopy(model)
    twin.captured = True  # type: ignore[assignment]
    torch.testing.assert_close(driven(twin, device, change), driven(model, device, change))


@pytest.mark.parametrize("how", DRAWS)
def test_a_draw_on_the_host_takes_place_at_every_call(how: str, device: torch.device) -> None:
    compared(Draws(DRAWS[how]), device)


@pytest.mark.parametrize("how", READS)
def test_a_number_on_the_host_is_read_at_every_call(how: str, device: torch.device) -> None:
    compared(Holds(READS[how]), device, lambda model, call: model.limit.fill_(2 + call // 3))  # type: ignore[operator, union-attr]


def test_a_counter_on_the_host_counts_on(device: torch.device) -> None:
    compared(Counts(), device)


def test_an_outcome_that_the_step_would_catch_on_a_host_does_not_end_the_process(device: torch.device) -> None:
    rows = torch.arange(12.0, device=device).view(3, 4)

    def step(index: Tensor) -> Tensor:
        try:
            return rows[index.unique()].sum(0)
        except IndexError:
            return rows[0]

    captured = graphs.capture(step)
    for call in range(3):
        index = torch.randint(3, (4,), generator=torch.Generator().manual_seed(call)).to(device)
        with torch.no_grad():
            torch.testing.assert_close(captured(index), step(index))
    torch.cuda.synchronize()
