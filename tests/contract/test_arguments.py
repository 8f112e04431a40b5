"""Arguments: what is part of the key, and arguments that share memory."""

import enum
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree

import graphs
from graphs.contract.arguments import flatten_call, named_leaves
from graphs.dispatch.call_log import NotReplayed
from graphs.objects.keys import constant_key


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        yield


def second(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y


def write_then_read(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return y * 2


def test_one_tensor_given_twice_is_another_call_than_two_tensors() -> None:
    step = graphs.capture(second)
    a, b = torch.zeros(3), torch.ones(3)
    assert step(a, a) is a
    assert step(a, b) is b
    assert step(b, a) is a


def test_a_written_argument_given_twice_is_read_after_the_write() -> None:
    step = graphs.capture(write_then_read)
    x, y = torch.zeros(3), torch.zeros(3)
    step(x, y)
    step(x, y)
    assert step(x, x).tolist() == [6, 6, 6]


def test_an_argument_that_is_a_view_of_a_written_one_is_read_after_the_write() -> None:
    step = graphs.capture(write_then_read)
    x = torch.zeros(2, 3)
    step(x[0], torch.zeros(3))
    assert step(x[0], x.view(-1)[:3]).tolist() == [4, 4, 4]


def test_an_argument_that_is_the_steps_own_state_is_read_after_the_write() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("h", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.h.add_(1)
            return x * 2

    model = Step()
    step = graphs.capture(model)
    step(torch.zeros(3))
    step(torch.zeros(3))
    assert step(model.h).tolist() == [6, 6, 6]


def test_a_step_that_reads_its_argument_by_strides_sees_the_callers_layout() -> None:
    def diagonal_like(x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(x, (3,), (2,)) * 1

    step = graphs.capture(diagonal_like)
    for _ in range(3):
        x = torch.randn(3, 3).t()
        assert torch.equal(step(x), diagonal_like(x))


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def mkldnn() -> torch.Tensor:
    return torch.ones(2, 2).to_mkldnn()


@pytest.mark.parametrize("make", [nested, mkldnn, lambda: torch.eye(2).to_sparse(), lambda: torch.ones(2, device="meta")])
def test_an_unusual_tensor_runs_eagerly_with_a_reason(make: Callable[[], torch.Tensor]) -> None:
    step = graphs.capture(lambda x: x)
    tensor = make()
    assert step(tensor) is tensor
    assert [refusal.reason for refusal in step.report().refusals] == ["unsupported-argument"]


def test_a_meta_tensor_does_not_take_the_recording_of_a_cpu_tensor() -> None:
    step = graphs.capture(lambda x: x * 2)
    step(torch.ones(3))
    assert step(torch.ones(3, device="meta")).is_meta


@pytest.mark.parametrize("constant", [lambda: slice(0, 2), lambda: torch.Size([2]), lambda: range(2)])
def test_equal_constants_share_a_recording(constant: Callable[[], Any]) -> None:
    step = graphs.capture(lambda x, c: x * 2)
    made = [constant() for _ in range(4)]
    for value in made:
        step(torch.ones(3), value)
    assert step.report().recordings == 1


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in a list"])
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_subclass_is_asked_nothing_but_what_the_step_asks(wrapped: bool) -> None:
    asked: list[str] = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    step = graphs.capture(lambda x: (x[0] if wrapped else x) * 2)
    x = torch.ones(3).as_subclass(Logged)
    with torch.no_grad():
        for _ in range(3):
            step([x] if wrapped else x)
    assert asked == ["mul"] * 3
    assert [refusal.reason for refusal in step.report().refusals] == ["unsupported-argument"]


class Level(enum.Enum):
    LOW = 1


class Opaque:
    pass


class Held:
    """A container that has an object for its context, and for an attribute too."""

    def __init__(self, child: Any) -> None:
        self.child, self.note = child, lambda: None


@pytest.fixture
def _held_is_a_container() -> Any:
    _pytree.register_pytree_node(Held, lambda held: ([held.child], held.note), lambda children, _: Held(*children))
    yield
    _pytree._deregister_pytree_node(Held)


Pair = namedtuple("Pair", "left right")


@pytest.mark.usefixtures("_held_is_a_container")
def test_leaves_are_named_beside_what_the_call_holds() -> None:
    x, opaque, number = torch.ones(2), Opaque(), 2.5
    held = Held(x)
    call = flatten_call((x, [3, Level.LOW, opaque]), {"pair": Pair(held, {"a": x, 1: number}), "flag": True})
    leaves = named_leaves(call, ["first"])
    assert leaves.tensors == ["first", "pair.0.0", "pair.1.a"]
    assert leaves.opaques == ["arg1.2", "pair.0's context", "pair.0's attributes"]
    assert [value is expected for value, expected in zip(call.opaques, (opaque, held.note, held.note), strict=True)] == [True] * 3
    named = {argument.name: (argument.value, argument.is_object) for argument in leaves.changeable}
    assert named == {
        "arg1.0": (3, False),
        "arg1.1": (Level.LOW, False),
        "arg1.2": (opaque, True),
        "pair.0's context": (held.note, True),
        "pair.0's attributes": (held.note, True),
        "pair.1.1": (number, False),
    }
    places = {argument.name: argument.place for argument in leaves.changeable}
    assert call.signature[places["arg1.2"]] == id(opaque)
    assert call.signature[places["pair.1.1"]] == constant_key(number)  # behind the container
