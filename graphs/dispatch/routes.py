"""Where the signatures of a module's calls lead: to a recording, or to the reasons why there is none.

What became of a call is told here, and here alone it is decided what that says of the next call like it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graphs.contract.arguments import Call, Leaves
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.fast_path import FastPath
from graphs.dispatch.habits import Attempt, Habits
from graphs.errors import ChangingValue, MovedStaticTensor, Refusal, TooManyKeys, Unwatchable
from graphs.first_call.outcomes import Deferred
from graphs.first_call.recorded_step import RecordedStep, reference_to
from graphs.objects.cells import Difference
from graphs.pointing.blueprint import Blueprint

_MAX_DEFERRALS = 3
_SIGNATURES = 16  # signatures that are remembered for each recording that may be kept
_clock = itertools.count(1)  # tells which of two recordings was used last
_PATIENCE = 32  # eager calls before a habit of changing is looked at anew, doubled with each attempt that was in vain
_MOST_DOUBLINGS = 12
_OFTEN = 8  # replays a recording must serve before a changed value, for the change not to count as a habit


@dataclass
class Refused:
    """Why the calls of a signature run eagerly.

    Attributes:
        opaques: the opaque arguments (weakly) that this holds for.
        left: calls after which it is asked again, where what stood in the way may come to an end; None where it cannot.
    """

    refusals: list[Refusal]
    opaques: list[Callable[[], Any]]
    left: int | None = None

    def serves(self, call: Call) -> bool:
        """Whether it holds for a call, which counts as one."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                return False
        return _same(self.opaques, call)


def _weakly(call: Call) -> list[Callable[[], Any]]:
    """The opaque arguments of a call."""
    return [reference_to(opaque) for opaque in call.opaques]


def _same(opaques: list[Callable[[], Any]], call: Call) -> bool:
    """Whether the opaque arguments of a call are these: its signature holds their identity, which another one may take."""
    return all(reference() is opaque for reference, opaque in zip(opaques, call.opaques, strict=True))


Recorded = tuple[RecordedStep, int]
"""A recording, and the rows of the call."""
Route = Recorded | Refused
"""Where a signature leads: a recording, or the reasons why there is none."""


class Routes:
    """The recordings of a module and what is known of the signatures of its calls.

    Attributes:
        entries: recordings by key.
        by_signature: where each signature leads.
        last: how to recognise a call like the last one, and where that led.
        attempts: how often a signature came to no lasting recording.
        moving: positions of arguments that are elsewhere at each call, by signature.
        room: how many recordings may be kept.
        habits: signatures that differ at every call in one place.
        blueprints: recordings that can be pointed at other tensors, by key without the identities of opaque arguments.
    """

    def __init__(self, max_recordings: int, log: CallLog, *, buckets: int = 0) -> None:
        self._limit, self._log, self._buckets = max_recordings, log, buckets
        self.entries: dict[tuple[Any, ...], RecordedStep] = {}
        self.blueprints: dict[tuple[Any, ...], list[Blueprint]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        for entry in self.recordings():
            self._log.dropped(entry)
        self.entries = {}
        self.blueprints = {}
        self.by_signature: dict[tuple[Any, ...], Route] = {}
        self.last: tuple[FastPath, RecordedStep, int] | None = None
        self.attempts: Counter[tuple[Any, ...]] = Counter()
        self.moving: dict[tuple[Any, ...], frozenset[int]] = {}
        self._waits: Counter[tuple[Any, ...]] = Counter()
        self.habits = Habits(self._limit, self._buckets)
        self._initialised: dict[tuple[Any, ...], tuple[Attempt, list[Callable[[], Any]]]] = {}
        self.room = Room(self, self._limit, self._log)

    def lead(self, call: Call, entry: RecordedStep, rows: int) -> None:
        """Let calls of this signature try ``entry`` first."""
        self.last = None
        self._come_again(call)
        entry.used = next(_clock)
        self.by_signature[call.signature] = (entry, rows)

    def _come_again(self, call: Call) -> None:
        """A call is served that is like one which initialised something."""
        known = self._initialised.get(call.signature)
        if known is not None and _same(known[1], call):
            known[0].again = True

    def used(self, call: Call, route: Recorded, like_this: FastPath | None) -> None:
        """Note that a call is served by ``route``, and how to recognise the next one like it."""
        if self.by_signature.get(call.signature) is route:  # unless another thread has just dropped it
            route[0].used = next(_clock)
            self.last = (like_this, *route) if like_this is not None else None

    def refuse(self, call: Call, refusals: list[Refusal], *, for_good: bool = True) -> None:
        """Let calls of this signature run eagerly; unless ``for_good``, for so many as make another attempt in vain bearable."""
        self.last = None
        left = None if for_good else _PATIENCE << min(self._waits[call.signature], _MOST_DOUBLINGS)
        self._waits[call.signature] += left is not None
        self.by_signature[call.signature] = Refused(refusals, _weakly(call), left)

    def drop(self, entry: RecordedStep) -> None:
        """Forget one recording."""
        self.last = None
        self.habits.dropped(entry)
        entry.group.variants.remove(entry)
        self.entries = {key: other for key, other in self.entries.items() if other is not entry}
        kept = self.by_signature.items()
        self.by_signature = {s: r for s, r in kept if isinstance(r, Refused) or r[0] is not entry}
        blueprint = entry.blueprint
        if blueprint is None or blueprint not in self.all_blueprints():
            self._log.dropped(entry)
        else:
            blueprint.leave(entry)

    def replace(self, entry: RecordedStep, by: RecordedStep) -> None:
        """Let all that led to a recorded step lead to another one of the same recording."""
        self.last = None
        self.habits.dropped(entry)
        by.replays, by.real_rows, by.used = entry.replays, entry.real_rows, entry.used
        by.ahead, by.left_open = entry.ahead, entry.left_open
        self.entries = {key: by if other is entry else other for key, other in self.entries.items()}
        for signature, route in self.by_signature.items():
            if not isinstance(route, Refused) and route[0] is entry:
                self.by_signature[signature] = (by, route[1])

    def steps_of(self, blueprint: Blueprint) -> list[RecordedStep]:
        """The recorded steps of one recording, the oldest first."""
        return [entry for entry in self.entries.values() if entry.blueprint is blueprint]

    def forget(self, blueprint: Blueprint) -> None:
        """Drop a recording with all its steps."""
        self.blueprints = {key: [one for one in kept if one is not blueprint] for key, kept in self.blueprints.items()}
        for entry in self.steps_of(blueprint):
            self.drop(entry)
        self._log.dropped(blueprint.skeleton)

    def discard(self, entry: RecordedStep) -> None:
        """Forget one recording for whatever tensors it could serve."""
        if entry.blueprint is not None:
            self.forget(entry.blueprint)
        if entry in self.entries.values():
            self.drop(entry)

    def _drop_outdated(self, entry: RecordedStep, change: Difference | None) -> None:
        """Forget one recording some of whose Python values changed, and hold nothing that may be about to die."""
        blueprint = entry.blueprint
        if blueprint is not None and (not blueprint.usable or blueprint.shared.changed() is not None):
            self.discard(entry)
        elif entry in self.entries.values():
            self.drop(entry)
        if change is not None:
            entry.guards.give_up(change)

    def all_blueprints(self) -> list[Blueprint]:
        """The recordings that can be pointed at other tensors."""
        return [blueprint for kept in self.blueprints.values() for blueprint in kept]

    def recordings(self) -> list[RecordedStep]:
        """The recordings, each with the calls that it served for whatever tensors."""
        found = [entry for entry in self.entries.values() if entry.blueprint is None]
        for blueprint in self.all_blueprints():
            steps = [blueprint.skeleton, *self.steps_of(blueprint)]
            replays, rows = sum(step.replays for step in steps), sum(step.real_rows for step in steps)
            found.append(dataclasses.replace(blueprint.skeleton, replays=replays, real_rows=rows))
        return found

    def forget_the_dead(self) -> None:
        """Drop what was recorded or refused for opaque arguments that are gone, and the memory it keeps."""
        for entry in list(self.entries.values()):
            if any(reference() is None for reference in entry.opaques):
                self.drop(entry)
        kept = self.by_signature.items()
        self.by_signature = {
            s: r for s, r in kept if not isinstance(r, Refused) or all(reference() is not None for reference in r.opaques)
        }
        for signature, (_, opaques) in list(self._initialised.items()):
            if any(reference() is None for reference in opaques):
                del self._initialised[signature], self.attempts[signature], self._waits[signature]

    def habitual(self, call: Call, leaves: Leaves) -> list[Refusal]:
        """Why an unknown signature is not recorded: it is other than those before in one place only, as those were in turn.

        The recordings of those are dropped.
        """
        refusals, given_up = self.habits.against(call.signature, leaves.changeable)
        for attempt in given_up:
            entry, route = attempt.entry(), self.by_signature.get(attempt.signature)
            if entry is not None:
                for variant in list(entry.group.variants):
                    self.discard(variant)
            elif isinstance(route, Refused):
                del self.by_signature[attempt.signature]
        return refusals

    def note_recorded(self, call: Call, leaves: Leaves, entry: RecordedStep) -> None:
        """A first call ended in a recording, or in one that is known and has served other signatures of its bucket."""
        self._come_again(call)
        if not entry.replays:
            self.habits.tried(call.signature, leaves.changeable, entry)
        self.room.make(entry)

    def note_refused(self, call: Call, leaves: Leaves, refusals: list[Refusal]) -> None:
        """A first call ended in a refusal, and so would those like it."""
        self.habits.tried(call.signature, leaves.changeable, None, refusals)
        self.refuse(call, refusals)

    def note_failed(self, call: Call, refusal: Refusal) -> None:
        """A call raised on the way to a recording, and the step alone did not; what initialises itself may only do so once."""
        self.attempts[call.signature] += 1
        if self.attempts[call.signature] > 1 or not isinstance(refusal, Unwatchable):
            self.refuse(call, [refusal])

    def note_deferred(self, call: Call, leaves: Leaves, deferred: Deferred) -> None:
        """A first call was one of its kind: the next one is tried again, a few times."""
        known = self._initialised.get(call.signature)
        if known is None or not _same(known[1], call):
            if known is not None:  # the identity of an object that is gone
                del self.attempts[call.signature], self._waits[call.signature]
            why = [deferred.refusal] if deferred.refusal is not None else []
            attempt = self.habits.tried(call.signature, leaves.changeable, None, why, initialised=True)
            self._initialised[call.signature] = attempt, _weakly(call)
        self.attempts[call.signature] += 1
        if self.attempts[call.signature] > _MAX_DEFERRALS or self._waits[call.signature]:
            changing = ChangingValue(f"{deferred} changes in most calls", operator=str(deferred))
            self.refuse(call, [deferred.refusal or changing], for_good=False)

    def note_outdated(self, call: Call, entry: RecordedStep, changed: Refusal | None, change: Difference | None = None) -> None:
        """A recording froze what has changed since: it is dropped, to be made anew; what changes often is refused by name."""
        self._drop_outdated(entry, change)
        if changed is None:
            return
        self.attempts[call.signature] = self.attempts[call.signature] + 1 if entry.replays < _OFTEN else 0
        if self.attempts[call.signature] > 1:
            self.refuse(call, [changed], for_good=False)  # which this call is counted under
        else:
            self._log.recorded_otherwise(changed, "the step is recorded anew")

    def note_moved(self, call: Call, entry: RecordedStep, why: MovedStaticTensor) -> None:
        """Such arguments are elsewhere: the recording is dropped, unless another thread was faster.

        One that stayed where it was for long, a cache, is recorded at its new address; others are copied from then on.
        """
        if entry not in self.entries.values():
            return
        self._log.recorded_otherwise(why, "the step is recorded anew")
        self.discard(entry)
        if entry.replays < _OFTEN:
            moved = {index for index, _ in entry.statics.moved_arguments(call.tensors)}
            self.moving[call.signature] = self.moving.get(call.signature, frozenset()) | moved


def may_move(known: Routes, call: Call, entry: RecordedStep, static: Iterable[str]) -> bool:
    """Whether a step may be recorded anew since arguments that its recording writes in place are elsewhere.

    Args:
        static: names of the arguments that were declared to stay.
    """
    moved = entry.statics.moved_arguments(call.tensors)
    declared = any(name in static for _, name in moved)
    elsewhere = {index for index, _ in moved}
    return entry.contract.rows is None and not declared and not elsewhere <= known.moving.get(call.signature, frozenset())


class Room:
    """The number of recordings that a module may keep, and which of them goes for a new one."""

    def __init__(self, routes: Routes, limit: int, log: CallLog) -> None:
        self._routes, self._limit, self._log = routes, limit, log
        self._in_vain = 0  # recordings dropped for a variant of another key before they served a second call

    def _is_full(self) -> bool:
        """Whether there are as many recordings as may be, once those were dropped that no object is left for."""
        for blueprint in [b for b in self._routes.all_blueprints() if not self._routes.steps_of(b)]:
            if len(self._routes.recordings()) < self._limit:
                break
            self._routes.forget(blueprint)
        return len(self._routes.recordings()) >= self._limit

    def against(self, call: Call, names: Sequence[str]) -> Refusal | None:
        """Why a signature that no recording serves is not recorded now, though it could be; None where it is.

        Args:
            names: of the tensor arguments.
        """
        sizes = self._routes.habits.against_sizes(call.signature, names)
        if sizes:
            return sizes[0]
        full = self._is_full() or len(self._routes.by_signature) >= _SIGNATURES * self._limit
        in_vain = self._routes.habits.against_anything(call.signature, full=full)
        return self._too_many(f"at least {in_vain} of the last were not used again") if in_vain else None

    def against_variant(self, beside: RecordedStep) -> Refusal | None:
        """Why another recording of the key of ``beside`` is not made: there is no room, or making it was in vain too often."""
        if not self._is_full():
            return None
        if all(entry.group is beside.group for entry in self._routes.entries.values()):
            return self._too_many("all of one key")
        return self._too_many("whose places variants of other keys took in vain") if self._in_vain >= self._limit else None

    def _too_many(self, why: str) -> TooManyKeys:
        return TooManyKeys(f"{len(self._routes.recordings())} recordings (max_recordings={self._limit}), {why}", operator="key")

    def make(self, made: RecordedStep) -> None:
        """Drop what is above the limit, of what was not recorded ahead first, and there what was used least recently."""
        made.used = next(_clock)
        while self._is_full() and len(self._routes.recordings()) > self._limit:
            own = self._alike(made)
            others = [entry for entry in self._routes.entries.values() if entry.group is not made.group and entry not in own]
            if not others:
                break
            oldest = min(others, key=lambda entry: (entry.ahead, max(step.used for step in self._alike(entry))))
            self._in_vain += len(made.group.variants) > 1 and oldest.replays <= 1
            self._routes.discard(oldest)
            self._log.evicted(oldest, self._limit)
        for signature in list(self._routes.by_signature)[: -_SIGNATURES * self._limit]:
            del self._routes.by_signature[signature]

    def _alike(self, entry: RecordedStep) -> list[RecordedStep]:
        """The recorded steps of the recording of one."""
        return [entry] if entry.blueprint is None else [entry, *self._routes.steps_of(entry.blueprint)]
