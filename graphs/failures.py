"""What becomes of an exception on the way of a call through its recordings: the user's own reaches the user, no other does."""

from __future__ import annotations

import traceback
from types import TracebackType

import torch

from graphs.errors import AutogradInput, InternalError, Refusal, Unwatchable

_OWN = ("graphs", "passes")


class Eagerly(Exception):
    """The call is to be run by the model itself; why has been counted. Nothing has been run, or all of it was undone."""


class StepRaised(Exception):
    """The step itself raised ``error``, and has left what eager leaves: the user gets just that."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def refusal_of(error: Exception) -> Refusal:
    """Why a call ran eagerly in which ``error`` was raised that the step does not raise in eager."""
    if is_of_our_own(error):
        return internal_error(error)
    if torch.is_grad_enabled() and "grad" in str(error):
        return AutogradInput(f"run without autograd, the step raises {_text(error)}", operator="grad mode")
    return Unwatchable(f"only while its operators are watched, the step raises {_text(error)}", operator=type(error).__name__)


def internal_error(error: Exception) -> InternalError:
    """The refusal for ``error``, which nothing here expected."""
    return InternalError(_text(error), error=error, operator=_place(error))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def is_of_our_own(error: BaseException) -> bool:
    """Whether ``error`` was raised by a line of this project, and not by one of the step's, or of torch below it."""
    module = _modules(error.__traceback__)[-1:]
    return bool(module) and module[0].partition(".")[0] in _OWN


def _place(error: BaseException) -> str:
    """The innermost function of this project that ``error`` passed, to tell one kind of failure from another."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] in _OWN:
            return f"{name}.{frame.f_code.co_qualname if hasattr(frame.f_code, 'co_qualname') else frame.f_code.co_name}"
    return type(error).__name__


def _modules(trace: TracebackType | None) -> list[str]:
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(trace)]
