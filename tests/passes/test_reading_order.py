"""Tensors that stand for numbers are read in the order in which this build of torch reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
from passes.tracing.reading_order import _asked, reading_order

Tensor = torch.Tensor
N, M, S = torch.tensor(2), torch.tensor(7), torch.tensor(1)


class Reads(TorchDispatchMode):
    """Notes the numbers that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.values.append(int(result))
        return result


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "two bounds": ((N, M), {}),
    "with a dtype": ((N, M), {"dtype": torch.long}),
    "with a step": ((N, M, S), {}),
    "one is a number": ((N, 9), {}),
    "by name": ((), {"start": N, "end": M, "step": S}),
    "one by name": ((N,), {"end": M}),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_order_is_that_of_an_eager_run(call: str) -> None:
    args, kwargs = CALLS[call]
    with Reads() as seen:
        torch.arange(*args, **kwargs)
    given = {**dict(enumerate(args)), **kwargs}
    with Reads() as asked:  # a mode of the caller's is not what answers
        order = reading_order(torch.arange, args, kwargs)
    assert [int(given[place]) for place in order] == seen.values and not asked.values


def test_what_the_function_refuses_is_left_in_order() -> None:
    assert reading_order(torch.ones, (N, "nothing", M), {}) == [0, 2]


def after(n: Tensor) -> Tensor:
    return torch.arange(n, n + 1)


def before(n: Tensor) -> Tensor:
    return torch.arange(n - 1, n, dtype=torch.long)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("step", [after, before])
def test_bounds_that_differ_from_call_to_call_are_told_apart(step: Callable[[Tensor], Tensor], context: Any) -> None:
    """As models count positions from the length of their cache."""

    def places(table: Tensor, length: Tensor) -> Tensor:
        return table.index_select(0, step(length)).sum(0)

    line = step.__code__.co_firstlineno + 1
    captured = graphs.capture(places, bounds={f"test_reading_order.py:{line}": 16})
    table = torch.randn(16, 3)
    _asked.cache_clear()
    with context():
        for length in (3, 5, 9, 2):
            torch.testing.assert_close(captured(table, torch.tensor(length)), places(table, torch.tensor(length)))
    assert captured.report().replays == 4
