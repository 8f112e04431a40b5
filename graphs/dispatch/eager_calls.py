"""Calls that the model serves: counted by their reasons, and what an exception on the way becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from graphs.config import CaptureConfig
from graphs.contract.arguments import PLAIN_TENSORS, Call, flatten_call
from graphs.contract.settings import active_mode
from graphs.dispatch.call_log import INITIALISED, CallLog
from graphs.eager_mode import forced_by
from graphs.errors import AutogradInput, ChangingValue, InternalError, Refusal, UnsupportedArgument
from graphs.first_call.outcomes import Deferred, Refused
from graphs.recording.failures import Eagerly, RaisedWatched, StepRaised, is_of_our_own, raised_refusal, refusal_of
from graphs.recording.recorder import ReplayRaised


class EagerCalls:
    """Runs the model, with the reason counted.

    Args:
        remember: has calls like one that failed run eagerly from then on.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: CaptureConfig,
        log: CallLog,
        remember: Callable[[Refusal, tuple[Any, ...], dict[str, Any]], None],
    ) -> None:
        self._model, self._config, self._log, self._remember = model, config, log, remember

    def despite(self, failure: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model where something raised on the way to a recording: the model too, or only this project."""
        error = failure.error if isinstance(failure, (RaisedWatched, ReplayRaised)) else failure
        in_replay = isinstance(failure, ReplayRaised)
        if self._config.strict and not in_replay and is_of_our_own(error) and not self._config.raise_internal:
            raise refusal_of(failure)
        try:
            output = self._model(*args, **kwargs)
        except Exception as raised:
            self.raised(raised)
            raise
        if in_replay:  # the step catches it: for this call, which says nothing of the next
            self.count([raised_refusal(error)])
            return output
        refusal = refusal_of(failure)
        if self._config.raise_internal and isinstance(refusal, InternalError):
            raise error
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            self._remember(refusal, args, kwargs)
        self.count([refusal])
        return output

    def raised(self, error: BaseException) -> None:
        """Count a call that ended in what the step itself raises; no warning tells more than that does."""
        self._log.refused(raised_refusal(error), warn=False)
        self._log.eager_calls += 1

    def count(self, refusals: list[Refusal]) -> None:
        """Count one eager call under its first reason, or raise that in strict mode; the others are reported beside it."""
        internal = next((refusal for refusal in refusals if isinstance(refusal, InternalError)), None)
        if internal is not None and internal.error is not None and self._config.raise_internal:
            raise StepRaised(internal.error)
        if self._config.strict:
            raise refusals[0]
        for index, refusal in enumerate(refusals):
            self._log.refused(refusal, calls=int(index == 0))
        self._log.eager_calls += 1

    def count_deferred(self, first_call: Deferred) -> None:
        """Count a first call that was one of its kind; in strict mode it is undone where it did what no replay can stand for."""
        if first_call.refusal is not None:
            if self._config.strict:
                first_call.undo()
                raise first_call.refusal from None
            self._log.refused(first_call.refusal)
            self._log.eager_calls += 1
        else:
            self._initialised(str(first_call))

    def initialise(self, what: str) -> NoReturn:
        """Have `call` run the model, which initialises ``what``, also in strict mode: the next call is tried again."""
        self._initialised(what)
        raise Eagerly

    def _initialised(self, what: str) -> None:
        remedy = "nothing has to change; what is initialised beforehand is recorded at the first call"
        self._log.refused(ChangingValue(INITIALISED, operator=what, remedy=remedy), warn=False)
        self._log.eager_calls += 1

    def count_refused(self, first_call: Refused) -> None:
        """Count a first call that ended in a refusal; where autograd is to record it, it is undone and runs once more."""
        if first_call.undo is not None and (torch.is_grad_enabled() or self._config.strict):
            first_call.undo()
            self.refuse(first_call.refusals)
        self.count(first_call.refusals)

    def refuse(self, refusals: list[Refusal]) -> NoReturn:
        """Have `call` run the model."""
        self.count(refusals)
        raise Eagerly

    def flattened(self, args: tuple[Any, ...], kwargs: dict[str, Any], ambient: Any) -> Call:
        """The call by its leaves; what no key can stand for runs eagerly."""
        inside = active_mode()
        if inside is not None:
            self.refuse([inside])
        try:
            call = flatten_call(args, kwargs, ambient)
        except (RuntimeError, NotImplementedError) as error:  # a tensor without strides: sparse, nested, mkldnn
            self.refuse([UnsupportedArgument(f"{error}".splitlines()[0], operator="arguments")])
        foreign = next((type(tensor) for tensor in call.tensors if type(tensor) not in PLAIN_TENSORS), None)
        if foreign is not None:
            detail = f"a {foreign.__name__}: what a subclass makes of an operator is not in a recording"
            self.refuse([UnsupportedArgument(detail, operator="arguments")])
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
            self.refuse([AutogradInput("a tensor argument requires a gradient", operator="arguments")])
        return call

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, because the caller asked for it, or the first call of a module around this one did."""
        if forced_by() != "first call":
            self._log.eager_calls += 1
        return self._model(*args, **kwargs)
