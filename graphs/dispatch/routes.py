"""Where the signatures of a module's calls lead: to a recording, or to the reasons why there is none."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from graphs.contract.arguments import Call
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.fast_path import FastPath
from graphs.dispatch.habits import Habits
from graphs.errors import Refusal
from graphs.first_call.recorded_step import RecordedStep, reference_to
from graphs.objects.cells import Difference
from graphs.pointing.blueprint import Blueprint


class Refused(NamedTuple):
    """Why the calls of a signature run eagerly, and the opaque arguments (weakly) that this holds for."""

    refusals: list[Refusal]
    opaques: list[Callable[[], Any]]

    def serves(self, call: Call) -> bool:
        """Whether it holds for the opaque arguments of a call."""
        return all(reference() is opaque for reference, opaque in zip(self.opaques, call.opaques, strict=True))


Route = tuple[RecordedStep, int] | Refused
"""Where a signature leads: a recording and the rows of the call, or the reasons why not."""


class Routes:
    """The recordings of a module and what is known of the signatures of its calls.

    Attributes:
        entries: recordings by key.
        by_signature: where each signature leads.
        last: how to recognise a call like the last one, and where that led.
        attempts: how often a signature came to no lasting recording.
        moving: positions of arguments that are elsewhere at each call, by signature.
        habits: signatures that differ at every call in one place.
        blueprints: recordings that can be pointed at other tensors, by key without the identities of opaque arguments.
    """

    def __init__(self, parameters: list[str], max_recordings: int, log: CallLog) -> None:
        self._parameters, self._limit, self._log = parameters, max_recordings, log
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
        self.habits = Habits(self._parameters, self._limit)

    def lead(self, call: Call, entry: RecordedStep, rows: int) -> None:
        """Let calls of this signature try ``entry`` first."""
        self.last = None
        self.by_signature[call.signature] = (entry, rows)

    def refuse(self, call: Call, refusals: list[Refusal]) -> None:
        """Let calls of this signature run eagerly."""
        self.last = None
        self.by_signature[call.signature] = Refused(refusals, [reference_to(opaque) for opaque in call.opaques])

    def drop(self, entry: RecordedStep) -> None:
        """Forget one recording."""
        self.last = None
        self.habits.dropped(entry)
        entry.group.variants.remove(entry)
        self.entries = {key: other for key, other in self.entries.items() if other is not entry}
        kept = self.by_signature.items()
        self.by_signature = {s: r for s, r in kept if isinstance(r, Refused) or r[0] is not entry}
        blueprint = entry.blueprint
        if blueprint is None or blueprint not in self._all_blueprints():
            self._log.dropped(entry)
        else:
            blueprint.leave(entry)

    def replace(self, entry: RecordedStep, by: RecordedStep) -> None:
        """Let all that led to a recorded step lead to another one of the same recording."""
        self.last = None
        self.habits.dropped(entry)
        by.replays, by.real_rows = entry.replays, entry.real_rows
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

    def drop_outdated(self, entry: RecordedStep, change: Difference | None) -> None:
        """Forget one recording some of whose Python values changed, and hold nothing that may be about to die."""
        blueprint = entry.blueprint
        if blueprint is not None and (not blueprint.usable or blueprint.shared.changed() is not None):
            self.discard(entry)
        elif entry in self.entries.values():
            self.drop(entry)
        if change is not None:
            entry.guards.give_up(change)

    def _all_blueprints(self) -> list[Blueprint]:
        return [blueprint for kept in self.blueprints.values() for blueprint in kept]

    def recordings(self) -> list[RecordedStep]:
        """The recordings, each with the calls that it served for whatever tensors."""
        found = [entry for entry in self.entries.values() if entry.blueprint is None]
        for blueprint in self._all_blueprints():
            steps = [blueprint.skeleton, *self.steps_of(blueprint)]
            replays, rows = sum(step.replays for step in steps), sum(step.real_rows for step in steps)
            found.append(dataclasses.replace(blueprint.skeleton, replays=replays, real_rows=rows))
        return found

    def make_room(self, limit: int) -> int:
        """How many recordings there are, once those were dropped that no object is left for, if that many are too many."""
        for blueprint in [b for b in self._all_blueprints() if not self.steps_of(b)]:
            if len(self.recordings()) < limit:
                break
            self.forget(blueprint)
        return len(self.recordings())

    def forget_the_dead(self) -> None:
        """Drop what was recorded or refused for opaque arguments that are gone, and the memory it keeps."""
        for entry in list(self.entries.values()):
            if any(reference() is None for reference in entry.opaques):
                self.drop(entry)
        kept = self.by_signature.items()
        self.by_signature = {
            s: r for s, r in kept if not isinstance(r, Refused) or all(reference() is not None for reference in r.opaques)
        }

    def habitual(self, call: Call) -> list[Refusal]:
        """Why an unknown signature is not recorded: it is other than those before in one place only, as those were in turn.

        The recordings of those are dropped.
        """
        refusals, given_up = self.habits.against(call)
        for attempt in given_up:
            entry, route = attempt.entry(), self.by_signature.get(attempt.signature)
            if entry is not None:
                for variant in list(entry.group.variants):
                    self.discard(variant)
            elif isinstance(route, Refused):
                del self.by_signature[attempt.signature]
        return refusals
