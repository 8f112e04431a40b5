"""Memory that C code keeps and that is no tensor: compared at each call, or refused by name."""

from __future__ import annotations

import array
import collections
import ctypes
import io
import mmap
import pickle
import queue
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import graphs
from graphs.objects import c_objects

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
CONTEXTS = [torch.no_grad, torch.inference_mode]


class Users(numpy.ndarray):
    """An array of a class of the user's."""


def floats() -> numpy.ndarray:
    return numpy.zeros(1024, dtype=numpy.float32)


def pointer() -> Any:
    return ctypes.cast((ctypes.c_float * 4)(), ctypes.POINTER(ctypes.c_float))


def write_first(memory: Any, value: int) -> None:
    memory[0] = value


def write_file(file: io.BytesIO, value: int) -> None:
    file.getbuffer()[0] = value


def write_text(file: io.StringIO, value: int) -> None:
    file.seek(0)
    file.write(str(value))
    file.seek(0)


def first(memory: Any) -> float:
    return float(memory[0])


MEMORY: dict[str, tuple[Callable[[], Any], Callable[[Any, int], object], Callable[[Any], float]]] = {
    "array of NumPy": (floats, write_first, first),
    "array of a class of the user's": (lambda: floats().view(Users), write_first, first),
    "masked array": (lambda: numpy.ma.masked_array(floats()), write_first, first),
    "array of another type than buffers know": (
        lambda: numpy.zeros(1024, dtype="datetime64[s]").view(Users),
        lambda memory, value: memory.__setitem__(0, numpy.datetime64(value, "s")),
        lambda memory: float(memory[0].astype(numpy.int64)),
    ),
    "bytearray": (lambda: bytearray(4096), write_first, first),
    "array of array": (lambda: array.array("f", [0.0]) * 1024, write_first, first),
    "array of ctypes": (lambda: (ctypes.c_float * 1024)(), write_first, first),
    "mapped file": (lambda: mmap.mmap(-1, 4096), write_first, first),
    "view": (lambda: memoryview(bytearray(4096)), write_first, first),
    "read-only view": (
        lambda: memoryview(bytearray(4096)).toreadonly(),
        lambda memory, value: memory.obj.__setitem__(0, value),
        first,
    ),
    "pickle buffer": (
        lambda: pickle.PickleBuffer(bytearray(4096)),
        lambda memory, value: memory.raw().__setitem__(0, value),
        lambda memory: first(memory.raw()),
    ),
    "file in memory": (lambda: io.BytesIO(bytes(4096)), write_file, lambda file: first(file.getvalue())),
    "text in memory": (lambda: io.StringIO("0" * 4096), write_text, lambda file: float(file.getvalue()[0])),
}
SMALL = {
    "polynomial": (
        lambda: numpy.poly1d([1.0, 2.0]),
        lambda one, value: one.coeffs.__setitem__(0, value),
        lambda one: float(one(3.0)),
    ),
    "polynomial of a class": (
        lambda: numpy.polynomial.Polynomial([1.0, 2.0]),
        lambda one, value: setattr(one, "coef", numpy.array([float(value), 2.0])),
        lambda one: float(one(3.0)),
    ),
    "queue": (
        queue.SimpleQueue,
        lambda one, value: one.put(value),
        lambda one: float(one.qsize()),
    ),
}
NEVER = {
    "cursor of an array": (lambda: floats().flat, lambda one, value: one.base.__setitem__(0, value), first),
    "pointer": (pointer, write_first, first),
}


def check(kind: Any, context: Any, *, as_argument: bool) -> graphs.CaptureReport:
    """Six calls with the memory changed before each but the first two; each equal to eager."""
    make, write, read = kind
    memory = make()

    def step(x: Tensor, given: Any = None) -> Tensor:
        return x * read(memory) if given is None else x * read(given)

    captured, given = graphs.capture(step), (memory,) if as_argument else ()
    for call in range(6):
        if call > 1:
            write(memory, call)
        with context():
            assert torch.equal(captured(torch.ones(2), *given), step(torch.ones(2), *given)), call
    return captured.report()


@pytest.mark.parametrize("as_argument", [False, True])
@pytest.mark.parametrize("name", [*MEMORY, *SMALL])
def test_small_memory_is_compared_at_each_call(name: str, as_argument: bool) -> None:
    context = CONTEXTS[len(name) % 2]
    report = check({**MEMORY, **SMALL}[name], context, as_argument=as_argument)
    assert report.replays and {refusal.reason for refusal in report.refusals} <= {"changing-value"}, report


@pytest.mark.parametrize("as_argument", [False, True])
@pytest.mark.parametrize("name", MEMORY)
def test_large_memory_is_refused_by_name(name: str, as_argument: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_objects, "SMALL", 4095)
    report = check(MEMORY[name], CONTEXTS[len(name) % 2], as_argument=as_argument)
    refusals = collections.Counter(refusal.reason for refusal in report.refusals)
    assert report.replays == 0 and refusals.keys() == {"unguarded-read"}, report
    assert "too large to be compared at each call" in str(report)


@pytest.mark.parametrize("name", NEVER)
def test_memory_behind_a_cursor_or_an_address_is_refused_by_name(name: str) -> None:
    report = check(NEVER[name], torch.no_grad, as_argument=False)
    assert report.replays == 0 and {refusal.reason for refusal in report.refusals} == {"unguarded-read"}, report


def test_above_16_mib_it_is_large() -> None:
    frame = numpy.zeros((16 << 20) + 1, dtype=numpy.uint8)
    step = graphs.capture(lambda given: torch.as_tensor(given)[:3].float())
    with torch.no_grad():
        for value in (0, 0, 50):
            frame[:] = value
            assert step(frame).tolist() == [value] * 3
    assert {refusal.reason for refusal in step.report().refusals} == {"unguarded-read"}


def test_the_layout_of_an_array_of_the_users_class_counts() -> None:
    memory = floats().view(Users)
    step = graphs.capture(lambda x: x * memory.shape[0])
    with torch.no_grad():
        assert step(torch.ones(1)).tolist() == [1024.0] == step(torch.ones(1)).tolist()
        memory.shape = (2, 512)
        assert step(torch.ones(1)).tolist() == [2.0]
