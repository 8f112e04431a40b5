"""How a first call ends where nothing was recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graphs.errors import CaptureFailed, Refusal, RowsInteract, VerifyMismatch
from graphs.observation.operations import EagerTrace
from graphs.recording.failures import internal_error, is_interrupt, raised_at
from graphs.recording.recorder import ReplayRaised
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.result_lines import with_line
from graphs.rehearsal.step import Checkpoint, Step
from graphs.rewriting.rewritten_step import is_removable

_RUNS_AGAIN = "a step is run a few times from one state before it is recorded: change what this line does in a later run"


class Deferred(Exception):
    """The call ran for real and did what the next may not do: the next call with this key is tried again.

    It initialised state, or (``refusal``) it did what no replay can stand for, such as writing a warning.
    """

    def __init__(self, output: Any, what: str, undo: Callable[[], None], refusal: Refusal | None = None) -> None:
        super().__init__(what)
        self.output, self.undo, self.refusal = output, undo, refusal


class Refused(Exception):
    """The call ran for real (``output``) and cannot be recorded (``refusals``). ``undo`` takes its effects back.

    ``undo`` is None where that is not possible: an iterator moved on.
    """

    def __init__(self, output: Any, refusals: Sequence[Refusal], undo: Callable[[], None] | None) -> None:
        super().__init__(str(refusals[0]))
        self.output, self.refusals, self.undo = output, list(refusals), undo


class FirstCall:
    """The call that is to be recorded: it ran for real already, and counts if nothing comes of the recording.

    Attributes:
        origin: the state before the call.
        start: the same, with what the step only initialises.
        after: the state that the call left; None until that is known.
    """

    def __init__(self, step: Step, origin: Checkpoint, output: Any, trace: EagerTrace) -> None:
        self.step, self.origin, self.output, self.trace = step, origin, output, trace
        self.start = origin
        self.after: Checkpoint | None = None

    def deferred(self, what: str, refusal: Refusal | None = None) -> Deferred:
        """The call counts, and the next one is tried again."""
        return Deferred(self.output, what, self.undo, refusal)

    def refused(self, *refusals: Refusal, undoable: bool = True) -> Refused:
        """The call counts, and no call like it is recorded."""
        return Refused(self.output, refusals, self.undo if undoable else None)

    def undo(self) -> None:
        """Take the call back."""
        self._at(self.origin)

    @contextlib.contextmanager
    def counts(self) -> Iterator[None]:
        """Make a `Refused` of what is raised inside, with the state that the call left; an interrupt takes the call back."""
        try:
            yield
        except (Deferred, Refused):
            self._leave()
            raise
        except RowsInteract:
            self._at(self.start)
            raise
        except Refusal as refusal:
            self._leave()
            raise self.refused(*self._beside(with_line(refusal, self.trace))) from refusal
        except ReplayRaised as error:
            detail = f"a replay of the recording raises {type(error.error).__name__}: {error.error}".splitlines()[0]
            if self.step.rows is not None:
                self._at(self.start)
                raise RowsInteract(detail) from error
            self._leave()
            raise self.refused(with_line(VerifyMismatch(detail, operator=error.operator), self.trace)) from error
        except BaseException as error:  # whatever else a recording meets, the user gets the eager result and the reason
            if is_interrupt(error):
                self.undo()
                raise
            self._leave()
            raise self.refused(internal_error(error)) from error

    def _leave(self) -> None:
        if self.after is not None:
            self._at(self.after)

    def _at(self, state: Checkpoint) -> None:
        Rehearsal(state, self.trace).undo()

    def _beside(self, refusal: Refusal) -> list[Refusal]:
        """The refusal, and what else was found that it does not stand for."""
        passed = self.step.passes and is_removable([refusal])  # of all that passes are for, what they could not remove
        found = [one for one in self.trace.findings if one.signature != refusal.signature]
        return [refusal, *(one for one in found if not (passed and is_removable([one])))]


def ran(step: Step, run: Callable[[], Any]) -> Any:
    """``run()``; a step may well refuse a padded batch, and then it is recorded at its exact sizes."""
    try:
        return run()
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise raised_again(step, error) from error


def raised_again(step: Step, error: BaseException) -> CaptureFailed | RowsInteract:
    """Why a step is not recorded that raises when it runs once more."""
    if step.rows is not None:
        return RowsInteract(f"a run with {step.rows} rows raised {type(error).__name__}: {error}")
    return raised("a warm-up run of the step", error)


def raised(run: str, error: BaseException) -> CaptureFailed:
    """The refusal for a step that raises when it runs once more, with the line that does."""
    detail = f"{run} raised {type(error).__name__}: {error}".splitlines()[0]
    return CaptureFailed(detail, operator=type(error).__name__, site=raised_at(error), remedy=_RUNS_AGAIN)
