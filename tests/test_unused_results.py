"""What a step computes and does not use may raise in eager, so it raises in a replay: rewritten recordings keep it.

On the CPU alone: on a device an index beyond the end, or an assertion that fails, ends the process in eager too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphs
import passes
from tests.passes.steps import rewritten

aten = torch.ops.aten
CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
TABLE = torch.zeros(4)
ONES = torch.ones(2, dtype=torch.int64)
VALUES = [
    (1.0, 2.0),
    (1.0, 2.0),
    (2.0, 1.0),
    (9.0, 3.0),
    (1.0, 7.0),
    (3.0, 0.0),
    (-1.0, 2.0),
    (-7.0, -3.0),
    (6.0, 7.0),
    (8.0, 0.0),
    (6.0, -1.0),
    (6.0, 1.0),
    (1.0, 1.0),
]
"""Some of them are legal for each of the operators, some not, and some take the branch to its other side."""


OPERATORS = torch.library.Library("tests_unused", "DEF")
OPERATORS.define("check(Tensor x) -> ()")


@torch.library.impl(OPERATORS, "check", "CPU")
def check(x: Tensor) -> None:
    if not bool((x > 0).all()):
        raise ValueError("not above zero")


@torch.library.register_fake("tests_unused::check", lib=OPERATORS)
def _(x: Tensor) -> None:
    return None


def look_up_in_loop(x: Tensor) -> None:
    for row in (x > 1).nonzero():
        TABLE[x.long()[row]]


UNUSED: dict[str, Callable[[Tensor], object]] = {
    "assertion": lambda x: torch._assert_async(x[1] > 1),
    "assertion with a text": lambda x: torch._assert_async(x[1] > 1, "too small"),
    "custom operator": lambda x: torch.ops.tests_unused.check(x),
    "index": lambda x: TABLE[x.long()],
    "index of a row": lambda x: TABLE[int(x[1])],
    "index by two": lambda x: TABLE.expand(2, 4)[torch.arange(2), x.long()],
    "index of those kept": lambda x: TABLE[x.long()[x > 1]],
    "index_select": lambda x: TABLE.index_select(0, x.long()),
    "gather": lambda x: TABLE.gather(0, x.long()),
    "take": lambda x: TABLE.take(x.long()),
    "take_along_dim": lambda x: torch.take_along_dim(TABLE, x.long()),
    "scatter": lambda x: TABLE.scatter(0, x.long(), 1.0),
    "embedding": lambda x: F.embedding(x.long(), TABLE[:, None]),
    "cross_entropy": lambda x: F.cross_entropy(TABLE.expand(2, 4), x.long()),
    "bincount": lambda x: torch.bincount(x.long(), minlength=12),
    "searchsorted": lambda x: torch.searchsorted(TABLE[:2], x, sorter=x.long()),
    "floor_divide": lambda x: ONES // x.long(),
    "floor_divide of a number": lambda x: 5 // x.long(),
    "remainder": lambda x: ONES % x.long(),
    "remainder of a number": lambda x: 5 % x.long(),
    "fmod": lambda x: torch.fmod(ONES, x.long()),
    "div": lambda x: torch.div(ONES, x.long(), rounding_mode="trunc"),
    "in a loop": look_up_in_loop,
}
"""By name, what a step does without using the result."""


class Step(nn.Module):
    """Writes, does something without using the result, writes again; with a host value that the passes take out.

    Args:
        tail: ``"number"``, ``"branch"``, ``"side"`` for what is unused on one side of a branch only, ``"once"`` for what is
            used on one side, ``"counter"`` for a number that the step advances.
    """

    def __init__(self, unused: Callable[[Tensor], Any], tail: str) -> None:
        super().__init__()
        self.unused, self.tail, self.count = unused, tail, 0
        self.register_buffer("before", torch.zeros(2))
        self.register_buffer("after", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.before.add_(x)
        if self.tail == "side":
            if x[0] > 5:
                self.unused(x)
        else:
            found = self.unused(x)
        self.after.add_(x)
        if self.tail == "number":
            return x * x[0].item()
        if self.tail == "once":
            return found.sum() + x if x[0] > 5 else x * 2
        if self.tail == "counter":
            self.count += 1
            return x * 2
        return x * 3 if x[0] > 5 else x * 2


def outcomes(step: Callable[[Tensor], Tensor], model: Step) -> list[Any]:
    """Of each call, what it returns or raises, and the state that it leaves."""
    found: list[Any] = []
    for value in VALUES:
        try:
            made: Any = step(torch.tensor(value)).tolist()
        except Exception as error:
            made = type(error)
        found.append((value, made, model.before.tolist(), model.after.tolist(), model.count))
    return found


def same_as_eager(make: Callable[[], Step], context: str) -> None:
    model, twin = make(), make()
    step = graphs.capture(model)
    with CONTEXTS[context]():
        expected, got = outcomes(twin, twin), outcomes(step, model)
    assert got == expected
    assert any(isinstance(made, type) for _, made, *_ in expected)
    assert step.report().replays >= 1


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("tail", ["number", "branch", "side", "counter"])
@pytest.mark.parametrize("name", UNUSED)
def test_what_eager_raises_for_an_unused_result_is_raised(name: str, tail: str, context: str) -> None:
    same_as_eager(lambda: Step(UNUSED[name], tail), context)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["index", "index of a row", "gather", "embedding", "floor_divide", "cross_entropy"])
def test_what_one_side_of_a_branch_uses_is_refused_on_the_other_too(name: str, context: str) -> None:
    same_as_eager(lambda: Step(UNUSED[name], "once"), context)


def test_what_can_raise_for_no_data_is_dropped() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        x.view(2, 2).t().contiguous()
        torch.softmax(x.exp() / 0.0, 0).cumsum(0)
        x[x.argmax() % 4]
        x.index_select(0, t.clamp(0, 3)[None])
        x.long() // 2
        return x * t.item()

    module = rewritten(step, torch.rand(4), torch.tensor(2)).module
    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert targets == ["aten._to_copy.default", "aten.mul.Tensor"]  # of the number and by it


def test_a_row_that_is_written_is_not_read_before() -> None:
    def step(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
        cache[int(t)] = x
        return cache * 1

    module = rewritten(step, torch.rand(4, 3), torch.rand(3), torch.tensor(2)).module
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert aten.index.Tensor not in targets
    assert aten.index_put_.default in targets


def test_a_pass_over_a_graph_of_its_own_drops_no_check() -> None:
    def step(x: Tensor, i: Tensor) -> Tensor:
        x[i]
        x.sin()
        return x + torch.tensor([1.0, 2.0])

    module = passes_over(step, torch.rand(2), torch.tensor([0, 1]))
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert aten.index.Tensor in targets
    assert aten.sin.default not in targets


def passes_over(step: Callable[..., Tensor], *tensors: Tensor) -> torch.fx.GraphModule:
    module = torch.fx.experimental.proxy_tensor.make_fx(step)(*tensors)
    passes.run(module, [lambda module: [("before", "after")]])
    return module
