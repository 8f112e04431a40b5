"""Outputs: the same structure and types as eager gives, the caller's own unless borrowed."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch.utils import _pytree

import graphs
from graphs.errors import ConfigError
from tests.parity import assert_same

Tensor = torch.Tensor
Pair = namedtuple("Pair", "left right")


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def context(request: pytest.FixtureRequest) -> Any:
    """A mode that a step is called in."""
    return request.param


@dataclass
class Node:
    value: Any
    label: str


_pytree.register_dataclass(Node, serialized_type_name="output_tests.Node")


def replayed(model: Callable[..., Any], calls: int = 3) -> list[tuple[Any, Any]]:
    """What eager and replay give for each call."""
    step = graphs.capture(model)
    pairs = []
    for seed in range(calls):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        pairs.append((model(x), step(x)))
    assert step.report().replays == calls, str(step.report())
    return pairs


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x * 2,
    "tuple": lambda x: (x * 2, x + 1),
    "tuple of one": lambda x: (x * 2,),
    "list": lambda x: [x * 2, [x + 1]],
    "dict": lambda x: {"b": x * 2, "a": {"c": x + 1}},
    "keys of any type": lambda x: {3: x * 2, ("a", 1): x + 1},
    "ordered dict": lambda x: OrderedDict(b=x * 2, a=x + 1),
    "default dict": lambda x: defaultdict(list, {"a": x * 2}),
    "named tuple": lambda x: Pair(x * 2, [x + 1]),
    "dataclass": lambda x: Node({"x": x * 2}, "label"),
    "constants": lambda x: (x * 2, None, 3, 1.5, "text", True, b"raw", torch.float16, 2j),
    "empty containers": lambda x: (x * 2, [], {}, ()),
    "nothing": lambda x: None,
    "no tensor": lambda x: {"rows": x.shape[0], "dtype": x.dtype},
    "parameter that is read": lambda x: (x * WEIGHT, WEIGHT),
    "result of max": lambda x: torch.max(x, 0),
    "empty tensor": lambda x: x[:0] * 2,
    "scalar tensor": lambda x: x.sum(),
}
WEIGHT = torch.nn.Parameter(torch.ones(3), requires_grad=False)


def types(value: Any) -> Any:
    """The classes in a structure."""
    if isinstance(value, dict):
        return type(value), [(key, types(item)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value), [types(item) for item in value]
    return type(value), types(vars(value)) if isinstance(value, Node) else None


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_and_types_are_those_of_eager(name: str) -> None:
    for expected, actual in replayed(STRUCTURES[name]):
        assert types(actual) == types(expected)
        assert_same(expected, actual, name)


@pytest.mark.parametrize("name", ["list", "dict", "ordered dict", "default dict", "dataclass", "empty containers"])
def test_changing_a_returned_container_changes_no_later_output(name: str) -> None:
    model = STRUCTURES[name]
    step = graphs.capture(model)
    for seed in range(4):
        x = torch.full((2, 3), float(seed))
        output = step(x)
        assert_same(model(x), output, f"call {seed}")
        spoil(output)


def spoil(value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for item in value:
            spoil(item)
    if isinstance(value, list):
        value.append("more")
    elif isinstance(value, dict):
        for item in list(value.values()):
            spoil(item)
        value["more"] = 1
    elif isinstance(value, Node):
        value.label = "changed"
        spoil(value.value)


def test_a_default_dict_that_was_returned_still_makes_defaults() -> None:
    for _, actual in replayed(STRUCTURES["default dict"]):
        assert actual["missing"] == []


def test_strides_are_those_of_eager_where_memory_is_dense() -> None:
    for expected, actual in replayed(lambda x: (x * 2).t()):
        assert actual.stride() == expected.stride() == (1, 3)


def test_arguments_handed_through_are_this_calls_own_objects() -> None:
    note = object()
    step = graphs.capture(lambda x, more, note: {"x": x, "more": more, "note": note, "new": x * 2})
    for _ in range(3):
        x, more = torch.randn(3), torch.randn(2)
        output = step(x, more=more, note=note)
        assert output["x"] is x and output["more"] is more and output["note"] is note


def test_a_returned_buffer_is_the_buffer() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("h", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.h.add_(x)
            return self.h

    model = Step()
    step = graphs.capture(model)
    assert all(step(torch.ones(3)) is model.h for _ in range(3))
    assert model.h.tolist() == [3, 3, 3]


def test_a_returned_tensor_that_nothing_reads_is_the_models_own() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.zeros(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, self.table

    model = Step()
    step = graphs.capture(model)
    for _ in range(6):
        step(torch.ones(3))
    model.table = torch.ones(2)
    assert step(torch.ones(3))[1] is model.table


def test_owned_outputs_outlive_later_calls_and_may_be_written() -> None:
    step = graphs.capture(lambda x: (x * 2, torch.arange(3) * 1.0))
    kept = []
    for value in range(4):
        output = step(torch.full((3,), float(value)))
        kept.append(output)
        for tensor in output:
            tensor.add_(0.5)
    for value, (doubled, counted) in enumerate(kept):
        assert doubled.tolist() == [2 * value + 0.5] * 3
        assert counted.tolist() == [0.5, 1.5, 2.5]
    assert len({tensor.data_ptr() for output in kept for tensor in output}) == 8


def test_owned_outputs_do_not_share_memory_with_the_arguments() -> None:
    step = graphs.capture(lambda x: x + 0)
    for _ in range(3):
        x = torch.ones(3)
        output = step(x)
        x.zero_()
        assert output.tolist() == [1, 1, 1]


def test_borrowed_outputs_are_the_recordings_own_until_the_next_call() -> None:
    step = graphs.capture(lambda x: x * 2, outputs="borrowed")
    first = step(torch.ones(3))
    assert first.tolist() == [2, 2, 2]
    second = step(torch.full((3,), 5.0))
    assert second.data_ptr() == first.data_ptr() and first.tolist() == [10, 10, 10]


def test_borrowed_outputs_of_two_keys_are_apart() -> None:
    step = graphs.capture(lambda x: x * 2, outputs="borrowed")
    short, long = step(torch.ones(2)), step(torch.ones(3))
    step(torch.full((3,), 5.0))
    assert short.tolist() == [2, 2] and long.tolist() == [10, 10, 10]


def test_borrowed_outputs_of_a_bucket_are_cut() -> None:
    step = graphs.capture(lambda x: x * 2, buckets=[4], batch_dims={"x": 0}, outputs="borrowed")
    for rows in (3, 1, 4):
        x = torch.randn(rows, 2)
        assert torch.equal(step(x), x * 2)
    assert step.report().replays == 3


def test_writing_a_borrowed_output_does_not_reach_the_next_call() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("h", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            self.h.add_(y)
            return y

    model = Step()
    step = graphs.capture(model, outputs="borrowed")
    for count in range(1, 5):
        step(torch.ones(3)).fill_(100)
        assert model.h.tolist() == [2.0 * count] * 3


def test_an_illegal_choice_of_outputs_is_named() -> None:
    with pytest.raises(ConfigError, match="'owned', 'borrowed'"):
        graphs.capture(lambda x: x, outputs="shared")


def test_outputs_that_are_one_tensor_stay_one() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y

    for (a, b), (c, d) in replayed(model):
        assert (a is b) == (c is d)


EMPTY = torch.empty(0)
PARAMETERS: dict[str, Callable[[Tensor], Any]] = {
    "made": lambda x: torch.nn.Parameter(x * 2),
    "made, without a gradient": lambda x: torch.nn.Parameter(x * 2, requires_grad=False),
    "of an argument": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "of a part": lambda x: (x * 2, torch.nn.Parameter(x[1:], requires_grad=False)),
    "beside its tensor": lambda x: [(y := x * 2), torch.nn.Parameter(y, requires_grad=False)],
    "twice": lambda x: [y := torch.nn.Parameter(x * 2), y],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_returned_parameter_is_one(name: str, context: Any) -> None:
    model = PARAMETERS[name]
    step = graphs.capture(model)
    with context():
        for _ in range(3):
            x = torch.ones(3)
            found, expected = step(x), model(x)
            pairs = zip(found, expected, strict=True) if isinstance(expected, (list, tuple)) else [(found, expected)]
            for a, b in pairs:
                assert type(a) is type(b) and a.requires_grad == b.requires_grad and a.is_leaf == b.is_leaf
                assert torch.equal(a, b) and (a.data_ptr() == x.data_ptr()) == (b.data_ptr() == x.data_ptr())
    assert step.report().replays == 3


def test_a_returned_empty_argument_is_the_argument(context: Any) -> None:
    step = graphs.capture(lambda x, y: (y, x * 2, EMPTY))
    with context():
        for _ in range(3):
            y = torch.empty(0, 3)
            found = step(torch.ones(2), y)
            assert found[0] is y and found[1].tolist() == [2, 2] and not found[2].numel()
    assert step.report().replays == 3


NAMED: dict[str, Callable[[Tensor], Any]] = {
    "size": lambda x: x.shape,
    "scalar of numpy": lambda x: numpy.float32(x.shape[0]),
    "flag of numpy": lambda x: numpy.bool_(True),
    "type": lambda x: type(x),
    "builtin function": lambda x: len,
    "function": lambda x: replayed,
    "module": lambda x: torch,
    "layout": lambda x: x.layout,
    "slice": lambda x: slice(0, x.shape[0]),
    "range": lambda x: range(x.shape[0]),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_code_names_may_be_returned(name: str, context: Any) -> None:
    value = NAMED[name]
    step = graphs.capture(lambda x: (x * 2, value(x)))
    with context():
        for length in (2, 2, 3, 2):
            x = torch.ones(length)
            found = step(x)[1]
            assert type(found) is type(value(x)) and found == value(x)
    assert step.report().replays == 4


@pytest.mark.parametrize("make", [lambda: lambda: 1, lambda: type("Made", (), {})], ids=["function", "type"])
def test_what_each_call_makes_anew_is_not_returned_again(make: Callable[[], Any], context: Any) -> None:
    step = graphs.capture(lambda x: (x * 2, make()))
    with context():
        found = [step(torch.ones(2))[1] for _ in range(3)]
    assert len({*map(id, found)}) == 3 and step.report().replays == 0


def test_zeros_of_either_sign_are_two_constants(context: Any) -> None:
    step = graphs.capture(lambda x, sign: (x * 2, 0.0 * sign))
    with context():
        for sign in (1.0, -1.0, 1.0, -1.0):
            assert math.copysign(1.0, step(torch.ones(2), sign)[1]) == sign
