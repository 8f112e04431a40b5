"""Signatures that differ at every call in one place: found, named, and not recorded any more."""

from __future__ import annotations

import enum
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphs
from graphs.contract.arguments import flatten_call, named_leaves
from graphs.dispatch import key_recorder
from graphs.objects.keys import constant_key

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One for each step that was tried."""
    made: list[Any] = []
    run = key_recorder.record_key

    def counted(step: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(step)
        return run(step, *args, **kwargs)

    monkeypatch.setattr(key_recorder, "record_key", counted)
    return made


class Settings:
    def __init__(self, factor: float) -> None:
        self.factor = factor


CHANGING: dict[str, tuple[Callable[..., Tensor], Callable[[int], tuple[Any, ...]]]] = {
    "float": (lambda x, t: x * t, lambda i: (0.5 + i,)),
    "int": (lambda x, n: x + n, lambda i: (i,)),
    "numpy number": (lambda x, n: x + float(n), lambda i: (np.float32(i),)),
    "text": (lambda x, name: x + len(name), lambda i: (f"request {i}",)),
    "lambda": (lambda x, f: f(x), lambda i: (lambda x: x * i,)),
    "object": (lambda x, s: x * s.factor, lambda i: (Settings(i),)),
    "in a dict": (lambda x, d: x * d["t"][0], lambda i: ({"t": [i + 0.5]},)),
    "beside others": (lambda x, a, t, b: x * t + a + b, lambda i: (1, i + 0.5, 2.0)),
}
NAMES = {"float": "t", "int": "n", "numpy number": "n", "text": "name", "lambda": "f", "object": "s"} | {
    "in a dict": "d.t.0",
    "beside others": "t",
}


@pytest.mark.parametrize("keep", [False, True], ids=["freed", "kept"])
@pytest.mark.parametrize("kind", CHANGING)
def test_what_changes_at_each_call_is_named_after_a_few(kind: str, keep: bool, trials: list[Any]) -> None:
    model, arguments = CHANGING[kind]
    step, kept = graphs.capture(model), list[Any]()
    with torch.no_grad():
        for call in range(40):
            x, given = torch.randn(4), arguments(call)
            torch.testing.assert_close(step(x, *given), model(x, *given))
            if keep:
                kept.append(given)
    report = step.report()
    assert len(trials) == 4, "and none after those"
    assert (report.recordings, report.replays, report.eager_calls) == (0, 4, 36)
    named = [refusal for refusal in report.refusals if refusal.reason == "changing-value"]
    assert [(refusal.operator, refusal.count) for refusal in named] == [(NAMES[kind], 36)]
    assert ("pass a tensor" in named[0].remedy) == (kind not in ("lambda", "object"))


def test_the_argument_is_raised_by_name_in_strict_mode() -> None:
    step = graphs.capture(lambda x, t: x * t, strict=True)
    with torch.no_grad():
        for call in range(4):
            step(torch.ones(4), call + 0.5)
        with pytest.raises(graphs.Refusal, match=r"changing-value \[t\].*4 recordings"):
            step(torch.ones(4), 4.5)


def test_recordings_that_are_used_go_on_being_replayed(trials: list[Any]) -> None:
    step = graphs.capture(lambda x, t: x * t)
    with torch.no_grad():
        for _ in range(3):
            step(torch.ones(4), 1.0)
        for call in range(2, 20):
            assert torch.equal(step(torch.ones(4), float(call)), torch.full((4,), float(call)))
            assert torch.equal(step(torch.ones(4), 1.0), torch.ones(4))
    assert len(trials) == 5 and step.report().recordings == 1 and step.report().replays == 3 + 18 + 4


def test_a_loop_over_layers_is_replayed_from_the_third_round_on(trials: list[Any]) -> None:
    step, weights = graphs.capture(lambda x, w, index: x * w[index]), torch.randn(20, 4)
    with torch.no_grad():
        for _ in range(6):
            for index in range(20):
                assert torch.equal(step(torch.ones(4), weights, index), weights[index])
    assert len(trials) == 4 + 20 and step.report().recordings == 20 and step.report().replays == 4 + 5 * 20


def test_a_second_appearance_is_not_enough_for_good(trials: list[Any]) -> None:
    step = graphs.capture(lambda x, t: x * t, max_recordings=8)
    with torch.no_grad():
        for value in [*range(20), *range(10, 26), *range(40, 56), *range(40, 56)]:
            assert torch.equal(step(torch.ones(4), float(value)), torch.full((4,), float(value)))
    assert len(trials) == 4 + 8, "what came up twice was of no use either"
    assert step.report().recordings == 0
    assert {(refusal.reason, refusal.operator) for refusal in step.report().refusals} == {("changing-value", "t")}


def test_another_place_is_another_matter(trials: list[Any]) -> None:
    step = graphs.capture(lambda x, t, mode: x * t if mode == "times" else x + t)
    with torch.no_grad():
        for call in range(8):
            step(torch.ones(4), float(call), "times")
        tried = len(trials)
        for _ in range(3):
            assert torch.equal(step(torch.ones(4), 1.0, "plus"), torch.full((4,), 2.0))
    assert tried == 4 and len(trials) == 5 and step.report().recordings == 1


def test_what_cannot_be_recorded_anyway_keeps_its_reason(trials: list[Any]) -> None:
    step = graphs.capture(lambda x, t: torch.from_numpy(x.numpy() * t))
    with torch.no_grad():
        for call in range(10):
            assert torch.equal(step(torch.ones(4), float(call)), torch.full((4,), float(call)))
    assert len(trials) == 4
    assert "changing-value" not in {refusal.reason for refusal in step.report().refusals}


def test_a_cache_per_sequence_is_served_by_one_recording(trials: list[Any]) -> None:
    class Cache:
        def __init__(self) -> None:
            self.rows = torch.zeros(4)

    step = graphs.capture(lambda x, cache: cache.rows.add_(x).clone())
    with torch.no_grad():
        for sequence in range(8):
            cache, expected = Cache(), torch.zeros(4)
            for _ in range(5):
                assert torch.equal(step(torch.ones(4), cache), expected.add_(1))
            del cache
            gc.collect()
            assert len(trials) == 1 and step.report().moved == sequence
    assert step.report().replays == 40


ENDLESS: dict[str, tuple[Callable[[int], tuple[Any, ...]], int, str, str]] = {
    "a length": (lambda i: (torch.ones(1, i + 1),), 16, "changing-value", "x"),
    "two lengths": (lambda i: (torch.ones(1, i + 1), torch.ones(i + 1)), 16, "changing-value", "x, y"),
    "two numbers": (lambda i: (torch.ones(2), i, -i), 24, "too-many-keys", "key"),
    "a length and a number": (lambda i: (torch.ones(i + 1), i), 24, "too-many-keys", "key"),
    "a number": (lambda i: (torch.ones(2), i), 4, "changing-value", "y"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_two_hundred_calls_that_never_repeat_are_first_calls_a_few_times(kind: str, trials: list[Any]) -> None:
    arguments, most, reason, operator = ENDLESS[kind]
    step = graphs.capture(lambda x, y=1, z=1: x * y + z, max_recordings=24)
    with torch.no_grad():
        for call in range(200):
            given = arguments(call)
            assert torch.equal(step(*given), given[0] * given[1] + (given[2:] or (1,))[0] if given[1:] else given[0] + 1)
    report = step.report()
    assert len(trials) == most and (report.replays, report.eager_calls, report.evictions) == (most, 200 - most, 0)
    assert [(found.reason, found.operator, found.count) for found in report.refusals] == [(reason, operator, 200 - most)]


def test_a_size_that_comes_again_is_recorded(trials: list[Any]) -> None:
    step = graphs.capture(lambda x: x * 2)
    for size in [*range(1, 31), *range(1, 31), *range(1, 31)]:
        assert torch.equal(step(torch.ones(size)), torch.full((size,), 2.0))
    assert len(trials) == 30 and step.report().recordings == 30 and step.report().eager_calls == 14


def test_more_sizes_in_turn_than_may_be_kept_are_not_recorded_for_ever(trials: list[Any]) -> None:
    step, rounds = graphs.capture(lambda x: x * 2, max_recordings=8), list[int]()
    for _ in range(25):
        before = len(trials)
        for size in range(1, 13):
            assert torch.equal(step(torch.ones(size)), torch.full((size,), 2.0))
        rounds.append(len(trials) - before)
    assert sum(rounds) <= 80 and sum(rounds[-8:]) <= 16, f"first calls in each round: {rounds}"


def test_invalidate_forgets_habits(trials: list[Any]) -> None:
    step = graphs.capture(lambda x, t: x * t)
    with torch.no_grad():
        for call in range(6):
            step(torch.ones(4), float(call))
        step.invalidate()
        step(torch.ones(4), 6.0)
    assert len(trials) == 5


class Pair(NamedTuple):
    first: Any
    second: Any


class Colour(enum.Enum):
    RED = 1


def leaves() -> st.SearchStrategy[Any]:
    tensors = st.builds(torch.ones, st.integers(0, 3))
    numbers = st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.binary(max_size=3)
    rest = st.sampled_from([None, True, torch.float16, Colour.RED, range(3), slice(1, 2), np.int8(3), Settings(1.0)])
    return tensors | numbers | rest


VALUES = st.recursive(
    leaves(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(VALUES, max_size=3), st.dictionaries(st.sampled_from("abc"), VALUES, max_size=2), st.booleans())
def test_each_place_is_where_the_signature_holds_its_value(args: list[Any], kwargs: dict[str, Any], twice: bool) -> None:
    if twice:
        args = [*args, *[torch.ones(2)] * 2]
    call = flatten_call(tuple(args), kwargs, ("a", "prefix"))
    leaves = named_leaves(call, [])
    found = leaves.changeable
    assert (len(leaves.tensors), len(leaves.opaques)) == (len(call.tensors), len(call.opaques))
    for argument in found:
        key = call.signature[argument.place]
        plain = type(argument.value) in (int, str, bytes)
        expected = id(argument.value) if argument.is_object else argument.value if plain else constant_key(argument.value)
        assert key == expected and type(key) is type(expected)
    assert len({argument.place for argument in found}) == len(found) == sum(map(is_changeable, flat([*args, *kwargs.values()])))


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)) or type(value) is dict:
        for item in value.values() if type(value) is dict else value:
            yield from flat(item)
    else:
        yield value


def is_changeable(value: Any) -> bool:
    return not isinstance(value, Tensor) and value is not None and value is not True and value is not torch.float16


def test_a_habit_of_changing_is_looked_at_anew_when_it_may_be_over() -> None:
    model = nn.Linear(2, 2)
    model.scale = 1.0
    step = graphs.capture(lambda x: model(x) * model.scale)
    x = torch.ones(1, 2)
    with torch.no_grad():
        for call in range(3):
            model.scale = float(call)
            step(x)
        assert step.report().recordings == 0
        for _ in range(40):
            assert torch.equal(step(x), model(x) * model.scale)
    report = step.report()
    assert report.recordings == 1 and report.replays > 6
    assert [refusal.reason for refusal in report.refusals] == ["changing-value"]


def test_a_habit_that_is_not_over_is_looked_at_more_and_more_seldom(trials: list[Any]) -> None:
    model = nn.Linear(2, 2)
    step = graphs.capture(lambda x: model(x) * model.scale)
    with torch.no_grad():
        for call in range(600):
            model.scale = float(call)
            step(torch.ones(1, 2))
    assert len(trials) <= 8, "32, 64, 128, 256 eager calls between two attempts"


def test_buffers_that_are_made_once_for_each_size_are_recorded_once_they_are_there() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            object.__setattr__(self, "buffers_of", {})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            buffer = self.buffers_of.get(len(x))
            if buffer is None:
                buffer = self.buffers_of[len(x)] = torch.zeros(len(x), 4)
            return buffer.add_(x) * 2

    model, twin = Buffered(), Buffered()
    step = graphs.capture(model)
    with torch.no_grad():
        for call in range(200):
            x = torch.full((call % 4 + 1, 4), float(call))
            assert torch.equal(step(x), twin(x))
    assert step.report().recordings == 4


def test_setting_an_attribute_through_the_step_drops_nothing_that_still_holds(trials: list[Any]) -> None:
    model = nn.Linear(2, 2)
    step: Any = graphs.capture(model)
    with torch.no_grad():
        for call in range(5):
            step.request = call
            step(torch.ones(1, 2))
        assert len(trials) == 1 and model.request == 4
        step.weight = nn.Parameter(torch.zeros(2, 2))
        assert torch.equal(step(torch.ones(1, 2)), model(torch.ones(1, 2)))
