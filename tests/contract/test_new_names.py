"""Attributes that appear between calls while others go away, so that as many are there as before; keys that have no order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from graphs.guards import container_guards
from graphs.guards.container_guards import MappingGuard
from graphs.guards.python_guards import Guards
from graphs.objects.dict_watch import numbered_versions

pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
Tensor = torch.Tensor
Case = tuple[Callable[[Tensor], Tensor], Callable[[], object]]


def fresh() -> Any:
    class Settings:
        scale = 1.0

        def bias(self) -> float:
            return 2.0

    made = Settings()
    made.unread, made.last = 1, 2  # type: ignore[attr-defined]
    return made


def attribute() -> Case:
    one = fresh()
    return lambda x: x * one.scale, lambda: (delattr(one, "unread"), setattr(one, "scale", 5.0))


def attribute_before_others() -> Case:
    one = fresh()

    def change() -> None:
        del one.unread
        one.scale = 5.0
        del one.last
        one.last = 2

    return lambda x: x * one.scale, change


def attribute_asked_for() -> Case:
    one = fresh()

    def step(x: Tensor) -> Tensor:
        try:
            return x * one.factor
        except AttributeError:
            return x

    return step, lambda: (delattr(one, "unread"), setattr(one, "factor", 5.0))


def method() -> Case:
    one = fresh()
    return lambda x: x * one.bias(), lambda: (delattr(one, "unread"), setattr(one, "bias", lambda: 7.0))


def class_attribute() -> Case:
    class Derived(type(fresh())):  # type: ignore[misc]
        unread = 1

    one = Derived()
    return lambda x: x * one.scale, lambda: (delattr(Derived, "unread"), setattr(Derived, "scale", 5.0))


def attribute_of_a_function() -> Case:
    def step(x: Tensor) -> Tensor:
        return x * getattr(step, "scale", 2.0)

    step.unread = 1  # type: ignore[attr-defined]
    return step, lambda: (delattr(step, "unread"), setattr(step, "scale", 5.0))


def attribute_of_a_tensor() -> Case:
    one: Any = torch.ones(2)
    one.unread = 1
    return lambda x: x * one * getattr(one, "scale", 2.0), lambda: (delattr(one, "unread"), setattr(one, "scale", 5.0))


CASES = [
    attribute,
    attribute_before_others,
    attribute_asked_for,
    method,
    class_attribute,
    attribute_of_a_function,
    attribute_of_a_tensor,
]


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("make", CASES)
def test_a_name_in_the_place_of_another_is_seen(
    make: Callable[[], Case], numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not numbered:
        monkeypatch.setattr(container_guards, "version_in", lambda mapping: None)
    step, change = make()
    captured, x = graphs.capture(step), torch.ones(2)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(captured(x), step(x)) and torch.equal(captured(x), step(x))
    change()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(captured(x), step(x))
    assert {refusal.reason for refusal in captured.report().refusals} == {"changing-value"}


def test_writes_of_the_same_values_are_no_change() -> None:
    mapping = {"a": 1, "b": 2, "unread": 3}
    guards = Guards([], [MappingGuard("{}", mapping, frozenset("ab").__contains__)])
    for _ in range(20):
        mapping["a"] = 7
        mapping["a"] = 1
        del mapping["unread"]
        mapping["unread"] = 4
        assert guards.changed() is None
    mapping["b"] = 3
    assert guards.changed() is not None


@pytest.mark.skipif(numbered_versions() is None, reason="this Python keeps no versions of dictionaries")
def test_what_was_not_written_is_not_looked_at() -> None:
    class Never(dict[str, int]):
        def keys(self) -> Any:
            raise AssertionError

    conditions = list(MappingGuard("{}", {"a": 1}, frozenset("a").__contains__).conditions(lambda value: "bound"))
    assert len(conditions) == 1 and " or " in conditions[0]
    assert " or " not in next(iter(MappingGuard("{}", Never(a=1)).conditions(lambda value: "bound")))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_dictionary_with_tensors_as_keys_is_guarded(context: Any) -> None:
    def make() -> tuple[Callable[[Tensor], Tensor], torch.optim.SGD, list[Tensor]]:
        weights = [torch.zeros(2), torch.zeros(4)]
        optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)

        def step(x: Tensor) -> Tensor:
            for weight in weights:
                weight.grad.copy_(x.expand_as(weight))  # type: ignore[union-attr]
            optimizer.step()
            return weights[0] * 1

        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        return step, optimizer, weights

    (step, optimizer, weights), (expected, other, others) = make(), make()
    captured = graphs.capture(step)
    with context():
        for call in range(8):
            if call == 5:
                optimizer.state[weights[0]]["momentum_buffer"] = torch.full((2,), 3.0)
                other.state[others[0]]["momentum_buffer"] = torch.full((2,), 3.0)
            x = torch.tensor([float(call)])
            assert torch.equal(captured(x), expected(x)), call
    report = captured.report()
    assert report.replays >= 4 and "internal-error" not in {refusal.reason for refusal in report.refusals}, report


def test_keys_that_have_no_order_are_compared_by_identity() -> None:
    first, second = torch.zeros(2), torch.zeros(4)
    mapping: dict[Any, Any] = {first: 1, second: 2, "a": 3, 5: 4, None: 5}
    guards = Guards([], [MappingGuard("{}", mapping, lambda key: True)])
    for _ in range(8):
        mapping[second] = 7
        mapping[second] = 2
        assert guards.changed() is None
    mapping[second] = 3
    assert guards.changed() is not None
