"""What a step does to objects written in C happens once in its first call, and once in each call after that."""

from __future__ import annotations

import array
import collections
import ctypes
import enum
import functools
import hashlib
import io
import mmap
import queue
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch

import graphs
from graphs.state.python_state import PythonState

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


@dataclass
class Effect:
    """An object, what a step does to it, and how to read what came of it."""

    held: Any
    apply: Callable[[Any], Any]
    read: Callable[[Any], Any]


class Level(enum.Enum):
    """A member of it has a number that changes."""

    LOW = 1


class Length(float):
    """A number with a unit."""


class Text(str):
    """A text with attributes."""


class Whole(int):
    """A whole number with attributes."""


class Pair(ctypes.Structure):
    """Two numbers."""

    _fields_ = (("first", ctypes.c_int), ("second", ctypes.c_double))


class Lines(io.StringIO):
    """A file in memory with an attribute."""


def increased(name: str) -> Callable[[Any], None]:
    return lambda held: setattr(held, name, getattr(held, name, 0) + 1)


def item_increased(held: Any) -> None:
    held[0] += 1


def first(held: Any) -> Any:
    return held[0]


def with_attribute(held: Any, name: str = "n") -> Any:
    setattr(held, name, 0)
    return held


def appending() -> Any:
    return [].append


def mapped() -> mmap.mmap:
    return mmap.mmap(-1, 16)


def plus_one(held: Any) -> None:
    held[0] = held[0] + 1


def digest() -> Any:
    return hashlib.sha256()


def resized(held: array.array[int]) -> None:
    held.append(7)


def reshaped(held: numpy.ndarray[Any, Any]) -> None:
    held.shape = (held.size // 2, 2) if held.ndim == 1 else (held.size,)


EFFECTS: dict[str, Callable[[], Effect]] = {
    "text in memory": lambda: Effect(io.StringIO(), lambda f: f.write("s"), lambda f: (f.getvalue(), f.tell())),
    "bytes in memory": lambda: Effect(io.BytesIO(b"ab"), lambda f: f.write(b"s"), lambda f: (f.getvalue(), f.tell())),
    "reading text": lambda: Effect(io.StringIO("abcdefghijk"), lambda f: f.read(1), lambda f: f.tell()),
    "a subclass of text in memory": lambda: Effect(Lines(), lambda f: f.write("s"), lambda f: f.getvalue()),
    "an attribute of text in memory": lambda: Effect(with_attribute(Lines()), increased("n"), lambda f: f.n),
    "a closed file in memory": lambda: Effect([io.StringIO("a")], lambda f: f[0].close(), lambda f: f[0].closed),
    "array item": lambda: Effect(array.array("i", [1, 2]), item_increased, first),
    "array length": lambda: Effect(array.array("i", [1, 2]), resized, list),
    "bytearray": lambda: Effect(bytearray(4), item_increased, bytes),
    "view of a bytearray": lambda: Effect(memoryview(bytearray(4)), item_increased, bytes),
    "view with gaps": lambda: Effect(memoryview(bytearray(4))[::2], item_increased, bytes),
    "view of numpy": lambda: Effect(memoryview(numpy.zeros(4).data), item_increased, bytes),
    "ctypes value": lambda: Effect(ctypes.c_int(1), increased("value"), lambda v: v.value),
    "ctypes array": lambda: Effect((ctypes.c_double * 2)(1, 2), item_increased, list),
    "ctypes structure": lambda: Effect(Pair(1, 2.0), increased("second"), lambda v: v.second),
    "ctypes object": lambda: Effect(ctypes.py_object([1]), lambda v: setattr(v, "value", [*v.value, 1]), lambda v: v.value),
    "mapped memory": lambda: Effect(mapped(), plus_one, lambda m: m[:4]),
    "position in mapped memory": lambda: Effect(mapped(), lambda m: m.write(b"a"), lambda m: (m[:4], m.tell())),
    "enum member": lambda: Effect(with_attribute(Level.LOW), increased("n"), lambda m: m.n),
    "attribute of a float": lambda: Effect(with_attribute(Length(2)), increased("n"), lambda v: v.n),
    "attribute of an int": lambda: Effect(with_attribute(Whole(2)), increased("n"), lambda v: v.n),
    "attribute of a text": lambda: Effect(with_attribute(Text("a")), increased("n"), lambda v: v.n),
    "new attribute of a text": lambda: Effect(Text("a"), increased("n"), lambda v: v.n),
    "thread local": lambda: Effect(with_attribute(threading.local()), increased("n"), lambda v: v.n),
    "list in a thread local": lambda: Effect(with_attribute(threading.local(), "n"), increased("n"), lambda v: v.n),
    "simple queue": lambda: Effect(queue.SimpleQueue(), lambda q: q.put(1), lambda q: q.qsize()),
    "queue": lambda: Effect(queue.Queue(), lambda q: q.put(1), lambda q: q.qsize()),
    "digest": lambda: Effect(digest(), lambda h: h.update(b"a"), lambda h: h.hexdigest()),
    "bound method of a list": lambda: Effect(appending(), lambda append: append(1), lambda append: append.__self__),
    "values of a dictionary": lambda: Effect({"a": [1]}.values(), lambda v: next(iter(v)).append(1), list),
    "read-only view of a dictionary": lambda: Effect(
        types.MappingProxyType({"a": [1]}), lambda v: v["a"].append(1), lambda v: v["a"]
    ),
    "items of numpy": lambda: Effect(numpy.array([[1], [2]], dtype=object), lambda a: item_increased(a[0]), lambda a: a.tolist()),
    "shape of numpy": lambda: Effect(numpy.arange(8), reshaped, lambda a: a.shape),
    "counts": lambda: Effect(collections.Counter(), lambda c: c.update("a"), dict),
    "partial": lambda: Effect(functools.partial(appending(), 1), lambda p: p(), lambda p: p.func.__self__),
}


@pytest.fixture(params=EFFECTS, ids=lambda name: name.replace(" ", "-"))
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[], Effect]]:
    yield EFFECTS[request.param]
    if hasattr(Level.LOW, "n"):
        del Level.LOW.n  # type: ignore[attr-defined]


@contexts
def test_effects_happen_once_in_each_call(make: Callable[[], Effect], context: Callable[[], Any]) -> None:
    def results(captured: bool) -> list[Any]:
        effect = make()

        def step(x: Tensor) -> Tensor:
            effect.apply(effect.held)
            return x * 2

        run = graphs.capture(step) if captured else step
        found = []
        with context():
            for _ in range(5):
                run(torch.ones(3))
                found.append(repr(effect.read(effect.held)))
        return found

    assert results(captured=True) == results(captured=False)


SINK: list[int] = []
PUT = SINK.append
FIRST = functools.partial(list.append, SINK)
COUNTED = threading.local()


def global_method(x: Tensor) -> Tensor:
    PUT(1)
    return x * 2


def global_partial(x: Tensor) -> Tensor:
    FIRST(1)
    return x * 2


def own_attribute(x: Tensor) -> Tensor:
    own_attribute.__dict__["calls"] = own_attribute.__dict__.get("calls", 0) + 1
    return x * 2


@pytest.mark.parametrize("step", [global_method, global_partial])
def test_effects_of_methods_that_are_globals(step: Callable[[Tensor], Tensor]) -> None:
    SINK.clear()
    captured = graphs.capture(step)
    with torch.no_grad():
        for call in range(1, 6):
            captured(torch.ones(3))
            assert len(SINK) == call


def test_first_attribute_of_a_function() -> None:
    captured = graphs.capture(own_attribute)
    with torch.no_grad():
        for call in range(1, 6):
            captured(torch.ones(3))
            assert own_attribute.__dict__["calls"] == call


def test_memory_is_put_back_where_it_was_resized() -> None:
    held: dict[str, Any] = {"array": array.array("d", [1.0]), "bytes": bytearray(b"ab"), "file": io.BytesIO(b"abc")}
    state = PythonState([("held", held)])
    held["array"].extend([2.0, 3.0])
    held["bytes"] += b"cd"
    held["file"].close()
    assert {difference.path for difference in state.differences()} == {"held['array']", "held['bytes']", "held['file']"}
    state.restore()
    assert not state.differences()
    assert held["array"].tolist() == [1.0] and held["bytes"] == b"ab" and held["file"].getvalue() == b"abc"


def named_like_builtins(x: Tensor) -> Tensor:
    input, open = x.chunk(2)  # on purpose
    scaled = [input * part for part in open]
    return torch.stack([*scaled, input])


def test_a_local_variable_that_is_named_like_a_function_is_none() -> None:
    step = graphs.capture(named_like_builtins)
    with torch.no_grad():
        for number in range(3):
            x = torch.full((4, 3), float(number))
            assert torch.equal(step(x), named_like_builtins(x))
    assert step.report().recordings == 1, str(step.report())


def test_a_function_that_reads_what_lies_outside_is_refused_by_any_name() -> None:
    held = open

    def step(x: Tensor) -> Tensor:
        return x + len(list(map(held, [])))

    captured = graphs.capture(step)
    assert torch.equal(captured(torch.ones(2)), torch.ones(2))
    assert [refusal.reason for refusal in captured.report().refusals] == ["unguarded-read"]
