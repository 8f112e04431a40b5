"""Signatures that differ at every call in one place: a number that counts on, an object or a lambda made anew.

Each would be recorded, and no recording be used again, at a hundred times the cost of an eager call. So the attempts that differ
in one place only are kept together. Once a few of them have served nobody, they are given up, and a value in that place has to
come up again before another attempt is made: twice from then on, and twice as often whenever that turns out to be in vain too.
What was recorded before and is used goes on being replayed: nothing here is asked about a signature that is known.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphs.contract.arguments import Argument
from graphs.errors import ChangingValue, Refusal
from graphs.first_call.recorded_step import RecordedStep

_FEW = 4  # attempts in vain before a value has to come up again; from then on as many as recordings are kept
_PLACES = 256


@dataclass(eq=False)
class Attempt:
    """One attempt to record a signature.

    Attributes:
        entry: the recording, weakly; gives None where there is none (any more).
        replays: calls served, once the recording is dropped.
        refusals: why there is no recording, where it was refused.
    """

    signature: tuple[Any, ...]
    entry: Callable[[], RecordedStep | None]
    replays: int = 0
    refusals: Sequence[Refusal] = ()

    @property
    def in_vain(self) -> bool:
        """Whether nobody but the call that it was made for was served."""
        entry = self.entry()
        return (self.replays if entry is None else sum(variant.replays for variant in entry.group.variants)) <= 1


@dataclass(eq=False)
class _Habit:
    """What is known of one place, everything else in the signature being equal.

    Attributes:
        most: recordings that are kept; a loop over as many layers passes once before they are used.
        needed: appearances of a value before it is recorded.
        refusals: why those with fewer are not; empty as long as one is enough.
        seen: appearances by key, and the object, weakly; the last ones.
    """

    most: int
    needed: int = 1
    refusals: list[Refusal] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    seen: OrderedDict[Any, tuple[int, Callable[[], Any]]] = field(default_factory=OrderedDict)

    def appearances(self, key: Any, argument: Argument) -> int:
        """How often a value has been in this place, this time included. Another object of the same identity is another value."""
        count, reference = self.seen.pop(key, (0, lambda: None))
        if argument.is_object and reference() is not argument.value:
            count = 0
        self.seen[key] = count + 1, _reference(argument)
        if len(self.seen) > 2 * self.most:
            self.seen.popitem(last=False)
        return count + 1

    def in_vain(self) -> list[Attempt]:
        """The attempts to give up, once there are enough of them."""
        found = [attempt for attempt in self.attempts if attempt.in_vain]
        return found if len(found) >= (_FEW if self.needed == 1 else self.most) else []


class Habits:
    """The places in which signatures of one captured module differ.

    A signature is asked about and noted together with its leaves that may have any number of values (`Leaves.changeable`).

    Args:
        most: recordings that it may keep.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._habits: OrderedDict[tuple[Any, ...], _Habit] = OrderedDict()

    def against(self, signature: tuple[Any, ...], changeable: list[Argument]) -> tuple[list[Refusal], list[Attempt]]:
        """Why not to try to record an unknown signature (empty: nothing speaks against it), and attempts to give up."""
        for argument in changeable if self._habits else ():
            habit = self._habits.get(_place(signature, argument))
            if habit is None:
                continue
            count, given_up = habit.appearances(signature[argument.place], argument), list[Attempt]()
            if count >= habit.needed:
                given_up = habit.in_vain()
                if given_up:
                    habit.needed *= 2
                    habit.attempts = [attempt for attempt in habit.attempts if attempt not in given_up]
            if count < habit.needed:
                return _why(habit, argument, given_up), given_up
        return [], []

    def tried(
        self,
        signature: tuple[Any, ...],
        changeable: list[Argument],
        entry: RecordedStep | None,
        refusals: Sequence[Refusal] = (),
    ) -> None:
        """Note an attempt to record a signature, and what came of it."""
        attempt = Attempt(signature, weakref.ref(entry) if entry is not None else lambda: None, refusals=refusals)
        for argument in changeable:
            place = _place(signature, argument)
            habit = self._habits.pop(place, None)
            if habit is None:
                habit = _Habit(max(self._most, _FEW))
                habit.appearances(signature[argument.place], argument)
            habit.attempts.append(attempt)
            self._habits[place] = habit
            if len(self._habits) > _PLACES:
                self._habits.popitem(last=False)

    def dropped(self, entry: RecordedStep) -> None:
        """Keep how many calls a recording has served that is being dropped."""
        for habit in self._habits.values():
            for attempt in habit.attempts:
                if attempt.entry() is entry:
                    attempt.replays = sum(variant.replays for variant in entry.group.variants)
                    attempt.entry = lambda: None


def _place(signature: tuple[Any, ...], argument: Argument) -> tuple[Any, ...]:
    index = argument.place
    return index, signature[:index], signature[index + 1 :]


def _reference(argument: Argument) -> Callable[[], Any]:
    try:
        return weakref.ref(argument.value) if argument.is_object else lambda: None
    except TypeError:  # of a type that cannot be referred to weakly: it is never recognised
        return lambda: None


def _why(habit: _Habit, argument: Argument, given_up: list[Attempt]) -> list[Refusal]:
    """The reason for the calls of a place. Where nothing could be recorded anyway, it is why that is."""
    if given_up and all(attempt.refusals for attempt in given_up):
        habit.refusals = list(given_up[-1].refusals)
    elif given_up:
        what = f"a {type(argument.value).__name__} made anew" if argument.is_object else "another value"
        detail = f"the argument was {what} in each of {len(given_up)} recordings, and none of them was used again"
        remedy = (
            "make the object once and pass it again, or pass the tensors that it holds"
            if argument.is_object
            else "pass a tensor: its value is refreshed at each call"
        )
        habit.refusals = [ChangingValue(detail, operator=argument.name, remedy=remedy)]
    return habit.refusals
