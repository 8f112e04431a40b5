"""Having each function seen that starts on this thread, and each function of C that is called.

Up to Python 3.11 by a profiling function. From 3.12 on by `sys.monitoring`, where a place in the code that has nothing more to
tell is not asked again: a profiling function costs several times what the step itself does there.

This project's own modes run Python between any two operators of a watched step, which is nobody's to see: the hook rests there.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from passes.forked_process import put_back_by

Hook = Callable[[types.FrameType, str, Any], None]
"""Called with a frame and ``"call"`` or ``"c_call"``, as by `sys.setprofile`; of a function that starts, once may be enough."""

_MONITORING: Any = getattr(sys, "monitoring", None)
_TOOLS = (4, 3, 2)  # numbers of tools that nobody is advised to take; that of profilers last
_NAME = "graphs"
_OF_C = (types.BuiltinFunctionType, types.MethodDescriptorType)


def is_profiled() -> bool:
    """Whether somebody else profiles this thread. Functions with ``graphs_hook`` set are of this project."""
    before = sys.getprofile()
    return before is not None and not hasattr(before, "graphs_hook")


@contextlib.contextmanager
def calls_seen_by(hook: Hook, may_tell: Callable[[types.CodeType], bool]) -> Iterator[None]:
    """Inside, ``hook`` is told of calls on this thread, which nobody else may profile.

    Args:
        may_tell: whether it matters which functions of C a function calls.
    """
    number = next((one for one in _TOOLS if _MONITORING.get_tool(one) is None), None) if _MONITORING is not None else None
    with _profiling(hook) if number is None else _monitoring(hook, may_tell, number):
        yield


@contextlib.contextmanager
def _profiling(hook: Hook) -> Iterator[None]:
    before: Any = sys.getprofile()

    def seen(frame: types.FrameType, event: Any, argument: Any) -> None:
        if before is not None:
            before(frame, event, argument)
        if event == "call" or event == "c_call":
            hook(frame, event, argument)

    seen.rests = True  # type: ignore[attr-defined]
    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(before)


class _Session:
    """A hook of `sys.monitoring`: whose thread it watches, and whether it rests."""

    __slots__ = ("rests", "thread")

    def __init__(self) -> None:
        self.thread, self.rests = threading.get_ident(), False


_sessions: list[_Session] = []
"""Those that are installed."""


@contextlib.contextmanager
def _monitoring(hook: Hook, may_tell: Callable[[types.CodeType], bool], number: int) -> Iterator[None]:
    """Each function is told of when it starts first; calls of C where they may tell something."""
    telling: dict[int, tuple[bool, types.CodeType]] = {}  # by identity, since code is compared by what it consists of
    events, session = _MONITORING.events, _Session()

    def started(code: types.CodeType, _: int) -> Any:
        if session.rests or threading.get_ident() != session.thread:
            return None
        hook(sys._getframe(1), "call", None)
        return _MONITORING.DISABLE

    def called(code: types.CodeType, _: int, function: Any, first: Any) -> Any:
        tells = telling.get(id(code))
        if tells is None:
            tells = telling[id(code)] = may_tell(code), code
        if not tells[0]:
            return _MONITORING.DISABLE
        if type(function) in _OF_C and not session.rests and threading.get_ident() == session.thread:
            if type(function) is types.MethodDescriptorType:
                if first is _MONITORING.MISSING:  # called without an object: it will raise
                    return None
                function = function.__get__(first, type(first))  # without the class some end the process
            hook(sys._getframe(1), "c_call", function)
        return None

    with put_back_by(functools.partial(_end_monitoring, number, session)):
        _sessions.append(session)
        _MONITORING.use_tool_id(number, _NAME)
        _MONITORING.register_callback(number, events.PY_START, started)
        _MONITORING.register_callback(number, events.CALL, called)
        _MONITORING.restart_events()
        _MONITORING.set_events(number, events.PY_START | events.CALL)
        yield


def _end_monitoring(number: int, session: _Session) -> None:
    if session in _sessions:
        _sessions.remove(session)
    if _MONITORING.get_tool(number) == _NAME:
        _MONITORING.set_events(number, 0)
        for event in (_MONITORING.events.PY_START, _MONITORING.events.CALL):
            _MONITORING.register_callback(number, event, None)
        _MONITORING.free_tool_id(number)


def resting() -> Any:
    """Have the hook of this thread rest: what `wake` is to be given for it to see calls again; None if none rests by this."""
    hook = sys.getprofile()
    if hook is not None and hasattr(hook, "rests"):
        sys.setprofile(None)
        return hook
    if _sessions:
        thread = threading.get_ident()
        for session in _sessions:
            if session.thread == thread and not session.rests:
                session.rests = True
                return session
    return None


def wake(hook: Any) -> None:
    """Have a hook that `resting` gave see calls again; None is none."""
    if type(hook) is _Session:
        hook.rests = False
    elif hook is not None:
        sys.setprofile(hook)


class Awake:
    """Inside, a hook that rests sees calls: around what is not this project's."""

    __slots__ = ("_hook",)

    def __init__(self, hook: Any) -> None:
        self._hook = hook

    def __enter__(self) -> None:
        wake(self._hook)

    def __exit__(self, *_: object) -> None:
        if type(self._hook) is _Session:
            self._hook.rests = True
        elif self._hook is not None:
            sys.setprofile(None)
