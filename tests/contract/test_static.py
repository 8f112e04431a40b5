"""Tensors read in place: whoever replaces one, at whatever level, is noticed by the next call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from tests.parity import batches, parity


class Cache:
    def __init__(self, value: float = 0.0) -> None:
        self.k = torch.full((3,), value)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.layers = [Cache(1.0)]
        self.by_name = {"a": Cache(2.0)}
        self.pair = (torch.ones(3), torch.zeros(3))
        self.block = nn.Sequential(nn.Linear(3, 3))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.k.add_(x)
        return self.block(self.cache.k) * self.scale + self.pair[0] + self.layers[0].k + self.by_name["a"].k


def replace_object(model: Step) -> None:
    model.cache = Cache(5.0)


def replace_list_item(model: Step) -> None:
    model.layers[0] = Cache(5.0)


def replace_list(model: Step) -> None:
    model.layers = [Cache(5.0)]


def replace_dict_item(model: Step) -> None:
    model.by_name["a"] = Cache(5.0)


def replace_tuple(model: Step) -> None:
    model.pair = (torch.full((3,), 5.0), model.pair[1])


def replace_submodule(model: Step) -> None:
    model.block = nn.Sequential(nn.Linear(3, 3))
    nn.init.ones_(model.block[0].weight)
    nn.init.ones_(model.block[0].bias)


def replace_item_of_a_container_module(model: Step) -> None:
    model.block[0] = nn.Linear(3, 3)
    nn.init.ones_(model.block[0].weight)
    nn.init.ones_(model.block[0].bias)


def replace_attribute(model: Step) -> None:
    model.cache.k = torch.full((3,), 5.0)


def replace_parameter(model: Step) -> None:
    model.block[0].weight = nn.Parameter(torch.ones(3, 3))


def replace_parameter_data(model: Step) -> None:
    model.block[0].weight.data = torch.ones(3, 3)


def replace_buffer(model: Step) -> None:
    model.scale = torch.full((3,), 5.0)


def replace_buffer_in_the_registry(model: Step) -> None:
    model._buffers["scale"] = torch.full((3,), 5.0)


def load_assigned(model: Step) -> None:
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "replace",
    [
        replace_object,
        replace_list_item,
        replace_list,
        replace_dict_item,
        replace_tuple,
        replace_submodule,
        replace_item_of_a_container_module,
        replace_attribute,
        replace_parameter,
        replace_parameter_data,
        replace_buffer,
        replace_buffer_in_the_registry,
        load_assigned,
    ],
)
def test_what_replaced_a_tensor_is_used_by_the_next_call(replace: Callable[[Step], None]) -> None:
    def between(index: int, model: Any) -> None:
        if index == 5:  # not at a power of two, where the whole Python state is compared anyway
            replace(model)

    with torch.no_grad():
        step = parity(Step, batches(*[(3,)] * 7), between=between)
    report = step.report()
    assert report.replays >= 5
    assert report.replays == 7 or report.refusals[0].reason == "moved-static-tensor"


def test_a_module_of_buffers_converted_to_another_dtype_is_noticed() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    parity(Scale, batches(*[(3,)] * 7), between=lambda index, model: model.double() if index == 5 else None)


def test_a_weight_that_was_also_an_argument_is_still_checked() -> None:
    linear = nn.Linear(3, 3, bias=False)
    step = graphs.capture(lambda x: x @ linear.weight)
    with torch.no_grad():
        step(linear.weight.data)
        linear.weight.data = torch.full((3, 3), 5.0)
        x = torch.ones(3, 3)
        assert torch.equal(step(x), x @ linear.weight)
    assert step.report().moved == 1
