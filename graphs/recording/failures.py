"""What becomes of an exception that is raised between a call and its result: the user's own reaches the user, no other does."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable

import torch

from graphs.errors import AutogradInput, InternalError, Refusal, Site, StepRaises, Unwatchable
from graphs.recording.recorder import ReplayRaised
from passes.core import source_location
from passes.core.source_location import frames_of

_OWN = ("graphs", "passes")


class Eagerly(Exception):
    """The call is to be run by the model itself; why has been counted. Nothing has been run, or all of it was undone."""


class StepRaised(Exception):
    """The step itself raised ``error``, and left what eager leaves: the user gets just that. ``undo`` takes it back, if given."""

    def __init__(self, error: BaseException, undo: Callable[[], None] | None = None) -> None:
        super().__init__(error)
        self.error, self.undo = error, undo


class RaisedWatched(Exception):
    """The step raised ``error`` while it was watched. All of it was undone; whether it raises in eager too is not known yet."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def refusal_of(failure: Exception) -> Refusal:
    """Why a call ran eagerly that ``failure`` met, though the step does not raise in eager."""
    error = failure.error if isinstance(failure, RaisedWatched) else failure
    if error is failure or is_of_our_own(error):
        return internal_error(error)
    if torch.is_grad_enabled() and "grad" in _text(error):
        return AutogradInput(f"run without autograd, the step raises {_text(error)}", operator="grad mode")
    return Unwatchable(f"only while its operators are watched, the step raises {_text(error)}", operator=type(error).__name__)


def raised_at(error: BaseException) -> Site:
    """The user's line that ``error`` was raised in or below."""
    return Site.at(source_location.raised_at(error))


def is_interrupt(error: BaseException) -> bool:
    """Whether what was raised came from outside of the step: a `KeyboardInterrupt`, or raised by a signal's handler."""
    if isinstance(error, KeyboardInterrupt):
        return True
    if isinstance(error, Exception):
        return False
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(handler, "__code__", None) for handler in handlers} - {None}
    return any(frame.f_code in codes for frame in frames_of(error))


def raised_refusal(error: BaseException) -> StepRaises:
    """The refusal for a call in which the step raised ``error``."""
    return StepRaises(f"the step raises {_text(error)}", operator=type(error).__name__, site=raised_at(error))


def internal_error(error: BaseException) -> Refusal:
    """The refusal for ``error``, which nothing here expected; an operator of the step may raise in a replay."""
    if isinstance(error, ReplayRaised):
        return raised_refusal(error.error)
    return InternalError(_text(error), error=error, operator=_place(error))


def _text(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]  # also where its text cannot be had


def is_of_our_own(error: BaseException) -> bool:
    """Whether ``error`` was raised by a line of this project, and not by one of the step's, or of torch below it."""
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames_of(error)]
    return bool(names) and names[-1].partition(".")[0] in _OWN


def _place(error: BaseException) -> str:
    """The innermost function of this project that ``error`` passed, to tell one kind of failure from another."""
    for frame in reversed(frames_of(error)):
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] in _OWN:
            return f"{name}.{getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}"
    return type(error).__name__
