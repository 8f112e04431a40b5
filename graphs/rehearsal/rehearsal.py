"""Runs of a step that begin at one state and are undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from graphs.objects.cells import Difference
from graphs.observation.eager_trace import trace_again
from graphs.observation.operations import EagerTrace
from graphs.recording.failures import is_interrupt
from graphs.rehearsal.step import Checkpoint
from graphs.state.counters import Counter

Tensor = torch.Tensor
T = TypeVar("T")


@dataclass(frozen=True)
class Rehearsed:
    """A watched run.

    Attributes:
        output: what it returned; None where it raised.
        trace: its operators.
        changes: what it changed of Python.
        counters: which of that are whole numbers; None where something else changed.
        error: what it raised.
    """

    output: Any
    trace: EagerTrace
    changes: list[Difference]
    counters: list[Counter] | None
    error: BaseException | None = None


class Start(Protocol):
    """A state that can be gone back to."""

    def restore(self) -> None:
        """Put everything back."""
        ...


class PythonOnly:
    """The Python state of a checkpoint, for runs on tensors without data."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def restore(self) -> None:
        """Put Python objects back."""
        self._checkpoint.restore_python()


class States:
    """Parts of the state, where a run cannot change more: tensors that a trace saves, generators, what hangs on a function."""

    def __init__(self, *parts: Start) -> None:
        self._parts = parts

    def restore(self) -> None:
        """Put them back, in their order."""
        for part in self._parts:
            part.restore()


class Runs:
    """Runs from the state of ``start``, each undone: state is put back here and nowhere else.

    Args:
        start: where every run begins.
        first: the watched run before, which saved what it wrote; further tensors are saved as runs write them.
        is_there: whether nothing has run since ``start`` was taken.
    """

    def __init__(self, start: Start, first: EagerTrace, *, is_there: bool = False) -> None:
        self.start, self.first = start, first
        self._is_there = is_there

    def reset(self) -> None:
        """Be at the start, for a run that somebody else makes; it costs nothing where the last run was undone."""
        if not self._is_there:
            self.start.restore()
        self._is_there = False

    def undo(self) -> None:
        """Take back what ran since `reset`."""
        self.start.restore()
        self._is_there = True

    def run(self, fn: Callable[[], T]) -> T:
        """The result of ``fn``, undone also where it raises. What the result holds of the state has to be a copy."""
        self.reset()
        try:
            return fn()
        finally:
            self.undo()


class Rehearsal(Runs):
    """Runs of a step of Python's, from a checkpoint of all that it can change."""

    start: Checkpoint

    def __init__(self, start: Checkpoint, first: EagerTrace, *, is_there: bool = False) -> None:
        super().__init__(start, first, is_there=is_there)

    def covering(self, fn: Callable[[], T]) -> T:
        """As `run`, for a run that is watched into ``first``: what it writes belongs to the start from then on."""

        def watched() -> T:
            try:
                return fn()
            finally:
                self.start.covers(self.first)

        return self.run(watched)

    def watched(
        self, fn: Callable[[Callable[[], Any]], Any], run: Callable[[], Any], tensors: Sequence[Tensor], *, shifted: bool = False
    ) -> Rehearsed:
        """A watched run.

        Args:
            fn: calls what it is given where it is to run (`Recorder.run`).
            run: the step on ``tensors``.
            shifted: whether Python's generators are moved before it, to see a step that seeds them.
        """

        def watched() -> Rehearsed:
            settled = self.start.python.shifted() if shifted else list
            trace, output, error = EagerTrace(), None, None
            try:
                output, trace = fn(lambda: trace_again(run, list(tensors), self.first))
            except BaseException as raised:  # a step may fail when it runs once more; the caller looks for the reason
                if is_interrupt(raised):
                    raise
                error = raised
            return Rehearsed(output, trace, [*settled(), *self.start.differences()], self.start.counters(), error)

        return self.run(watched)
