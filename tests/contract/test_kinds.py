"""One table says what kind of thing an object is, for the snapshot of a step's state and for the guards of its recording."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import enum
import functools
import io
import logging
import operator
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from graphs.guards.guard_walk import GuardWalk
from graphs.objects.kinds import Kind, kind_of
from graphs.python_reads.code_reads import CodeReads
from graphs.state.python_state import PythonState


class Asked(type):
    """A metaclass whose classes say that they are anything, and have no hash."""

    def __eq__(cls, other: object) -> bool:
        raise AssertionError("a class was compared")

    def __hash__(cls) -> int:
        raise AssertionError("a class was hashed")

    def __instancecheck__(cls, instance: object) -> bool:
        raise AssertionError("a class was asked for its instances")


class Watchful(metaclass=Asked):
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise AssertionError("an object was asked for its class")


class Text(str):
    unit: str


class Mode(enum.Enum):
    LOW = 1


class Walked:
    def __graphs_walk__(self) -> Any:
        return 1


def generator() -> Any:
    yield 1


async def coroutine() -> None:
    pass


def closing(value: Any) -> Any:
    """A coroutine that nobody is warned about."""
    value.close()
    return value


class Kept:
    pass


held, kept = {"scale": 1.0}, Kept()
KINDS: list[tuple[Callable[[], Any], Kind]] = [
    (Walked, Kind.STAND_IN),
    (lambda: torch.nn.Parameter(torch.ones(1)), Kind.TENSOR),
    (lambda: generator, Kind.FUNCTION),
    (lambda: functools.partial(print), Kind.PARTIAL),
    (lambda: weakref.ref(kept), Kind.WEAK_REFERENCE),
    (lambda: contextvars.ContextVar("of a test"), Kind.CONTEXT_VARIABLE),
    (lambda: Watchful, Kind.CLASS),
    (lambda: property(lambda _: 1), Kind.DESCRIPTOR),
    (lambda: staticmethod(generator), Kind.DESCRIPTOR),
    (random.Random, Kind.RANDOM),
    (random.SystemRandom, Kind.OBJECT),
    (lambda: numpy.ones(1), Kind.NUMPY),
    (lambda: numpy.float64(1.0), Kind.NUMPY),
    (lambda: numpy.random.default_rng(0), Kind.NUMPY),
    (lambda: bytearray(1), Kind.MEMORY),
    (lambda: array.array("d", [1.0]), Kind.MEMORY),
    (lambda: memoryview(b"1"), Kind.MEMORY),
    (lambda: ctypes.c_int(1), Kind.MEMORY),
    (generator, Kind.ITERATOR),
    (lambda: iter([1]), Kind.ITERATOR),
    (lambda: zip([1], [2], strict=True), Kind.ITERATOR),
    (lambda: weakref.proxy(generator), Kind.ITERATOR),
    (lambda: closing(coroutine()), Kind.COROUTINE),
    (io.StringIO, Kind.FILE),
    (lambda: held.get, Kind.BOUND_BUILTIN),
    (lambda: held.__len__, Kind.BOUND_BUILTIN),
    (lambda: operator.attrgetter("scale"), Kind.GETTER),
    (lambda: held.keys(), Kind.VIEW),
    (lambda: collections.OrderedDict(held).items(), Kind.VIEW),
    (threading.local, Kind.THREAD_LOCAL),
    (lambda: logging.getLogger("graphs.tests.kinds"), Kind.LOGGER),
    (lambda: Text("m"), Kind.LEAF),
    (lambda: Mode.LOW, Kind.LEAF),
    (lambda: held, Kind.OBJECT),
    (lambda: ValueError(1), Kind.OBJECT),
    (Watchful, Kind.OBJECT),
]
WALKED = [one for one in KINDS if one[0] is not Watchful]


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_the_kind_of_an_object_is_told_by_its_class(make: Callable[[], Any], kind: Kind) -> None:
    value = make()
    assert kind_of(value) is kind
    assert kind_of(value) is kind  # remembered


def test_every_kind_has_an_example() -> None:
    assert {kind for _, kind in KINDS} >= set(Kind) - {Kind.METHOD}
    assert kind_of(Walked().__graphs_walk__) is Kind.METHOD


@pytest.mark.parametrize(("make", "kind"), WALKED)
def test_a_snapshot_of_any_kind_is_unchanged_where_nothing_ran(make: Callable[[], Any], kind: Kind) -> None:
    value = make()
    state = PythonState([("value", value)], generators=False)
    assert state.complete and state.differences() == []
    state.restore()
    assert state.differences() == []


@pytest.mark.parametrize(("make", "kind"), WALKED)
def test_guards_of_any_kind_hold_where_nothing_ran_and_only_what_moves_on_is_refused(make: Callable[[], Any], kind: Kind) -> None:
    value = make()
    walk = GuardWalk(CodeReads(), [("value", value)])
    assert walk.complete and walk.changed() is None and walk.guards().changed() is None
    moves_on = kind in (Kind.ITERATOR, Kind.COROUTINE)
    assert [refusal.operator for refusal in walk.incomparable] == (["value"] if moves_on else [])
