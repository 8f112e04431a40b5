"""Host syncs are found however they are written, and what the host got is noted in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from graphs.observation.eager_trace import trace_eager
from graphs.observation.operations import EagerTrace
from tests.parity import batches, parity

Tensor = torch.Tensor


def watched(step: Callable[[Tensor], Any], x: Tensor) -> EagerTrace:
    return trace_eager(lambda: step(x), [x])[1]


def test_a_value_that_leaves_through_dlpack_is_not_frozen() -> None:
    parity(lambda: lambda x: x * float(np.from_dlpack(x)[0]), batches(*[(3,)] * 4))


def test_a_value_that_leaves_through_the_storage_is_not_frozen() -> None:
    parity(lambda: lambda x: x * torch.tensor([]).set_(x.untyped_storage()).sum(), batches(*[(3,)] * 4))


@pytest.mark.parametrize(
    ("step", "function", "values"),
    [
        (lambda x: x[0].item(), "item", [3]),
        (lambda x: int(x[1]), "__int__", [1]),
        (lambda x: float(x[1]), "__float__", [1]),
        (lambda x: x + 1 if x[2] else x, "__bool__", [4]),
        (lambda x: list(range(x[1])), "__index__", [1]),
        (lambda x: x[x.argmax()], "__getitem__", [4]),
        (lambda x: x[x[1] : x[4]], "__getitem__", [1, 5]),
        (lambda x: torch.arange(x[0]), "arange", [3]),
        (lambda x: f"{x[0]}", "__format__", [3]),
        (lambda x: 4 in x, "__contains__", [True]),
        (lambda x: torch.equal(x, x + 1), "equal", [False]),
        (lambda x: x.tolist(), "tolist", [[3, 1, 4, 1, 5]]),
        (lambda x: torch.tensor([x[0], [x[2]][0]]), "tensor", [3, 4]),
        (lambda x: x.cpu(), "cpu", [None]),
        (lambda x: x.to("cpu", torch.float32), "to", [None]),
        (lambda x: x.to(device="cpu"), "to", [None]),
        (lambda x: f"{x}", "__format__", [None]),
        (lambda x: str(x), "__repr__", [None]),
        (lambda x: np.asarray(x), "__array__", [None]),
        (lambda x: (x > 2).nonzero(), "nonzero", [3]),
        (lambda x: torch.where(x > 2), "where", [3]),
        (lambda x: x[x == 1], "__getitem__", [2]),
        (lambda x: x.masked_select(x > 4), "masked_select", [1]),
        (lambda x: x.unique(), "unique", [4]),
        (lambda x: torch.stack([x, x]).unique(dim=1), "unique", [4]),
        (lambda x: x.bincount(), "bincount", [6]),
        (lambda x: x.repeat_interleave(x), "repeat_interleave", [14]),
    ],
)
def test_every_value_the_host_gets_is_noted(step: Callable[[Tensor], Any], function: str, values: list[Any]) -> None:
    trace = watched(step, torch.tensor([3, 1, 4, 1, 5]))
    assert [(read.function, read.value) for read in trace.reads] == [(function, value) for value in values]
    line = step.__code__.co_firstlineno
    assert {(read.frame, read.site.line) for read in trace.reads} == {((__file__, line), line)}
    assert trace.findings and all(finding.site.file == __file__ for finding in trace.findings)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.to(torch.float32),
        lambda x: x.to(x.device),
        lambda x: x.repeat_interleave(x, output_size=14),
        lambda x: torch.nonzero_static(x > 2, size=3),
        lambda x: x[x.argmax(0, keepdim=True)],
    ],
)
def test_what_stays_on_the_device_is_not_a_read(step: Callable[[Tensor], Any]) -> None:
    trace = watched(step, torch.tensor([3, 1, 4, 1, 5]))
    assert trace.reads == [] and trace.findings == []


def test_reads_are_in_order_and_know_the_operators_before_them() -> None:
    def step(x: Tensor) -> Tensor:
        n = int(x[0])
        for i in x.tolist():
            n += i * int(x[1])
        return x[:n]

    trace = watched(step, torch.tensor([2, 3]))
    assert [read.value for read in trace.reads] == [2, [2, 3], 3, 3]
    names = [operation.func._schema.name.removeprefix("aten::") for operation in trace.operations]
    assert names == ["select", "_local_scalar_dense", "select", "_local_scalar_dense", "select", "_local_scalar_dense", "slice"]
    assert [read.index for read in trace.reads] == [1, 2, 3, 5]
