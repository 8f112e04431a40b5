"""The captured module: what it shares with the model, and what a change from outside does to its recordings."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from tests.parity import batches, parity


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        yield


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = graphs.capture(Doubled())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


def test_a_captured_module_inside_another_is_recorded_as_a_part_of_it() -> None:
    step = parity(Outer, batches(*[(3,)] * 4))
    assert step.report().replays == 4
    assert step.inner.report().replays == 0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) * self.scale


def set_number(model: Any) -> None:
    model.scale = 3.0


def switch_dropout_off(model: Any) -> None:
    model.drop.eval()


def add_a_hook(model: Any) -> None:
    model.register_forward_hook(lambda module, args, output: output * 0)


@pytest.mark.parametrize("change", [set_number, switch_dropout_off, add_a_hook])
def test_a_python_value_changed_from_outside_is_used_by_the_next_call(change: Callable[[Any], None]) -> None:
    parity(Scaled, batches(*[(3,)] * 7), between=lambda index, model: change(model) if index == 5 else None)


def test_a_python_value_set_through_the_step_is_used_by_the_next_call() -> None:
    step = graphs.capture(Scaled().eval())
    for _ in range(6):
        step(torch.ones(3))
    step.scale = 3.0
    assert step(torch.ones(3)).tolist() == [3, 3, 3]


@pytest.mark.parametrize("wrap", [lambda m: m.forward, lambda m: lambda x: m(x)], ids=["bound method", "closure"])
def test_training_mode_of_a_module_inside_a_callable_is_part_of_the_key(wrap: Callable[[Any], Any]) -> None:
    model = Scaled()
    step = graphs.capture(wrap(model))
    for _ in range(6):
        step(torch.ones(64))
    model.eval()
    assert step(torch.ones(64)).unique().tolist() == [1]


def test_weights_cast_by_an_autocast_cache_are_not_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    step = graphs.capture(model)
    for index in range(4):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.randn(2, 4)
            expected = model(x)  # fills the cache
            assert torch.equal(step(x), expected), index
        with torch.no_grad():
            model[0].weight.mul_(2)


class Cache:
    def __init__(self) -> None:
        self.k = torch.zeros(3)


def test_recordings_of_caches_that_are_gone_make_room() -> None:
    def model(x: torch.Tensor, cache: Cache) -> torch.Tensor:
        cache.k.add_(x)
        return cache.k * 2

    step = graphs.capture(model, max_recordings=2)
    for _ in range(5):
        cache = Cache()
        for _ in range(3):
            output = step(torch.ones(3), cache)
        assert output.tolist() == [6, 6, 6]
        del cache
        gc.collect()
    assert step.report().replays == 15 and step.report().eager_calls == 0
