"""A profiling hook that raises, and that is there again for whatever the exception unwinds through.

Python takes a profiling function away that raises. So the handlers of a step that is stopped (``finally``, a bare ``except``,
the end of a ``with``) would run without anybody looking, although they belong to what must not act. A trace function on the
frames of the step is told of the exception before a handler runs, and installs the hook again.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch._ops import OpOverload

Hook = Callable[[FrameType, str, Any], None]
"""A profiling hook that raises where the step is about to act outside of itself, before it does. It is told of calls alone."""
_PATIENT = 32
"""Exceptions after which handlers are not run any more: a step that tries again whatever is raised would not come to an end."""


class EndlessError(BaseException):
    """A step that catches all that stops it."""


class Inside(contextlib.AbstractContextManager[None]):
    """Inside, the hook of this thread does not run, if it has ``pauses`` set: for operators of torch's own, which act nowhere.

    Else it would be called for each line of Python that fake tensors and decompositions consist of.
    """

    __slots__ = ("_hook",)

    def __enter__(self) -> None:
        hook = sys.getprofile()
        self._hook = hook if hasattr(hook, "pauses") else None
        if self._hook is not None:
            sys.setprofile(None)

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            sys.setprofile(self._hook)


_BEFORE = frozenset(("call", "c_call"))  # what a hook can stop
_SEEN = contextlib.nullcontext()
_OF_C = frozenset((types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType))


def inside(function: Any, arguments: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """`Inside` where what a mode is shown is torch's own and is given nothing to call; else nothing."""
    kind = type(function)
    if kind is OpOverload:
        return Inside() if function.namespace == "aten" else _SEEN
    if kind not in _OF_C and not (kind is types.FunctionType and function.__module__.startswith("torch")):
        return _SEEN
    for value in arguments:
        if type(value) is types.FunctionType:
            return _SEEN
    return Inside()


class Stopping:
    """``hook`` as a profiling function that outlives its own exceptions.

    Args:
        hook: see `Hook`.

    Attributes:
        is_active: whether it is installed, or was when it raised last.
        count: how often it raised.
        pauses: see `Inside`.
    """

    pauses = True

    def __init__(self, hook: Hook) -> None:
        self._hook = hook
        self._trace = self._unwinding  # one object: a bound method is another at each look
        self._frames: list[tuple[FrameType, Any]] = []
        self._before: Any = None
        self.is_active = False
        self.count = 0

    @staticmethod
    def is_possible() -> bool:
        """Whether nobody else profiles or traces this thread. Hooks with ``graphs_hook`` set go on being called."""
        before = sys.getprofile()
        return (before is None or hasattr(before, "graphs_hook")) and sys.gettrace() is None

    def start(self) -> None:
        """Have the calls that follow seen; where nobody else sees them, see `is_possible`."""
        self.is_active, self._before = True, sys.getprofile()
        sys.setprofile(self)

    def stop(self) -> None:
        """Take away whatever was installed."""
        if self.is_active and sys.getprofile() in (None, self):
            sys.setprofile(self._before)
        if self._frames and sys.gettrace() in (None, _started):
            sys.settrace(None)
        for frame, before in self._frames:
            frame.f_trace = before
        self._frames, self.is_active = [], False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See `sys.setprofile`."""
        if self._before is not None:
            self._before(frame, event, argument)
        if event not in _BEFORE:
            return
        try:
            self._hook(frame, event, argument)
        except BaseException:
            self._stay(frame)
            raise

    def _stay(self, frame: FrameType | None) -> None:
        self.count += 1
        sys.settrace(_started)
        while frame is not None:
            if frame.f_trace is not self._trace:
                self._frames.append((frame, frame.f_trace))
                frame.f_trace = self._trace
            frame = frame.f_back

    def _unwinding(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "exception" and sys.getprofile() is None:
            sys.setprofile(self)
        elif event == "line" and self.count > _PATIENT:
            raise EndlessError("the step goes on whatever is raised")
        return self._trace


def _started(frame: FrameType, event: str, argument: Any) -> None:
    """The trace function of frames that begin while others are unwound: the profiling function sees them."""
