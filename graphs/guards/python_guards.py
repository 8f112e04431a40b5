"""Guards: Python values that a recording froze, compared with the present at every call.

A guard belongs to one container or value and knows what it held. `Guards` asks them all in the cheapest way there is.
Dictionaries are watched for writes where Python allows it (`dict_watch`), so that they are looked at only after somebody
wrote to one of them; everything else (lists, closures, slots, buffers, globals of the user's modules, which every loop at
module level writes) is compared in one generated expression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphs.guards.container_guards import MappingGuard, NamesGuard
from graphs.guards.guard import Guard
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


class Guards:
    """The guards of one recording.

    Args:
        watched: of dictionaries that are rarely written, if ever, and what is compared when one of them was.
        polled: all others.
    """

    def __init__(self, watched: Sequence[Guard], polled: Sequence[Guard]) -> None:
        self._watch = shared_watch()
        self._watched, self._polled = list(watched), list(polled)
        if self._watch is None:
            once = [guard for guard in self._watched if not isinstance(guard, TypeGuard)]  # of libraries: too many to ask
            self._watched, self._polled = [], [*once, *self._polled]
        for guard in self._watched:
            if isinstance(guard, (MappingGuard, NamesGuard)) and isinstance(guard.mapping, dict) and self._watch is not None:
                self._watch.watch(guard.mapping)
        self._seen = self._watch.changes() if self._watch is not None else 0
        self._all_hold = _expression(self._polled)
        self._rebuilds = 0

    def changed(self) -> Difference | None:
        """The first value that is not the recorded one. Runs at every call.

        Once there is one, nothing is held any more: what was compared may be about to die, and the step to look whether it did.
        """
        found = self._difference()
        if found is not None:
            self._watched, self._polled, self._all_hold, self._watch = [], [Changed(found)], bool, None
        return found

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
