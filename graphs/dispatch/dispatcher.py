"""Every call of a captured module: recognise it, check the contract, replay; else record; else run the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch

from graphs.config import CaptureConfig
from graphs.contract.arguments import PLAIN_TENSORS, Call, flatten_call
from graphs.contract.batch import BatchRule
from graphs.contract.eligibility import name_of, parameter_names
from graphs.contract.settings import active_mode, ambient_of
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.eager_calls import EagerCalls
from graphs.dispatch.fast_path import FastPath
from graphs.dispatch.key_recorder import KeyRecorder
from graphs.dispatch.replay import Outdated, filled, replayed, stale
from graphs.dispatch.routes import Refused as RefusedRoute
from graphs.dispatch.routes import Routes
from graphs.dispatch.variants import MAX_VARIANTS, is_hopeless, many_variants
from graphs.errors import (
    AboveLargestBucket,
    AutogradInput,
    ChangingValue,
    GraphsError,
    MovedStaticTensor,
    Refusal,
    UnsupportedArgument,
)
from graphs.events.listeners import listeners
from graphs.events.ranges import attended_replay
from graphs.first_call.outcomes import Deferred, Refused
from graphs.first_call.recorded_step import RecordedStep
from graphs.objects.torch_fast_paths import profiler
from graphs.recording.failures import Eagerly, StepRaised
from graphs.recording.recorder import first_call_lock
from graphs.report import CaptureReport

_recording = first_call_lock
_MAX_DEFERRALS = 3
_OFTEN = 8  # replays a recording must serve before a changed value, for the change not to count as a habit


class Dispatcher:
    """What was recorded and refused for one module, and the decision what a call gets. `call` is the main path."""

    def __init__(self, model: Callable[..., Any], config: CaptureConfig) -> None:
        self.model, self.config = model, config
        # verifying a replay runs the step as a first call does, so it needs their lock, and from the start of the call
        self.verifies_always = config.verify == "always"
        self.lock = _recording if self.verifies_always else threading.RLock()
        parameters = parameter_names(model)
        self.name = config.name or name_of(model)
        self.call_log = CallLog(self.name)
        self.routes = Routes(parameters, config.max_recordings, self.call_log)
        self.keys = KeyRecorder(model, config, self.name, parameters, self.routes, self.call_log)
        self.eager = EagerCalls(model, config, self.call_log, self._remember)
        if config.ranges:
            listeners.want_ranges()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one step: replay it if its key is recorded, else try to record it, else run the model.

        Only what the model raises reaches the caller, and in strict mode a refusal.
        """
        failure: Exception | None = None
        own: BaseException | None = None
        try:
            return self._serve(args, kwargs)
        except Eagerly:
            pass
        except StepRaised as raised:
            own = raised.error
        except GraphsError:
            raise
        except Exception as error:
            failure = error
        if own is not None:
            self.eager.raised(own)
            raise own
        return self.model(*args, **kwargs) if failure is None else self.eager.despite(failure, args, kwargs)

    def _remember(self, refusal: Refusal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run calls like this one eagerly from now on; a call that cannot be flattened has no key to remember it by."""
        try:
            call = flatten_call(args, kwargs, ambient_of(self.model))
            hash(call.signature)
        except Exception:  # that is what failed, then
            return
        with _recording, self.lock:
            self.routes.refuse(call, [refusal])

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a recording gives, or the watched run of a step that none can be made of.

        Raises:
            Eagerly, StepRaised: see there.
            Refusal: in strict mode.
        """
        ambient = ambient_of(self.model)
        last = self.routes.last
        if last is not None:
            guard, entry, rows = last
            like = guard.match(args, kwargs, ambient)
            if like is not None:
                return self._replay(entry, rows, like)
        call = self._flattened(args, kwargs, ambient)
        route = self.routes.by_signature.get(call.signature)
        if route is None:
            return self._unknown(call)
        if isinstance(route, RefusedRoute):
            return self._refuse(route.refusals) if route.serves(call) else self._unknown(call)
        like_this = FastPath.of(args, kwargs, ambient, call)
        with self.lock:  # unless another thread has just dropped the route
            if self.routes.by_signature.get(call.signature) is route:
                self.routes.last = (like_this, *route) if like_this is not None else None
        return self._replay(route[0], route[1], call)

    def _flattened(self, args: tuple[Any, ...], kwargs: dict[str, Any], ambient: Any) -> Call:
        """The call by its leaves; what no key can stand for runs eagerly."""
        inside = active_mode()
        if inside is not None:
            self._refuse([inside])
        try:
            call = flatten_call(args, kwargs, ambient)
        except (RuntimeError, NotImplementedError) as error:  # a tensor without strides: sparse, nested, mkldnn
            self._refuse([UnsupportedArgument(f"{error}".splitlines()[0], operator="arguments")])
        foreign = next((type(tensor) for tensor in call.tensors if type(tensor) not in PLAIN_TENSORS), None)
        if foreign is not None:
            detail = f"a {foreign.__name__}: what a subclass makes of an operator is not in a recording"
            self._refuse([UnsupportedArgument(detail, operator="arguments")])
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
            self._refuse([AutogradInput("a tensor argument requires a gradient", operator="arguments")])
        return call

    def _replay(self, entry: RecordedStep, rows: int, call: Call) -> Any:
        """Check the contract, replay, and put the output together."""
        with self._attended(entry, rows) if listeners.at_replays or profiler._is_profiler_enabled else self.lock:
            why = stale(entry, call)
            if why is None:
                if self.verifies_always:
                    self.keys.verify(entry, rows, call)
                produced = replayed(entry, rows, call)
                if entry.checked is None or entry.checked.commit_or_rollback():
                    entry.replays += 1
                    entry.real_rows += rows
                    return filled(entry, produced, call)
        if why is None:
            return self._another_variant(entry, rows, call)
        if isinstance(why, Outdated):
            return self._outdated(entry, why, call)
        if isinstance(why, MovedStaticTensor) and self._releases(entry, why, call):
            return self._serve(call.args, call.kwargs)
        return self._refuse([why])

    def _attended(self, entry: RecordedStep, rows: int) -> AbstractContextManager[None]:
        """The lock, with a range in the traces that are being made, and an event for those who are told of replays."""
        bucket, asked = entry.contract.rows, self.config.ranges
        return attended_replay(self.lock, entry, asked, step=self.name, key=entry.key, rows=bucket, real_rows=rows)

    def _releases(self, entry: RecordedStep, moved: MovedStaticTensor, call: Call) -> bool:
        """Whether a recording was dropped since arguments that it writes in place are elsewhere.

        One that stayed where it was for long, a cache, is recorded at its new address; others are copied from then on.
        """
        arguments = entry.statics.moved_arguments(call.tensors)
        declared = {name for _, name in arguments if name in self.config.static}
        known = self.routes.moving.get(call.signature, frozenset())
        positions = {index for index, _ in arguments}
        if entry.contract.rows is not None or declared or positions <= known:
            return False
        with _recording, self.lock:
            if entry in self.routes.entries.values():
                self.call_log.refused(moved, outcome="the step is recorded anew")
                self.routes.drop(entry)
                if entry.replays < _OFTEN:
                    self.routes.moving[call.signature] = known | positions
        return True

    def _another_variant(self, broken: RecordedStep, rows: int, call: Call) -> Any:
        """Serve a call that decides otherwise than ``broken`` assumes, whose replay was undone: by a variant recorded before,
        or by a new one.
        """
        with _recording, self.lock:
            variants = broken.group.variants
            for entry in [other for other in variants if other is not broken]:
                if stale(entry, call) is not None:
                    continue
                with self._attended(entry, rows):
                    produced = replayed(entry, rows, call)
                    if entry.checked is None or entry.checked.commit_or_rollback():
                        variants.remove(entry)
                        variants.insert(0, entry)
                        self.routes.lead(call, entry, rows)
                        entry.replays += 1
                        entry.real_rows += rows
                        return filled(entry, produced, call)
            if broken.group.refusals:
                return self._refuse(broken.group.refusals)
            refusal = many_variants(variants)
            if len(variants) < MAX_VARIANTS:
                return self._unknown(call, beside=broken)
            broken.group.broken += 1
            if is_hopeless(broken.group):
                self.routes.refuse(call, [refusal])
            return self._refuse([refusal])

    def _unknown(self, call: Call, beside: RecordedStep | None = None) -> Any:
        """Try to record an unknown key; replay it, or return what the model gave, with the reason counted.

        Args:
            beside: a recording of the key whose assumptions do not hold for this call.
        """
        with _recording, self.lock:
            route = self.routes.by_signature.get(call.signature)
            if route is not None and not isinstance(route, RefusedRoute) and beside is None:  # another thread was faster
                return self._replay(route[0], route[1], call)
            self._require_recordable(call, beside)
            try:
                keys = self.keys
                found = keys.record(call) if beside is None else keys.record_variant(beside, call)
            except Deferred as deferred:
                return self._deferred(deferred, call)
            except Refused as refused:
                return self._refused(refused, call, beside)
            except AboveLargestBucket as too_large:
                self.routes.refuse(call, [too_large])
                return self._refuse([too_large])
            if not found[0].replays:
                self.routes.habits.tried(call, found[0])
        return self._replay(found[0], found[1], call)

    def _require_recordable(self, call: Call, beside: RecordedStep | None) -> None:
        """Run the model where nothing is to be recorded, as far as that can be said before."""
        refusals = self.routes.habitual(call) if beside is None else []
        if refusals:
            self._refuse(refusals)
        self.routes.forget_the_dead()
        refusal = self.keys.inadmissible(call)
        if refusal is not None:
            self._refuse([refusal])

    def _deferred(self, deferred: Deferred, call: Call) -> Any:
        """The output of a first call that was one of its kind; the next one is tried again, a few times."""
        routes = self.routes
        routes.habits.tried(call, None)
        routes.attempts[call.signature] += 1
        if routes.attempts[call.signature] > _MAX_DEFERRALS:
            changing = ChangingValue(f"{deferred} changes in most calls", operator=str(deferred))
            routes.refuse(call, [deferred.refusal or changing])
        if deferred.refusal is not None:
            if self.config.strict:
                deferred.undo()
                raise deferred.refusal from None
            self.call_log.refused(deferred.refusal)
        self.call_log.eager_calls += 1
        return deferred.output

    def _refused(self, refused: Refused, call: Call, beside: RecordedStep | None) -> Any:
        """The output of a first call that ended in a refusal; computed once more where autograd is to record it."""
        if beside is None:
            self.routes.habits.tried(call, None, refused.refusals)
            self.routes.refuse(call, refused.refusals)
        else:
            beside.group.refusals = refused.refusals
        if refused.undo is not None and (torch.is_grad_enabled() or self.config.strict):
            refused.undo()
            return self._refuse(refused.refusals)
        self.eager.count(refused.refusals)
        return refused.output

    def _outdated(self, entry: RecordedStep, why: Outdated, call: Call) -> Any:
        """Drop a recording that froze what has changed since; record anew, but refuse by name what changes often."""
        with _recording, self.lock:
            self.routes.drop(entry)
            refusal = why.refusal
            if refusal is not None:
                self.routes.attempts[call.signature] += entry.replays < _OFTEN
                if self.routes.attempts[call.signature] > 1:
                    self.routes.refuse(call, [refusal])  # which this call is counted under
                else:
                    self.call_log.refused(refusal, outcome="the step is recorded anew")
        return self._serve(call.args, call.kwargs)

    def _refuse(self, refusals: list[Refusal]) -> NoReturn:
        """Have `call` run the model."""
        self.eager.refuse(refusals)

    def run_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, because the caller asked for it, or the first call of a module around this one did."""
        return self.eager.run(args, kwargs)

    def report(self, mode: str) -> CaptureReport:
        """What was recorded, replayed and refused so far, and why."""
        with self.lock:
            devices = ", ".join(sorted(map(str, self.keys.recorders))) or "no device"
            return self.call_log.report(devices, mode, list(self.routes.entries.values()))

    def record_buckets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record every bucket ahead of time; see `KeyRecorder.record_buckets`."""
        with _recording, self.lock:
            self.keys.record_buckets(args, kwargs)

    def invalidate(self) -> None:
        """Drop every recording and every refusal remembered: after weights, caches or the model were replaced."""
        with _recording, self.lock:
            self.routes.clear()
            self.keys.batch = BatchRule()
