"""Guards: Python values that a recording froze, compared with the present at every call.

A guard belongs to one container or value and knows what it held. `Guards` asks them all in the cheapest way there is.
Dictionaries are watched for writes where Python allows it (`dict_watch`), so that they are looked at only after somebody
wrote to one of them; everything else (lists, closures, slots, buffers, globals of the user's modules, which every loop at
module level writes) is compared in one generated expression.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import types
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
from graphs.objects.cells import ABSENT, Difference
from graphs.objects.dict_watch import shared_watch
from graphs.python_reads.code_reads import CodeReads

_ONE_BY_ONE = 3  # calls in which the guards are asked themselves
_REBUILDS = 4  # of the expression: objects made anew at each call are compared one by one after that
_VALUES, _CALL = operator.methodcaller("values"), operator.methodcaller("__call__")
_SOURCE = """
def all_hold():
    try:
        return {conditions}
    except Exception:
        return False
"""


@dataclass(frozen=True)
class Look:
    """What a look at another call may rely on where the guards of an earlier look still hold.

    Attributes:
        reads: what the run asked for that the look was made for.
        objects: what the guards are about, by identity; each is asked for, since not all of them are held.
        placed: identities of the tensors whose layout no guard compares, since it was checked elsewhere.
    """

    reads: CodeReads
    objects: Mapping[int, Callable[[], Any]]
    placed: frozenset[int]

    def seen(self) -> set[int]:
        """Identities of the objects that are still there, which need not be looked at again."""
        return {identity for identity, asked in self.objects.items() if id(asked()) == identity}


@dataclass
class About:
    """What guards are about, for whoever exchanges tensors or arguments under a recording.

    Attributes:
        subjects: identity and path of the object that a guard belongs to, by the identity of the guard.
        scope: what the functions of the step look up.
        view: the opaque arguments as they were recorded; None where they cannot be described.
        own: identities of the objects that only they lead to.
        reached: identities of all others that the step can look at.
        look: for looks at other calls; None where these may not rely on it.
    """

    subjects: dict[int, tuple[int, str]]
    scope: Scope
    view: Portrait | None = None
    own: frozenset[int] = frozenset()
    reached: frozenset[int] = frozenset()
    look: Look | None = None


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
        self._all_hold: Callable[[], bool] = self._one_by_one
        self._rebuilds = 0
        self._asked = 0
        self._untouched: Untouched | None = None
        self._scans = 0

    def _one_by_one(self) -> bool:
        """Ask the guards themselves in the first calls: to make an expression takes longer, and a cache may serve few."""
        self._asked += 1
        if self._asked <= _ONE_BY_ONE:
            return _first(self._polled) is None
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

    def serving(self, reads: CodeReads) -> Guards | None:
        """Of these guards those that a look need not make again which is made for another run; None where it has to.

        They have to hold: then what they are about is what it was, and leads to where it led.
        """
        about = self.about
        if about is not None and about.look is not None and about.look.reads.covers(reads):
            return self if self.changed() is None else None
        return self._beside.serving(reads) if self._beside is not None else None

    def leaves_out_of(self, placed: frozenset[int]) -> bool:
        """Whether the layout of every tensor that no guard compares here is that of one of ``placed``."""
        look = self.about.look if self.about is not None else None
        return look is not None and look.placed <= placed

    def all(self) -> list[Guard]:
        """Every guard, with those beside."""
        return [*self._watched, *self._polled, *(self._beside.all() if self._beside is not None else ())]

    def exchanged(self) -> list[tuple[Any, Any]] | None:
        """What stands in the place of other values in containers, each with what was there; None where something else changed."""
        found: list[tuple[Any, Any]] = []
        for guard in self.all():
            if guard.difference() is None:
                continue
            pairs = guard.exchanged() if isinstance(guard, (MappingGuard, SequenceGuard)) else None
            if pairs is None:
                return None
            found += pairs
        return found

    def adopted(self, present: Mapping[int, Any], made: Callable[[str, Any, Scope], Sequence[Guard]]) -> Guards:
        """The same guards with what stands in containers now taken for what was there. Other recordings may have these as well.

        Args:
            present: what stands there, by the identity of what did.
            made: the guards of an object by its path.
        """
        about = self.about
        if about is None:
            return self
        gone = {identity: path for identity, path in about.subjects.values() if identity in present}
        subjects: dict[int, tuple[int, str]] = {}

        def taken(guards: Sequence[Guard]) -> list[Guard]:
            kept = self._without(guards, frozenset(gone))
            adopted = [_adopted(guard) for guard in kept]
            known = about.subjects
            subjects.update({id(new): known[id(old)] for old, new in zip(kept, adopted, strict=True) if id(old) in known})
            return adopted

        watched, polled = taken(self._watched), taken(self._polled)
        for identity, path in gone.items():
            new = list(made(path, present[identity], about.scope))
            subjects.update((id(guard), (id(present[identity]), path)) for guard in new)
            polled += new
        beside = self._beside.adopted(present, made) if self._beside is not None else None
        reached = (about.reached - present.keys()) | {id(value) for value in present.values()}
        return Guards(watched, polled, About(subjects, about.scope, reached=reached), beside)

    def shared(self) -> Guards:
        """The guards of what does not hang on the opaque arguments alone."""
        about = self.about
        if about is None:
            return self
        kept = self._without(self._watched, about.own), self._without(self._polled, about.own)
        if self._beside is not None and not any(kept) and self._beside.about is not None:
            if about.reached <= self._beside.about.reached:
                return self._beside
        elif not about.own:
            return self
        return Guards(*kept, About(self._subjects_of(*kept), about.scope, reached=about.reached), self._beside)

    def numbers(self) -> frozenset[int]:
        """Whole numbers that stand where the guards look, and may be made of objects."""
        return self._numbers | (self._beside.numbers() if self._beside is not None else frozenset())

    @functools.cached_property
    def _numbers(self) -> frozenset[int]:
        return numbers_held((*self._watched, *self._polled))  # of as many sizes as share the guards, once

    def times(self, wanted: Iterable[int]) -> Counter[int]:
        """How often objects, by identity, stand where the guards look."""
        return times_held(self.all(), wanted)

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
                found = self._written()
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

    def _written(self) -> Difference | None:
        """The first difference in what is watched, looked at once any dictionary of the process's was written."""
        if self._untouched is None and self._scans <= _REBUILDS:
            self._untouched, self._scans = Untouched(self._watched), self._scans + 1
        if self._untouched is not None and self._untouched.holds():
            return _first(self._untouched.rest)
        self._untouched = None
        return _first(self._watched)

    def __len__(self) -> int:
        return len(self.all())


class Untouched:
    """Tells whether the containers of many guards hold the very objects that they did, in a few comparisons that run in C.

    Attributes:
        rest: the guards that it does not answer for.
    """

    def __init__(self, guards: Sequence[Guard]) -> None:
        whole = [guard for guard in guards if type(guard) is MappingGuard and guard.is_plain and not guard.by_name]
        named = [guard for guard in guards if type(guard) is MappingGuard and guard.is_plain and guard.by_name]
        names = [guard for guard in guards if type(guard) is NamesGuard]
        types_ = [guard for guard in guards if type(guard) is TypeGuard]
        answered = {id(guard) for part in (whole, named, names, types_) for guard in part}
        self.rest = [guard for guard in guards if id(guard) not in answered]
        self._whole = [guard.mapping for guard in whole if guard.entries]  # most are the hooks of modules, and empty
        self._keys = [key for guard in whole for key, _ in guard.entries]
        self._values = [value for guard in whole for _, value in guard.entries]
        self._sized = [guard.mapping for guard in (*whole, *named)]
        self._lengths = [guard.length for guard in (*whole, *named)]
        looked_up = [(guard.mapping, key, value) for guard in named for key, value in guard.entries]
        looked_up += [(guard.mapping, key, value) for guard in names for key, value in guard.entries]
        looked_up += [(guard.mapping, name, ABSENT) for guard in names for name in guard.missing]
        self._looked_up = [list(part) for part in zip(*looked_up, strict=True)] or [[], [], []]
        self._others = [(guard.mapping, guard.others) for guard in named if guard.others]
        self._objects, self._kinds = [guard.read for guard in types_], [guard.kind for guard in types_]

    def holds(self) -> bool:
        """Whether nothing was exchanged, added or removed since it was made."""
        mappings, keys, values = self._looked_up
        return (
            list(map(len, self._sized)) == self._lengths
            and all(map(operator.is_, itertools.chain.from_iterable(self._whole), self._keys))
            and all(map(operator.is_, itertools.chain.from_iterable(map(_VALUES, self._whole)), self._values))
            and all(map(operator.is_, map(dict.get, mappings, keys, itertools.repeat(ABSENT)), values))
            and all(mapping.keys() >= others for mapping, others in self._others)
            and all(map(operator.is_, map(type, map(_CALL, self._objects)), self._kinds))
        )


def _adopted(guard: Guard) -> Guard:
    """A guard of what it is about as that is now."""
    if not isinstance(guard, (MappingGuard, SequenceGuard)) or guard.difference() is None:
        return guard
    adopted = copy.copy(guard)
    adopted.adopt()
    return adopted


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
    exec(_compiled("\n            and ".join(["(True", *conditions]) + ")"), objects)
    check: Callable[[], bool] = objects.pop("all_hold")  # else the two hold each other
    return check


@functools.lru_cache(maxsize=64)
def _compiled(conditions: str) -> types.CodeType:
    """The code of an expression; objects of one form have the same, so that it is compiled for the first of them."""
    return compile(_SOURCE.format(conditions=conditions), "<guards>", "exec")
