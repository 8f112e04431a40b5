"""Calls whose static tensors are elsewhere than recorded, served by the recording that there is."""

from __future__ import annotations

import time

from graphs.contract.arguments import Call, Leaves
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.key_recorder import KeyRecorder
from graphs.dispatch.replay import Outdated
from graphs.dispatch.routes import Routes
from graphs.eager_mode import forced_eager
from graphs.errors import AboveLargestBucket, MovedStaticTensor, Refusal
from graphs.events import Moved, emit
from graphs.first_call.recorded_step import RecordedStep
from graphs.first_call.verify_replay import compare_replay
from graphs.pointing.blueprint import Blueprint, anonymous
from graphs.pointing.point import Pointed, point_anew
from graphs.recording.recorder import CannotPoint

_STEPS = 16  # caches that one recording is kept pointed at in turn
_OFTEN = 8  # replays between two moves of the model's tensors, for these not to count as a habit


class MovedTensors:
    """Points recordings at the tensors of a call.

    Args:
        keys: knows how a call becomes a step.
        routes: of one captured module.
    """

    def __init__(self, keys: KeyRecorder, routes: Routes, log: CallLog) -> None:
        self._keys, self._routes, self._log = keys, routes, log

    def unknown(self, call: Call, leaves: Leaves) -> tuple[RecordedStep, int] | None:
        """The recording for a call that is known but for its opaque arguments, and the rows of the call; else None.

        Where there are buckets it is only taken among the recordings of the key: what the step makes of this number of rows is
        compared first, as it is for any recording.
        """
        if not self._routes.blueprints:
            return None
        try:
            plan = self._keys.plan(self._keys.step(call, leaves))
        except AboveLargestBucket:
            return None
        known = self._routes.blueprints.get(anonymous(plan.key, call), ())
        if plan.key in self._routes.entries:
            return None
        found = next((found for one in list(known) if (found := self._pointed(one, call, plan.real)) is not None), None)
        if found is None:
            return None
        blueprint = found.step.blueprint
        self._only(blueprint, found)
        for oldest in self._routes.steps_of(blueprint)[: 1 - _STEPS]:
            self._routes.drop(oldest)
        self._routes.entries[plan.key] = found.step
        self._routes.forget_the_dead()
        if plan.rows is not None and self._keys.config.verify != "off":
            return None
        self._routes.lead(call, found.step, plan.real)
        return found.step, plan.real

    def elsewhere(self, entry: RecordedStep, rows: int, why: Outdated | MovedStaticTensor, call: Call) -> RecordedStep | None:
        """The recorded step in the place of ``entry``, some of whose tensors moved; None where it has to be recorded anew."""
        blueprint: Blueprint | None = entry.blueprint
        if why == Outdated():
            return None
        if blueprint is None or not blueprint.usable:
            return None
        found = self._pointed(blueprint, call, rows, weights=self._routes.attempts[call.signature] <= 1)
        if found is None:
            return None
        self._routes.attempts[call.signature] += found.compared and entry.replays < _OFTEN
        self._routes.replace(entry, found.step)
        self._only(blueprint, found)
        return found.step

    def _pointed(self, blueprint: Blueprint, call: Call, rows: int, *, weights: bool = True) -> Pointed | None:
        leaves, started = self._keys.leaves(call), time.perf_counter()

        def compare(step: RecordedStep) -> Refusal | None:
            with forced_eager("first call"):
                return compare_replay(self._keys.step(call, leaves), step, rows)

        try:
            found = point_anew(blueprint, call, leaves.opaques, compare, weights=weights)
        except CannotPoint as why:
            self._forget(blueprint, why)
            return None
        if found is None or not found.step.statics.unchanged(call.tensors):
            return None
        self._log.moved += 1
        took, step = time.perf_counter() - started, found.step
        emit(Moved(step=self._log.name, key=step.key, rows=step.contract.rows, seconds=took, compared=bool(found.compared)))
        return found

    def _only(self, blueprint: Blueprint, found: Pointed) -> None:
        """Drop the other steps of a recording whose model has other tensors now."""
        for other in self._routes.steps_of(blueprint) if found.exchanged else ():
            if other is not found.step:
                self._routes.drop(other)

    def _forget(self, blueprint: Blueprint, why: CannotPoint) -> None:
        self._log.recorded_otherwise(MovedStaticTensor(str(why), operator="recording"), "the step is recorded anew")
        self._routes.forget(blueprint)
