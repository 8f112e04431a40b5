"""The first call of a key leaves no trace: state advances once per call, whatever holds it."""

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphs
from tests.parity import batches, parity

CALLS = batches(*[(3,)] * 9)
counter = 0


def branch(x: torch.Tensor, early: bool) -> torch.Tensor:
    return x * 2 if early else x * 3


def advance() -> int:
    global counter
    counter += 1
    return counter


def in_a_helpers_global() -> Callable[[torch.Tensor], torch.Tensor]:
    global counter
    counter = 0
    return lambda x: branch(x, advance() <= 6)


def in_a_method_global() -> nn.Module:
    class Step(nn.Module):
        def advanced(self) -> int:
            return advance()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return branch(x, self.advanced() <= 6)

    global counter
    counter = 0
    return Step()


def in_a_class_attribute() -> nn.Module:
    class Step(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            return branch(x, type(self).calls <= 6)

    return Step()


def in_a_default_argument() -> Callable[..., torch.Tensor]:
    def step(x: torch.Tensor, memory: dict[str, int] = {"n": 0}) -> torch.Tensor:  # noqa: B006
        memory["n"] += 1
        return branch(x, memory["n"] <= 6)

    return step


def in_a_function_attribute() -> Callable[..., torch.Tensor]:
    def step(x: torch.Tensor) -> torch.Tensor:
        step.calls += 1  # type: ignore[attr-defined]
        return branch(x, step.calls <= 6)  # type: ignore[attr-defined]

    step.calls = 0  # type: ignore[attr-defined]
    return step


def in_an_iterator() -> Callable[..., torch.Tensor]:
    count = itertools.count(1)
    return lambda x: branch(x, next(count) <= 6)


def in_the_random_module() -> Callable[..., torch.Tensor]:
    random.seed(5)
    return lambda x: branch(x, random.random() < 0.8)


def in_a_random_object() -> Callable[..., torch.Tensor]:
    own = random.Random(5)
    return lambda x: branch(x, own.random() < 0.8)


def in_numpys_random_state() -> Callable[..., torch.Tensor]:
    np.random.seed(3)
    return lambda x: branch(x, np.random.rand() < 0.8)


def in_a_numpy_generator() -> Callable[..., torch.Tensor]:
    own = np.random.default_rng(3)
    return lambda x: branch(x, own.random() < 0.8)


@pytest.mark.parametrize(
    "make",
    [
        in_a_helpers_global,
        in_a_method_global,
        in_a_class_attribute,
        in_a_default_argument,
        in_a_function_attribute,
        in_an_iterator,
        in_the_random_module,
        in_a_random_object,
        in_numpys_random_state,
        in_a_numpy_generator,
    ],
)
def test_a_python_value_that_steers_a_branch_is_never_frozen(make: Callable[[], Any]) -> None:
    parity(make, CALLS)


def with_batch_norm() -> nn.Module:
    return nn.BatchNorm1d(3)


def with_a_replaced_storage() -> nn.Module:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = torch.zeros(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.h.data = self.h * 0.5 + x.sum(0)
            return self.h * 1

    return Step()


def with_a_set_storage() -> nn.Module:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = torch.zeros(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.h.set_(self.h * 0.5 + x.sum(0))
            return self.h * 1

    return Step()


def with_a_generator() -> nn.Module:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3, generator=self.generator)

    return Step()


@pytest.mark.parametrize("verify", ["capture", "off"])
@pytest.mark.parametrize("make", [with_batch_norm, with_a_replaced_storage, with_a_set_storage, with_a_generator])
def test_hidden_state_advances_once_per_call(make: Callable[[], nn.Module], verify: str) -> None:
    parity(make, batches(*[(5, 3)] * 4), verify=verify)


def test_batch_norm_in_training_keeps_its_statistics_with_buckets() -> None:
    parity(with_batch_norm, batches((5, 3), (6, 3), (5, 3)), buckets=[8], batch_dims={"input": 0})


def test_state_written_only_by_a_padded_batch_is_untouched() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("large_batches", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 3:
                self.large_batches.add_(1)
            return x * 2

    parity(Step, batches(*[(3, 2)] * 3), buckets=[4], batch_dims={"x": 0})


def put_result(x: torch.Tensor, results: dict[str, torch.Tensor]) -> torch.Tensor:
    results["y"] = x * 2
    return x + 1


def put_first(x: torch.Tensor, results: list[torch.Tensor]) -> torch.Tensor:
    results[0] = x * 2
    return x + 1


def append(x: torch.Tensor, results: list[torch.Tensor]) -> torch.Tensor:
    results.append(x * 2)
    return x + 1


def count(x: torch.Tensor, results: dict[str, int]) -> torch.Tensor:
    results["n"] += 1
    return x * 2


@pytest.mark.parametrize(
    ("model", "container"), [(put_result, {"y": torch.zeros(3)}), (put_first, [torch.zeros(3)]), (append, []), (count, {"n": 0})]
)
def test_a_container_that_the_step_fills_is_filled_once_per_call(model: Callable[..., Any], container: Any) -> None:
    def once_per_call(step: Callable[..., Any]) -> Iterator[Any]:
        given = container.copy()
        for (x,) in CALLS[:4]:
            step(x, given)
            yield [str(item) for item in (given.values() if isinstance(given, dict) else given)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(once_per_call(graphs.capture(model))) == list(once_per_call(model))


def test_state_made_under_inference_mode_is_written_or_refused() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.inference_mode():
                self.cache = torch.zeros(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache.add_(x)
            return self.cache * 2

    with torch.inference_mode():
        parity(Step, CALLS[:4])


def test_the_first_refused_call_is_as_differentiable_as_eager() -> None:
    linear = nn.Linear(2, 2)
    step = graphs.capture(lambda x: linear(x) * x.sum().item(), passes="off")
    with pytest.warns(UserWarning, match="host-sync"):
        assert step(torch.ones(1, 2)).requires_grad
    assert step(torch.ones(1, 2)).requires_grad
