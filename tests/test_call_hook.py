"""The hook that sees which functions a step calls, and where it rests."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import graphs
from graphs.python_reads import call_hook
from graphs.python_reads.call_hook import Awake, calls_seen_by, resting, wake

WAYS = ["profiling", *(["monitoring"] if hasattr(sys, "monitoring") else [])]
Tensor = torch.Tensor


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "profiling":
        monkeypatch.setattr(call_hook, "_MONITORING", None)
    return str(request.param)


@contextlib.contextmanager
def listening(may_tell: Callable[[types.CodeType], bool] = lambda code: True) -> Iterator[list[tuple[str, str, str]]]:
    """Event, name of what is called, and the function that the frame belongs to, of calls seen inside."""
    seen: list[tuple[str, str, str]] = []

    def hook(frame: types.FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_name if event == "call" else argument.__name__
        seen.append((event, name, frame.f_code.co_name))

    with calls_seen_by(hook, may_tell):
        yield seen


def callee() -> float:
    return time.monotonic()


def test_functions_and_calls_of_c_are_seen_with_their_frames(way: str) -> None:
    with listening() as seen:
        callee()
    assert ("call", "callee", "callee") in seen and ("c_call", "monotonic", "callee") in seen


def test_methods_of_c_come_bound_to_their_object(way: str) -> None:
    owners: list[Any] = []
    with calls_seen_by(lambda frame, event, argument: event == "c_call" and owners.append(argument.__self__), lambda code: True):
        items: list[int] = []
        items.append(1)
    assert any(owner is items for owner in owners)


def test_a_call_without_the_object_raises_what_it_raises(way: str) -> None:
    with listening(), pytest.raises(TypeError, match="needs an argument"):
        list.append()  # type: ignore[call-arg]


def test_other_threads_are_not_seen_and_hide_nothing_from_this_one(way: str) -> None:
    with listening() as seen:
        thread = threading.Thread(target=callee)
        thread.start()
        thread.join()
        assert ("call", "callee", "callee") not in seen
        callee()
    assert ("call", "callee", "callee") in seen


def test_a_second_session_sees_what_the_first_saw(way: str) -> None:
    for _ in range(2):
        with listening() as seen:
            callee()
        assert seen.count(("call", "callee", "callee")) == 1 and ("c_call", "monotonic", "callee") in seen
    assert sys.getprofile() is None


def test_nothing_is_left_behind_by_an_exception(way: str) -> None:
    with pytest.raises(KeyError), listening() as seen:
        raise KeyError
    callee()
    assert ("call", "callee", "callee") not in seen
    if way == "monitoring":
        assert all(sys.monitoring.get_tool(number) is None for number in call_hook._TOOLS)


def test_where_every_number_of_a_tool_is_taken_it_is_a_profiling_function() -> None:
    with contextlib.ExitStack() as taken:
        for number in call_hook._TOOLS if hasattr(sys, "monitoring") else ():
            sys.monitoring.use_tool_id(number, "another")
            taken.callback(sys.monitoring.free_tool_id, number)
        with listening() as seen:
            callee()
            assert hasattr(sys.getprofile(), "rests")
        assert ("c_call", "monotonic", "callee") in seen


def test_it_rests_and_is_awake_again(way: str) -> None:
    with listening() as seen:
        hook = resting()
        assert resting() is None
        try:
            time.time()
            with Awake(hook):
                time.monotonic()
            callee()
        finally:
            wake(hook)
        time.perf_counter()
    names = [name for event, name, _ in seen if event == "c_call"]
    assert "time" not in names and names.count("monotonic") == 1 and "perf_counter" in names
    assert ("call", "callee", "callee") not in seen


def test_a_profiler_of_somebody_else_does_not_rest() -> None:
    def theirs(frame: types.FrameType, event: str, argument: Any) -> None:
        """What a profiler of the user's would be."""

    sys.setprofile(theirs)
    try:
        assert resting() is None and sys.getprofile() is theirs
    finally:
        sys.setprofile(None)


class Reading(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode of the user's, entered by the step, whose Python belongs to the step."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        time.time()
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor whose functions are the user's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.mul:
            time.time()
        return super().__torch_function__(func, types, args, kwargs or {})


class Clock:
    """An operand that does by itself what it is asked to do."""

    def __radd__(self, other: Tensor) -> Tensor:
        return other * time.time()


@torch.library.custom_op("call_hook_tests::clock", mutates_args=())
def clock(x: Tensor) -> Tensor:
    """An operator whose Python reads a clock."""
    return x * (time.time() > 0)


def in_an_operator(x: Tensor) -> Tensor:
    return torch.ops.call_hook_tests.clock(x)


def in_a_mode(x: Tensor) -> Tensor:
    with Reading():
        return x + 1


def in_a_subclass(x: Tensor) -> Tensor:
    return torch.mul(x.as_subclass(Subclass), 2).as_subclass(Tensor)


def in_an_operand(x: Tensor) -> Tensor:
    return x + Clock()


def in_a_callback(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row * (time.time() > 0))(x)


@pytest.mark.parametrize(
    "step", [in_an_operator, in_a_mode, in_a_subclass, in_an_operand, in_a_callback], ids=lambda s: s.__name__
)
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_clock_is_seen_wherever_torch_calls_the_step_back(way: str, step: Callable[[Tensor], Tensor]) -> None:
    captured = graphs.capture(step)
    with torch.no_grad():
        for _ in range(3):
            captured(torch.ones(2, 3))
    report = captured.report()
    assert report.replays == 0 and "time" in str(report)
