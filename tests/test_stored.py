"""Host values that a step keeps in Python: refused by name, also where they happen to be what is there already."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
CONTEXTS = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n: Any = 0

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        self.n += n.item()
        return x * self.n


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n: Any = 3

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        self.n = n.item()
        return x * 2


class KeepsTheLargest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n: Any = 3

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        self.n = max(self.n, int(n))
        return x * self.n


class KeepsAFraction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n: Any = 1.5

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        self.n = n.float().item() * 0.5
        return x * 2


class KeepsInADictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = {"rows": 0, "list": [3]}

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        self.n["rows"] = n.item()  # type: ignore[assignment]
        self.n["list"][0] = n.item()  # type: ignore[index]
        return x * 2


@CONTEXTS
@pytest.mark.parametrize("kind", [Adds, Keeps, KeepsTheLargest, KeepsAFraction, KeepsInADictionary])
@pytest.mark.parametrize("numbers", [(0, 3, 1, 5), (3, 3, 3, 5, 2)], ids=["zero-first", "alike-first"])
def test_a_number_that_happens_to_be_there_already_is_kept_up_to_date(
    kind: type[Any], numbers: tuple[int, ...], context: Callable[[], Any]
) -> None:
    model, reference = kind(), kind()
    step = graphs.capture(model)
    for number in numbers:
        with context():
            assert torch.equal(step(torch.ones(2), torch.tensor(number)), reference(torch.ones(2), torch.tensor(number)))
        assert model.n == reference.n and type(model.n) is type(reference.n)
    assert step.report().replays == 0 and step.report().eager_calls == len(numbers)


def keeps_in_its_argument(x: Tensor, n: Tensor, where: Any) -> Tensor:
    if isinstance(where, list):
        where[0] = n.item()
    elif isinstance(where, dict):
        where["n"] = n.item()
    else:
        where.n = n.item()
    return x * 2


@pytest.mark.parametrize("made", [lambda n: [n], lambda n: {"n": n}, lambda n: types.SimpleNamespace(n=n)])
def test_a_number_kept_in_an_argument_reaches_the_caller(made: Callable[[int], Any]) -> None:
    step = graphs.capture(keeps_in_its_argument)
    with torch.no_grad():
        for number in (3, 3, 5, 2):
            given = made(3)
            step(torch.ones(2), torch.tensor(number), given)
            assert given == made(number)


def test_a_trace_leaves_no_symbol_behind() -> None:
    model = Keeps()
    step = graphs.capture(model)
    with torch.no_grad():
        step(torch.ones(2), torch.tensor(3))
        step(torch.ones(2), torch.tensor(3))
    assert type(model.n) is int


def test_the_refusal_names_the_place_and_the_line_that_reads() -> None:
    with torch.no_grad(), pytest.raises(graphs.errors.ChangingValue, match=r"self\.n.*would not write"):
        graphs.capture(KeepsTheLargest(), strict=True)(torch.ones(2), torch.tensor(1))
