"""What `writes` of `graphs.register_op` may return, and what is said where it returns something else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # which the first call of an operator imports, and a step that imports it is tried again
from torch import Tensor, nn

import graphs
from graphs.errors import ConfigError

contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
_numbers = itertools.count()


def _put(cache: Tensor, x: Tensor, slot: Tensor, scale: float = 1.0) -> Tensor:
    cache[slot] = x * scale
    return x + scale


def _fake(cache: Tensor, x: Tensor, slot: Tensor, scale: float = 1.0) -> Tensor:
    return torch.empty_like(x)


def _operator(writes: Callable[..., Any], graph_safe: Any = True) -> Any:
    name = f"declared_writes::put_{next(_numbers)}"
    return graphs.register_op(
        _put, name=name, mutates_args=("cache",), writes={"cache": writes}, fake=_fake, graph_safe=graph_safe
    )


class Writing(nn.Module):
    """Writes rows of a cache that is too large to be saved whole, and counts."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(512, 64))
        self.register_buffer("calls", torch.zeros(()))
        self.op = op

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.op(self.cache, x, slot, scale=2.0)
        return y + self.cache[slot]


class Catching(Writing):
    """Goes another way where the operator raises."""

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        try:
            return super().forward(x, slot)
        except Exception:
            return x * 100


LEGAL: dict[str, Callable[..., Any]] = {
    "a tensor": lambda cache, x, slot, scale=1.0: slot,
    "a list": lambda cache, x, slot, scale=1.0: slot.tolist(),
    "a tensor of other whole numbers": lambda cache, x, slot, scale=1.0: slot.int(),
    "a mask": lambda cache, x, slot, scale=1.0: torch.zeros(512, dtype=torch.bool).index_fill(0, slot, True),
    "a tuple": lambda cache, x, slot, scale=1.0: (slot[:, None], torch.arange(64)),
    "a tuple with a list": lambda cache, x, slot, scale=1.0: (slot[:, None], list(range(64))),
    "nothing": lambda cache, x, slot, scale=1.0: None,
    "nothing of the second dimension": lambda cache, x, slot, scale=1.0: (slot, None),
}


@contexts
@pytest.mark.parametrize("graph_safe", [True, "check"])
@pytest.mark.parametrize("kind", LEGAL)
def test_rows_are_told_in_several_ways(kind: str, graph_safe: Any, context: Any) -> None:
    model, twin = (Writing(_operator(LEGAL[kind], graph_safe)) for _ in range(2))
    step = graphs.capture(model)
    with context():
        for turn in range(3):
            x, slot = torch.randn(2, 64), torch.tensor([turn, 100 + turn])
            assert torch.equal(step(x, slot), twin(x, slot))
            assert torch.equal(model.cache, twin.cache)
    assert (step.report().replays, step.report().refusals) == (3, ())


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "a list of tensors": (lambda cache, x, slot, scale=1.0: [slot], "'list'"),
    "a number": (lambda cache, x, slot, scale=1.0: 3, "'int'"),
    "a number in a tuple": (lambda cache, x, slot, scale=1.0: (slot, 3), "'int'"),
    "a list of bool": (lambda cache, x, slot, scale=1.0: [True] * 512, "'list'"),
    "a tensor of floats": (lambda cache, x, slot, scale=1.0: slot.float(), r"'tensor of torch\.float32'"),
    "no default argument": (lambda cache, x, slot: slot, "TypeError"),
    "an exception": (lambda cache, x, slot, scale=1.0: 1 // 0, "ZeroDivisionError"),
}


@contexts
@pytest.mark.parametrize("graph_safe", [True, "check"])
@pytest.mark.parametrize("step_class", [Writing, Catching])
@pytest.mark.parametrize("kind", WRONG)
def test_what_tells_no_rows_is_an_error_that_names_it(kind: str, step_class: Any, graph_safe: Any, context: Any) -> None:
    writes, given = WRONG[kind]
    model = step_class(_operator(writes, graph_safe))
    step = graphs.capture(model)
    with context():
        for _ in range(2):
            message = rf"writes\['cache'\] of declared_writes::put_\d+ = .*{given}.* is not legal; it must be .*whole numbers"
            with pytest.raises(ConfigError, match=message):
                step(torch.randn(2, 64), torch.tensor([1, 2]))
            assert not model.calls and not model.cache.any(), "the state is as it was"
    assert (step.report().recordings, step.report().eager_calls, step.report().refusals) == (0, 0, ())


def test_the_check_of_an_operator_and_a_size_recorded_ahead_say_the_same() -> None:
    op = _operator(WRONG["an exception"][0], "check")
    with pytest.raises(ConfigError, match=r"writes\['cache'\]"):
        graphs.capture_check(op, (torch.zeros(512, 64), torch.randn(2, 64), torch.tensor([1, 2])))
    model = Writing(op)
    step = graphs.capture(model, batch_dims={"x": 0, "slot": 0})
    with torch.no_grad(), pytest.raises(ConfigError, match=r"writes\['cache'\]"):
        step.record((torch.randn(2, 64), torch.tensor([1, 2])), sizes=[2])
    assert not model.calls and not model.cache.any()
