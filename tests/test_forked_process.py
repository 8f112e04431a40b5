"""A process that forks while another thread is in a first call: the child waits for nobody, and finds all in its place."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import graphs
from graphs.events.listeners import listeners
from graphs.observation.fused_modules import unnoticed
from passes.forked_process import forkable_lock, put_back_by

LIMIT = 60  # seconds
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


class Gate:
    """Where one thread stops in the midst of a call: as it comes to a function of this project for the n-th time."""

    def __init__(self) -> None:
        self.thread, self.left = 0, 0  # whose calls are counted, and how many it may make
        self.reached, self.opened = threading.Event(), threading.Event()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the gate before it."""

        @functools.wraps(function)
        def stops(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self.thread:
                self.left -= 1
                if not self.left:
                    self.reached.set()
                    assert self.opened.wait(LIMIT)
            return function(*args, **kwargs)

        return stops


def decides(x: Tensor) -> Tensor:
    y = x * 2 if x.sum() > 0 else x - 1
    return y + int(x[0])


def in_child(body: Callable[[], None]) -> None:
    """Fork, and run ``body`` in the child."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(LIMIT)
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "14: it hung until the alarm"


def seen_by_all() -> list[Any]:
    """What first calls exchange for a while, for the whole process."""
    methods = [getattr(torch.SymInt, name) for name in ("__format__", "__hash__", "__str__", "__repr__")]
    spaces = [{name: vars(sys.modules[__name__]).get(name) for name in ("int", "len", "range", "min")}]
    functions = [torch.overrides.has_torch_function, warnings.warn, decides.__code__]
    return [methods, spaces, functions, gc.get_threshold(), gc.isenabled()]


@contextlib.contextmanager
def stopped(place: str, turn: int = 1) -> Iterator[None]:
    """Inside, another thread is in the first call of a step, before it calls ``place`` for the n-th time."""
    gate, (module, _, name) = Gate(), place.rpartition(".")
    step = graphs.capture(decides)

    def first_call() -> None:
        gate.thread, gate.left = threading.get_ident(), turn
        with torch.no_grad():
            step(torch.ones(2))
        gate.reached.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, gate.before(getattr(sys.modules[module], name)))
        thread = threading.Thread(target=first_call, daemon=True)
        thread.start()
        try:
            assert gate.reached.wait(LIMIT)
            assert not gate.left, "the first call does not come there as often"
            yield
        finally:
            gate.opened.set()
            thread.join(LIMIT)
        assert not thread.is_alive() and step.report().replays == 1, str(step.report())


BEFORE = seen_by_all()


PLACES = [
    ("graphs.dispatch.dispatcher.named_leaves", 1),
    ("graphs.observation.watching.finding", 1),
    ("graphs.observation.watching.finding", 12),
    ("graphs.first_call.record_key.make_contract", 1),
    ("passes.tracing.trace._made", 1),
    ("passes.tracing.trace._made", 2),  # with both sides of the branch
    ("graphs.first_call.record_key.guards_of", 1),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
@contexts
def test_a_child_forked_in_the_midst_of_a_first_call_records_and_replays(place: tuple[str, int], context: Any) -> None:
    step = graphs.capture(decides)

    def body() -> None:
        assert seen_by_all() == BEFORE
        with context():
            for value in (1.0, 2.0, -1.0):
                x = torch.full((3,), value)
                assert torch.equal(step(x), decides(x))
        assert step.report().replays == 3, str(step.report())

    with stopped(*place):
        in_child(body)
    assert seen_by_all() == BEFORE


def test_locks_that_other_threads_hold_are_free_in_the_child() -> None:
    """That of a step, and of the listeners."""
    step = graphs.capture(decides)
    held, forked = threading.Event(), threading.Event()
    locks = [listeners._lock, step._graphs_recordings.lock]

    def hold() -> None:
        with locks[0], locks[1]:
            held.set()
            assert forked.wait(LIMIT)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(LIMIT)

    def body() -> None:
        told: list[Any] = []
        with torch.no_grad(), graphs.on_event(told.append):
            for _ in range(2):
                assert torch.equal(step(torch.ones(2)), decides(torch.ones(2)))
        assert [event.kind for event in told] == ["recorded", "replayed", "replayed"]
        step.invalidate()
        assert step.report().recordings == 0

    try:
        in_child(body)
    finally:
        forked.set()
        thread.join(LIMIT)


def test_what_the_forking_thread_holds_it_goes_on_holding() -> None:
    lock, values = forkable_lock(), ["before"]

    def body() -> None:
        assert values == ["meanwhile"] and lock._is_owned()
        taken: list[bool] = []
        other = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
        other.start()
        other.join(LIMIT)
        assert taken == [False]

    with lock, put_back_by(lambda: values.__setitem__(0, "before")):
        values[0] = "meanwhile"
        in_child(body)
        assert values == ["meanwhile"]
    assert values == ["before"]


def test_changes_of_two_threads_are_put_back_as_far_as_they_are_of_the_other() -> None:
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with unnoticed():
            inside.set()
            assert over.wait(LIMIT)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert inside.wait(LIMIT)

    def body() -> None:
        assert torch.overrides.has_torch_function is not BEFORE[2][0], "the forking thread still watches"

    def after() -> None:
        assert torch.overrides.has_torch_function is BEFORE[2][0]

    try:
        with unnoticed():
            in_child(body)
        assert torch.overrides.has_torch_function is not BEFORE[2][0]
        in_child(after)
    finally:
        over.set()
        thread.join(LIMIT)
    assert torch.overrides.has_torch_function is BEFORE[2][0]
