"""`graphs.state.counters`: numbers of Python that a step advances are found, and kept in step with the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphs.state.counters import Counter, Counters, find_counters
from graphs.state.python_state import PythonState

CPU = torch.device("cpu")


def owner() -> SimpleNamespace:
    return SimpleNamespace(step=3, lengths=[5, 6], by_name={"a": 1}, scale=0.5, name="x")


def changed(change: Any) -> list[Counter] | None:
    made = owner()
    state = PythonState([("self", made)])
    change(made)
    return find_counters(state)


def test_whole_numbers_are_counters_wherever_they_hang() -> None:
    def change(made: Any) -> None:
        made.step += 1
        made.lengths[1] += 4
        made.by_name["a"] = 9

    found = changed(change)
    assert found is not None
    assert {counter.path: counter.value for counter in found} == {"self.step": 4, "self.lengths[1]": 10, "self.by_name['a']": 9}


def test_nothing_changed_is_no_counter() -> None:
    assert changed(lambda made: None) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda made: setattr(made, "scale", 0.25),
        lambda made: setattr(made, "name", "y"),
        lambda made: setattr(made, "step", True),
        lambda made: setattr(made, "step", 4.0),
        lambda made: made.lengths.append(7),
        lambda made: made.by_name.update(b=2),
        lambda made: (setattr(made, "step", 4), setattr(made, "scale", 1.0)),
    ],
)
def test_a_change_of_anything_else_leaves_no_counters(change: Any) -> None:
    assert changed(change) is None


def counters(made: SimpleNamespace) -> Counters:
    created = Counters([Counter("self.step", vars(made), "step"), Counter("self.lengths[0]", made.lengths, 0)], CPU)
    created.advance = lambda step, length: (step + 1, length + step)
    return created


def on_device(created: Counters) -> list[int]:
    return [int(tensor) for tensor in created.tensors]


def test_python_gets_what_the_device_advanced() -> None:
    made = owner()
    created = counters(made)
    assert on_device(created) == [3, 5]
    created.load()
    created.ran()
    created.store()
    assert (made.step, made.lengths[0]) == (4, 8) and type(made.step) is int
    created.ran()
    created.store()
    assert (made.step, made.lengths[0]) == (5, 12)


def test_the_device_gets_what_somebody_else_wrote() -> None:
    made = owner()
    created = counters(made)
    created.ran()  # the device has advanced its copies itself
    created.store()
    created.load()
    assert on_device(created) == [3, 5]  # nothing to bring: what ran would have
    made.lengths[0] = 40
    created.load()
    assert on_device(created) == [3, 40]
    created.ran()
    created.store()
    assert (made.step, made.lengths[0]) == (5, 44)


def test_after_a_warm_up_everything_is_brought() -> None:
    made = owner()
    created = counters(made)
    for tensor in created.tensors:
        tensor.fill_(-1)
    created.load()
    assert on_device(created) == [-1, -1]
    created.unknown()
    created.load()
    assert on_device(created) == [3, 5]


def test_an_undone_run_leaves_python_as_it_is() -> None:
    made = owner()
    created = counters(made)
    created.ran()
    created.undone()
    created.store()
    assert (made.step, made.lengths[0]) == (3, 5)
