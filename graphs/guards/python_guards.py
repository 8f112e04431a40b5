"""Guards: Python values that a recording froze, compared with the present at every call.

A guard belongs to one container or value and knows what it held. `Guards` asks them all in the cheapest way there is.
Dictionaries are watched for writes where Python allows it (`dict_watch`), so that they are looked at only after somebody
wrote to one of them; everything else (lists, closures, slots, buffers, globals of the user's modules, which every loop at
module level writes) is compared in one generated expression.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphs.guards.container_guards import MappingGuard, NamesGuard, SequenceGuard
from graphs.guards.guard import Guard
from graphs.guards.identity import numbers_held, times_held
from graphs.guards.portrait import Portrait
from graphs.guards.traversal import Scope
from graphs.guards.value_guards import Changed, TypeGuard
from graphs.objects.cells import Difference
from graphs.objects.dict_watch import shared_watch

_REBUILDS = 4  # of the expression: objects made anew at each call are compared one by one after that
_SOURCE = """
def all_hold():
    try:
        return {conditions}
    except Exception:
        return False
"""


@dataclass
class About:
    """What guards are about, for whoever exchanges tensors or arguments under a recording.

    Attributes:
        subjects: identity and path of the object that a guard belongs to, by the identity of the guard.
        scope: what the functions of the step look up.
        view: the opaque arguments as they were recorded; None where they cannot be described.
        own: identities of the objects that only they lead to.
        reached: identities of all others that the step can look at.
    """

    subjects: dict[int, tuple[int, str]]
    scope: Scope
    view: Portrait | None = None
    own: frozenset[int] = frozenset()
    reached: frozenset[int] = frozenset()


class Guards:
    """The guards of one recording.

    Args:
        watched: of dictionaries that are rarely written, if ever, and what is compared when one of them was.
        polled: all others.
        about: None where nothing is to be exchanged.
        beside: further guards, which other recordings have as well.
    """

    def __init__(
        self, watched: Sequence[Guard], polled: Sequence[Guard], about: About | None = None, beside: Guards | None = None
    ) -> None:
        self._watch = shared_watch()
        self._watched, self._polled = list(watched), list(polled)
        self.about, self._beside = about, beside
        if self._watch is None:
            once = [guard for guard in self._watched if not isinstance(guard, TypeGuard)]  # of libraries: too many to ask
            self._watched, self._polled = [], [*once, *self._polled]
        self._begin()

    def _begin(self) -> None:
        """Compare with what the guards hold now."""
        for guard in self._watched:
            if isinstance(guard, (MappingGuard, NamesGuard)) and isinstance(guard.mapping, dict) and self._watch is not None:
                self._watch.watch(guard.mapping)
        self._seen = self._watch.changes() if self._watch is not None else 0
        self._all_hold: Callable[[], bool] = self._built
        self._rebuilds = 0

    def _built(self) -> bool:
        """Make the expression, for the first call that needs it."""
        self._all_hold = _expression(self._polled)
        return self._all_hold()

    def changed(self) -> Difference | None:
        """The first value that is not the recorded one. Runs at every call."""
        found = self._difference()
        return found if found is not None or self._beside is None else self._beside.changed()

    def give_up(self, found: Difference) -> None:
        """Hold nothing any more: what was compared may be about to die, and the step to look whether it did."""
        self._watched, self._polled, self._all_hold, self._watch = [], [Changed(found)], bool, None
        self.about = None
        if self._beside is not None and self._beside.changed() is not None:
            self._beside.give_up(found)

    def exchanged(self) -> list[tuple[Any, Any]] | None:
        """What stands in the place of other values in containers, each with what was there; None where something else changed."""
        found: list[tuple[Any, Any]] = []
        for guard in (*self._watched, *self._polled):
            if guard.difference() is None:
                continue
            pairs = guard.exchanged() if isinstance(guard, (MappingGuard, SequenceGuard)) else None
            if pairs is None:
                return None
            found += pairs
        return found

    def adopt(self, present: Mapping[int, Any], made: Callable[[str, Any, Scope], Sequence[Guard]]) -> None:
        """Take what stands in containers now for what was there.

        Args:
            present: what stands there, by the identity of what did.
            made: the guards of an object by its path.
        """
        about = self.about
        if about is None:
            return
        gone = {identity: path for identity, path in about.subjects.values() if identity in present}
        for guard in (*self._watched, *self._polled):
            if isinstance(guard, (MappingGuard, SequenceGuard)) and guard.difference() is not None:
                guard.adopt()
        self._watched = self._without(self._watched, frozenset(gone))
        self._polled = self._without(self._polled, frozenset(gone))
        about.subjects = self._subjects_of(self._watched, self._polled)
        about.reached = (about.reached - present.keys()) | {id(value) for value in present.values()}
        for identity, path in gone.items():
            new = list(made(path, present[identity], about.scope))
            about.subjects.update((id(guard), (id(present[identity]), path)) for guard in new)
            self._polled += new
        self._begin()

    def shared(self) -> Guards:
        """The guards of what does not hang on the opaque arguments alone."""
        about = self.about
        if about is None or not about.own:
            return self
        kept = self._without(self._watched, about.own), self._without(self._polled, about.own)
        return Guards(*kept, About(self._subjects_of(*kept), about.scope, reached=about.reached))

    def numbers(self) -> frozenset[int]:
        """Whole numbers that stand where the guards look, and may be made of objects."""
        return numbers_held((*self._watched, *self._polled))

    def times(self, wanted: Iterable[int]) -> Counter[int]:
        """How often objects, by identity, stand where the guards look."""
        return times_held((*self._watched, *self._polled), wanted)

    def _subjects_of(self, *guards: Sequence[Guard]) -> dict[int, tuple[int, str]]:
        """What the guards that are left are about: an identity may be another guard's once one is gone."""
        assert self.about is not None
        known = self.about.subjects
        return {id(guard): known[id(guard)] for part in guards for guard in part if id(guard) in known}

    def _without(self, guards: Sequence[Guard], subjects: frozenset[int]) -> list[Guard]:
        assert self.about is not None
        known = self.about.subjects
        return [guard for guard in guards if id(guard) not in known or known[id(guard)][0] not in subjects]

    def _difference(self) -> Difference | None:
        watch = self._watch
        if watch is not None:
            changes = watch.changes()
            if changes != self._seen:
                found = _first(self._watched)
                if found is not None:
                    return found
                self._seen = changes
        if self._all_hold():
            return None
        found = _first(self._polled)
        if found is None and self._rebuilds < _REBUILDS:  # equal, and another object: compared by identity from now on
            self._rebuilds += 1
            self._all_hold = _expression(self._polled)
        return found

    def __len__(self) -> int:
        return len(self._watched) + len(self._polled)


def _first(guards: Sequence[Guard]) -> Difference | None:
    return next((found for guard in guards if (found := guard.difference()) is not None), None)


def _expression(guards: Sequence[Guard]) -> Callable[[], bool]:
    """One function that tells whether all conditions of all guards are true."""
    objects: dict[str, Any] = {}
    names: dict[int, str] = {}

    def bind(value: Any) -> str:
        if value is None or value is True or value is False:
            return repr(value)
        name = names.setdefault(id(value), f"o{len(names)}")
        objects[name] = value
        return name

    conditions = [condition for guard in guards for condition in guard.conditions(bind)]
    exec(_SOURCE.format(conditions="\n            and ".join(["(True", *conditions]) + ")"), objects)
    check: Callable[[], bool] = objects.pop("all_hold")  # else the two hold each other
    return check
