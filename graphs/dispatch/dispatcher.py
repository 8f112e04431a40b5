"""Every call of a captured module: recognise it, check the contract, replay; else record; else run the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from graphs.config import CaptureConfig
from graphs.contract.arguments import Call, Leaves, flatten_call, named_leaves
from graphs.contract.batch import BatchRule
from graphs.contract.eligibility import name_of, parameter_names, uninitialised
from graphs.contract.settings import ambient_of
from graphs.dispatch.ahead.record_sizes import SizesAhead
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.dead_objects import DeadObjects
from graphs.dispatch.eager_calls import EagerCalls
from graphs.dispatch.fast_path import FastPath
from graphs.dispatch.key_recorder import KeyRecorder, NotNow
from graphs.dispatch.moved import MovedTensors
from graphs.dispatch.replay import MAX_VARIANTS, UNDONE, Outdated, is_hopeless, many_variants, replayed, stale, unpointed
from graphs.dispatch.routes import Recorded, Routes, may_move
from graphs.dispatch.routes import Refused as RefusedRoute
from graphs.errors import (
    AboveLargestBucket,
    GraphsError,
    MovedStaticTensor,
    Refusal,
)
from graphs.events.listeners import listeners
from graphs.events.ranges import attended_replay
from graphs.first_call.outcomes import Deferred, Refused
from graphs.first_call.recorded_step import RecordedStep
from graphs.objects.torch_fast_paths import profiler
from graphs.recording.failures import Eagerly, StepRaised
from graphs.recording.recorder import first_call_lock
from graphs.report import CaptureReport, SizesReport
from passes.forked_process import forkable_lock

_recording = first_call_lock
_NOTHING = object()
"""The output of a call that the model is still to be run for."""


class Dispatcher:
    """What was recorded and refused for one module, and the decision what a call gets. `call` is the main path."""

    def __init__(self, model: Callable[..., Any], config: CaptureConfig) -> None:
        self.model, self.config = model, config
        # verifying a replay runs the step as a first call does, so it needs their lock, and from the start of the call
        self.verifies_always = config.verify == "always"
        self.lock = _recording if self.verifies_always else forkable_lock()
        self._parameters = parameter_names(model)
        self.name = config.name or name_of(model)
        self.call_log = CallLog(self.name)
        self.routes = Routes(config.max_recordings, self.call_log, buckets=len(config.buckets or ()))
        self.dead = DeadObjects(self.routes.forget_the_dead, (_recording, self.lock))
        self.keys = KeyRecorder(model, config, self.name, self._parameters, self.routes, self.call_log)
        self.moved = MovedTensors(self.keys, self.routes, self.call_log)
        self.eager = EagerCalls(model, config, self.call_log, self._remember)
        if config.ranges:
            listeners.want_ranges()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one step: replay it if its key is recorded, else try to record it, else run the model.

        Only what the model raises reaches the caller, in strict mode a refusal, and a warning that a filter makes an error of.
        """
        failure: Exception | None = None
        own: BaseException | None = None
        output: Any = _NOTHING
        try:
            output = self._serve(args, kwargs)
        except Eagerly:
            pass
        except (Deferred, Refused) as first_call:
            output = first_call.output
        except StepRaised as raised:
            own = raised.error
        except GraphsError:
            self.call_log.warn_now(raising=False)
            raise
        except Exception as error:
            failure = error
        if output is _NOTHING:
            output = self._by_the_model(failure, own, args, kwargs)
        if self.call_log.unsaid:
            self.call_log.warn_now()
        return output

    def _by_the_model(
        self, failure: Exception | None, own: BaseException | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The model's output where nothing was replayed, after ``failure`` if any; ``own`` is what it has raised already."""
        try:
            if own is not None:
                self.eager.raised(own)
                raise own
            return self.model(*args, **kwargs) if failure is None else self.eager.despite(failure, args, kwargs)
        except BaseException:
            self.call_log.warn_now(raising=False)
            raise

    def _remember(self, refusal: Refusal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run calls like this one eagerly from now on; a call that cannot be flattened has no key to remember it by."""
        try:
            call = flatten_call(args, kwargs, ambient_of(self.model))
            hash(call.signature)
        except Exception:  # that is what failed, then
            return
        with _recording, self.lock:
            self.routes.note_failed(call, refusal)

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a recording gives: one that is known, or one made for this call. Raises what `_unknown` does, and `StepRaised`."""
        ambient = ambient_of(self.model)
        last = self.routes.last
        if last is not None:
            guard, entry, rows = last
            like = guard.match(args, kwargs, ambient)
            if like is not None:
                return self._replay(entry, rows, like)
        if self.dead.pending:
            self.dead.settle()
        call = self.eager.flattened(args, kwargs, ambient)
        route = self.routes.by_signature.get(call.signature)
        if route is None or isinstance(route, RefusedRoute):
            if route is not None and route.serves(call):
                self.eager.refuse(route.refusals)
            route = self._unknown(call)
        else:
            like_this = FastPath.of(args, kwargs, ambient, call)
            with self.lock:
                self.routes.used(call, route, like_this)
        return self._replay(route[0], route[1], call)

    def _replay(self, entry: RecordedStep, rows: int, call: Call) -> Any:
        """Check the contract, and replay."""
        with self._attended(entry, rows) if listeners.at_replays or profiler._is_profiler_enabled else self.lock:
            here = entry.storages is None or entry.recording.at is entry.storages
            why = stale(entry, call) or (None if here else unpointed(entry))
            if why is None:
                if self.verifies_always:
                    self.keys.verify(entry, rows, call)
                output = replayed(entry, rows, call)
                if output is not UNDONE:
                    return output
        return self._another_variant(entry, rows, call) if why is None else self._anew(entry, rows, why, call)

    def _attended(self, entry: RecordedStep, rows: int) -> AbstractContextManager[None]:
        """The lock, with a range in the traces that are being made, and an event for those who are told of replays."""
        name, key, bucket = self.name, entry.key, entry.contract.rows
        return attended_replay(self.lock, entry, self.config.ranges, step=name, key=key, rows=bucket, real_rows=rows)

    def _anew(self, entry: RecordedStep, rows: int, why: Refusal | Outdated, call: Call) -> Any:
        """Serve a call that ``entry`` cannot serve: by its recording, pointed at what moved; by another; else by the model."""
        if isinstance(why, (Outdated, MovedStaticTensor)):
            with _recording, self.lock:
                found = self.moved.elsewhere(entry, rows, why, call)
            if found is not None:
                return self._replay(found, rows, call)
        if isinstance(why, Outdated):
            with _recording, self.lock:
                self.routes.note_outdated(call, entry, why.refusal, why.change)
        elif isinstance(why, MovedStaticTensor) and may_move(self.routes, call, entry, self.config.static):
            with _recording, self.lock:
                self.routes.note_moved(call, entry, why)
        else:
            self.eager.refuse([why])
        return self._serve(call.args, call.kwargs)

    def _another_variant(self, broken: RecordedStep, rows: int, call: Call) -> Any:
        """Serve a call that ``broken`` does not hold for, its replay undone: by a variant recorded before, or by a new one."""
        with _recording, self.lock:
            group, variants = broken.group, broken.group.variants
            for entry in [other for other in variants if other is not broken]:
                with self._attended(entry, rows):
                    output = replayed(entry, rows, call) if stale(entry, call) is None else UNDONE
                if output is not UNDONE:
                    variants[:] = [entry, *(other for other in variants if other is not entry)]
                    self.routes.lead(call, entry, rows)
                    return output
            if group.refusals:
                self.eager.refuse(group.refusals)
            if len(variants) < MAX_VARIANTS:
                return self._replay(*self._unknown(call, beside=broken), call)
            refusal = many_variants(variants)
            group.broken += 1
            if is_hopeless(group):
                self.routes.refuse(call, [refusal])
            self.eager.refuse([refusal])

    def _unknown(self, call: Call, beside: RecordedStep | None = None) -> Recorded:
        """The recording of an unknown key, pointed at its tensors or made now; the state is as before, what came of it is noted.

        Args:
            beside: a recording of the key whose assumptions do not hold for this call.

        Raises:
            Eagerly: nothing is to be recorded, and nothing ran.
            Deferred, Refused: nothing was recorded, and the first call ran for real. `Refusal` in strict mode.
        """
        with _recording, self.lock:
            route = self.routes.by_signature.get(call.signature)
            if route is not None and not isinstance(route, RefusedRoute) and beside is None:  # another thread was faster
                return route
            leaves = named_leaves(call, self._parameters)
            if beside is None and (pointed := self.moved.unknown(call, leaves)) is not None:
                self.dead.watch(call.opaques)
                return pointed
            if (lazy := uninitialised(self.model)) is not None:
                self.eager.initialise(lazy)
            if refusals := self.keys.reasons_against(call, leaves, beside):
                self.eager.refuse(refusals)
            recorded = self._record(call, leaves, beside)
            self.routes.note_recorded(call, leaves, recorded[0])
            self.dead.watch(call.opaques)
        return recorded

    def _record(self, call: Call, leaves: Leaves, beside: RecordedStep | None) -> Recorded:
        """The recording that a first call makes or finds; where there is none it is noted why, and raised as by `_unknown`."""
        try:
            step = self.keys.step(call, leaves)
            return self.keys.record(step) if beside is None else self.keys.record_variant(step, beside)
        except Deferred as deferred:
            self.routes.note_deferred(call, leaves, deferred)
            self.eager.count_deferred(deferred)
            raise
        except Refused as refused:
            if beside is None:
                self.routes.note_refused(call, leaves, refused.refusals)
            else:
                beside.group.refusals = refused.refusals
            self.eager.count_refused(refused)
            raise
        except NotNow as unadmitted:
            self.eager.refuse([unadmitted.refusal])
        except AboveLargestBucket as too_large:
            self.routes.refuse(call, [too_large])
            self.eager.refuse([too_large])

    def run_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, because the caller asked for it, or the first call of a module around this one did."""
        return self.eager.run(args, kwargs)

    @property
    def replays(self) -> int:
        """Calls that were replayed so far."""
        with self.lock:
            return self.call_log.replays(self.routes.recordings())

    @property
    def refuses(self) -> bool:
        """Whether some calls are not recorded for good; what stood in the way of others may be over at the next one."""
        with self.lock:
            return any(isinstance(route, RefusedRoute) for route in self.routes.by_signature.values())

    def report(self, mode: str) -> CaptureReport:
        """What was recorded, replayed and refused so far, and why."""
        with self.lock:
            devices = ", ".join(sorted(map(str, self.keys.recorders))) or "no device"
            return self.call_log.report(devices, mode, self.routes.recordings())

    def record(self, example: Any, sizes: Iterable[int] | None, budget: int | str | None, *, progress: bool) -> SizesReport:
        """Record sizes ahead of serving; see `CapturedStep.record`."""
        with self.call_log.warning_after(), _recording, self.lock:
            return SizesAhead(self.keys, self.routes, self.call_log).record(example, sizes, budget, progress=progress)

    def drop_outdated(self) -> None:
        """Drop the recordings that a caller has made out of date by setting an attribute, which is no habit of the step's."""
        with _recording, self.lock:
            for entry in list(self.routes.entries.values()):
                if entry.guards.changed() is not None:
                    self.routes.discard(entry)

    def invalidate(self) -> None:
        """Drop every recording and every refusal remembered: after weights, caches or the model were replaced."""
        with _recording, self.lock:
            self.routes.clear()
            self.keys.batch = BatchRule()
