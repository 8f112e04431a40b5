"""Whether a side of a branch changed Python: objects that the step hangs on, and variables of its frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any, Protocol

from passes.control_flow.syntax import PREFIX
from passes.core.source_location import is_user

TRACER = "_STARTS_STEPS"
"""A global of the module that starts a step: frames from there on are not the step's."""


class State(Protocol):
    """A snapshot of Python objects: ``complete`` if nothing was left out."""

    complete: bool

    def changed_entries(self) -> Iterator[tuple[Any, ...]]:
        """What is not as it was, each beginning with its path."""
        ...


Snapshot = Callable[[Sequence[tuple[str, Any]], State | None], State]
"""Takes a snapshot of all that hangs on objects given by name, but for what another snapshot holds."""


class Watched(Protocol):
    """A trace, which keeps a snapshot of all that its step hangs on.

    Attributes:
        snapshot: takes snapshots of Python objects.
        step: the last one of all; None before the first branch.
    """

    snapshot: Snapshot | None
    step: State | None


class PythonBefore:
    """Whether Python is what it was in front of a branch: all that the frames of the step hold, and their variables.

    Objects that the step itself hangs on are walked once for all branches, unless they change between two of them.
    """

    def __init__(self, trace: Watched, frame: FrameType, assigned: Sequence[str]) -> None:
        self._frames = [(frame, frozenset(assigned))]
        while (outer := self._frames[-1][0].f_back) is not None and not _is_tracer(outer):
            self._frames.append((outer, frozenset()))
        self._frames = [(frame, names) for frame, names in self._frames if is_user(frame)]
        self._before = [{**_globals(entry[0]), **_variables(*entry)} for entry in self._frames]
        assert trace.snapshot is not None
        roots = [item for frame, _ in self._frames for item in {**_variables(frame, frozenset()), **_globals(frame)}.items()]
        if trace.step is None or _changed(trace.step):
            trace.step = trace.snapshot(roots, None)
        self._states = (trace.step, trace.snapshot(roots, trace.step))

    def changed(self) -> str:
        """What is not as it was, or an empty string."""
        if not all(state.complete for state in self._states):
            return "what hangs on the step, which is too much to be watched"
        for entry, before in zip(self._frames, self._before, strict=True):
            now = {**_globals(entry[0]), **_variables(*entry)}
            name = next((name for name in before if now.get(name) is not before[name]), None)
            if name is not None:
                return f"the variable {name} of {entry[0].f_code.co_name}"
        return next((path for state in self._states if (path := _changed(state))), "")


def _changed(state: State) -> str:
    entry = next(state.changed_entries(), None)
    return str(entry[0]).format("") if entry is not None else ""


def _variables(frame: FrameType, but: frozenset[str]) -> dict[str, Any]:
    """The variables of a frame that the step's own lines know, except some."""
    return {name: value for name, value in frame.f_locals.items() if name not in but and not name.startswith(PREFIX)}


def _globals(frame: FrameType) -> dict[str, Any]:
    """The globals that the function of a frame names, as far as they are values: no modules, functions or classes."""
    named = ((name, frame.f_globals[name]) for name in frame.f_code.co_names if name in frame.f_globals)
    return {f"global {name}": value for name, value in named if not isinstance(value, (ModuleType, type)) and not callable(value)}


def _is_tracer(frame: FrameType) -> bool:
    return TRACER in frame.f_globals
