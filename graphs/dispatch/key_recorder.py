"""Recording a key of one module: from a call to the step, its size, and the first call."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch

from graphs.config import CaptureConfig
from graphs.contract.arguments import Call, Leaves, flatten_call, named_leaves
from graphs.contract.batch import BatchRule, Plan
from graphs.contract.eligibility import carries_objects, device_of, host_arguments, inadmissible
from graphs.contract.settings import ambient_of
from graphs.dispatch.ahead.budget import spent
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.replay import stale
from graphs.dispatch.routes import Recorded, Routes
from graphs.eager_mode import forced_eager
from graphs.errors import ConfigError, Refusal, RowsInteract
from graphs.events import Recorded as RecordedEvent
from graphs.events import emit
from graphs.events.ranges import recording_range
from graphs.first_call.host_arguments import record_key_on_device
from graphs.first_call.padding_proof import compare_padded, prove_left_open
from graphs.first_call.record_key import record_key
from graphs.first_call.recorded_step import RecordedStep
from graphs.first_call.verify_replay import compare_replay
from graphs.pointing.blueprint import anonymous, blueprint_of
from graphs.recording.choose import recorder_for
from graphs.recording.recorder import Recorder
from graphs.rehearsal.step import Step
from passes.forked_process import put_back_by

_OBJECTS = 100_000  # that are made between two looks of the garbage collector during a first call
_KNOWN = 8  # steps that a further size is compared with


class NotNow(Exception):
    """A call is not recorded this time, though it could be; nothing ran."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class KeyRecorder:
    """Makes the recordings of one module.

    Attributes:
        config: settings of the capture.
        memory_budget: bytes that recordings may take, or None.
        recorders: by device.
        batch: the batch dimension, as far as it is known.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: CaptureConfig,
        name: str,
        parameters: list[str],
        routes: Routes,
        log: CallLog,
    ) -> None:
        self._model, self.config, self._name = model, config, name
        self._parameters, self._routes, self._log = parameters, routes, log
        self.memory_budget = config.memory_budget
        self.recorders: dict[torch.device, Recorder] = {}
        self.batch = BatchRule()
        self._merged: dict[tuple[str, CodeType], frozenset[tuple[int, int]]] = {}

    def reasons_against(self, call: Call, leaves: Leaves, beside: RecordedStep | None = None) -> list[Refusal]:
        """Why a call is not recorded, as far as that can be said before anything runs.

        Args:
            beside: a recording of the key that assumes what does not hold for this call.
        """
        routes = self._routes
        habitual = routes.habitual(call, leaves) if beside is None else []
        if habitual:
            return habitual
        routes.forget_the_dead()
        host = self._host(call)
        full = (
            routes.room.against_variant(beside) or spent(self.memory_budget, routes.recordings()) if beside is not None else None
        )
        refusal = full or inadmissible(call, self._model, host) or carries_objects(call)
        return [refusal] if refusal is not None else []

    def record(self, step: Step, *, ahead: bool = False) -> Recorded:
        """The recording for a call: an existing one of its bucket, or a new one. State is as before the call.

        Args:
            ahead: whether there is no such call yet, and the recording was asked for.

        Raises:
            NotNow: it could be recorded, and is not; nothing ran.
            Deferred, Refused: see `record_key`.
        """
        config, routes, call = self.config, self._routes, step.call
        plan = self.plan(step)
        if not ahead and plan.key not in routes.entries:
            against = spent(self.memory_budget, routes.recordings()) or routes.room.against(call, step.names)
            if against is not None:
                raise NotNow(against)
        while True:
            entry = routes.entries.get(plan.key)
            step.rows, step.batch_dims, step.real = plan.rows, plan.dims, plan.real
            try:
                if entry is None:
                    entry = routes.entries[plan.key] = self._first_call(step)
                    entry.group.unmerged = step.unmerged
                    self._describe(entry, step, plan)
                elif plan.rows is not None and config.verify != "off":
                    if stale(entry, call) is not None:  # what it makes of these rows cannot be compared with the call any more
                        routes.discard(entry)
                        continue
                    entry.point()
                    with forced_eager("first call"):
                        prove_left_open(step, entry)
                        compare_padded(step, entry, plan.real)
            except RowsInteract as reason:
                self._log.recorded_otherwise(reason, "the step is recorded at its exact sizes")
                plan = self.batch.reject(plan, call, for_good=entry is not None or not reason.unproved)
                if entry is not None and entry.left_open:
                    routes.discard(entry)
                continue
            routes.by_signature[call.signature] = (entry, plan.real)
            return entry, plan.real

    def plan(self, step: Step) -> Plan:
        """Where a call goes.

        Raises:
            AboveLargestBucket: it fits no bucket.
        """
        return self.batch.plan(step.call, step.names, self.config.buckets, self.config.batch_dims)

    def _describe(self, entry: RecordedStep, step: Step, plan: Plan) -> None:
        """Keep what another call has to look like for this recording to be pointed at its tensors."""
        entry.blueprint = blueprint_of(entry, step.call, step.opaque_names)
        if entry.blueprint is not None:
            self._routes.blueprints.setdefault(anonymous(plan.key, step.call), []).append(entry.blueprint)

    def record_variant(self, step: Step, beside: RecordedStep) -> Recorded:
        """A recording of a call at its exact sizes, for other outcomes than those of ``beside``."""
        call = step.call
        step.unmerged = beside.group.unmerged
        entry = self._first_call(step)
        entry.group = beside.group
        entry.group.variants.insert(0, entry)
        self._routes.entries[(call.signature, "variant", id(entry))] = entry
        self._routes.lead(call, entry, 1)
        return entry, 1

    def flattened(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Leaves]:
        """A call with these arguments, made in the modes of now."""
        call = flatten_call(args, kwargs, ambient_of(self._model))
        return call, named_leaves(call, self._parameters)

    def verify(self, entry: RecordedStep, rows: int, call: Call) -> None:
        """Compare a replay with an eager run, both undone; a recording that differs is dropped.

        Raises:
            VerifyMismatch: it does.
        """
        step = self.step(call, self.leaves(call))
        with forced_eager("first call"):
            mismatch = compare_replay(step, entry, rows)
        if mismatch is not None:
            self._routes.discard(entry)
            raise mismatch

    def _first_call(self, step: Step) -> RecordedStep:
        owned, check = self.config.outputs == "owned", self.config.verify != "off"
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()  # a cast weight in the cache would be recorded in place of its cast
        torch.set_autocast_cache_enabled(False)
        try:
            marked = recording_range(self._name, step.shapes(step.call.tensors), step.rows, self.config.ranges)
            with marked, _seldom_collected(), forced_eager("first call"):  # a captured module in this one is a part of it
                recorder = self._recorder(step.device)
                record = record_key_on_device if step.host else functools.partial(record_key, known=self._tried())
                entry = record(step, recorder, owned=owned, check=check)
        finally:
            torch.set_autocast_cache_enabled(cached)
        if entry.not_compiled is not None:
            self._log.recorded_otherwise(entry.not_compiled, "the step is recorded uncompiled")
        seconds, size = entry.capture_seconds, entry.recording.pool_bytes
        emit(RecordedEvent(step=self._name, key=entry.key, rows=entry.contract.rows, seconds=seconds, bytes=size))
        return entry

    def leaves(self, call: Call) -> Leaves:
        """The leaves of a call by name."""
        return named_leaves(call, self._parameters)

    def _tried(self) -> list[RecordedStep]:
        """The recordings in use of the steps that were tried last."""
        entries = [entry for entry in self._routes.entries.values() if entry.tried is not None]
        last = [*{id(entry.tried): None for entry in entries}][-_KNOWN:]
        return [entry for entry in entries if id(entry.tried) in last]

    def step(self, call: Call, leaves: Leaves) -> Step:
        """A call as what its first call sees of it.

        Raises:
            ConfigError: a setting names an argument that is not there.
        """
        config, names = self.config, leaves.tensors
        for setting, given in (("static", config.static), ("padding", config.padding), ("batch_dims", config.batch_dims or ())):
            for name in given:
                if name not in names and name.split(".")[0] not in self._parameters:
                    raise ConfigError(setting, name, names)
        return Step(
            model=self._model,
            call=call,
            args=call.args,
            kwargs=call.kwargs,
            names=names,
            opaque_names=leaves.opaques,
            static=tuple(i for i, name in enumerate(names) if name in config.static),
            padding=dict(config.padding),
            device=device_of(call, self._model),
            moving=self._routes.moving.get(call.signature, frozenset()),
            host=self._host(call),
            compiler=config.compiler,
            compiler_options=config.compiler_options,
            passes=config.passes,
            bounds=config.bounds,
            merged=self._merged,
        )

    def _recorder(self, device: torch.device) -> Recorder:
        recorders = self.recorders
        if device not in recorders:
            recorders[device] = recorder_for(device)
        return recorders[device]

    def _host(self, call: Call) -> tuple[int, ...]:
        """Positions of host tensors that a recording takes in; with buckets, which would have to pad them, none."""
        return host_arguments(call) if self.config.buckets is None else ()


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Have the garbage collector look less often: a first call makes objects enough to have it look at all of torch and
    transformers several times, for a third of the time that it takes. Freezing them would hide them from `gc.get_referrers`.
    """
    before = gc.get_threshold()
    with put_back_by(lambda: gc.set_threshold(*before)):
        if before[0]:
            gc.set_threshold(max(before[0], _OBJECTS), *before[1:])
        yield
