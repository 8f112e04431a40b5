"""Signatures that differ at every call in one place: a number that counts on, an object or a lambda made anew.

Each would be recorded, and no recording be used again, at a hundred times the cost of an eager call. So the attempts that differ
in one place only are kept together. Once a few of them have served nobody, they are given up, and a value in that place has to
come up again before another attempt is made: twice from then on, and twice as often whenever that turns out to be in vain too.
What was recorded before and is used goes on being replayed: nothing here is asked about a signature that is known.

Sizes of tensors are a place like these, all of them together: a length that grows at each call. More attempts are waited for,
since programs call a step once at each size ahead of serving, and for the same reason no recording is given up: new sizes run
eagerly until they come up again. Signatures that differ in several places are held against one another only where a new recording
would cost the life of another.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphs.contract.arguments import Argument
from graphs.contract.batch import split_sizes
from graphs.errors import ChangingValue, Refusal
from graphs.first_call.recorded_step import RecordedStep

_FEW = 4  # attempts in vain before a value has to come up again; from then on as many as recordings are kept
_FEW_SIZES = 16  # the same for sizes
_PLACES = 256
_ANYWHERE = ("anywhere",)  # the place of signatures that need not have anything in common


@dataclass(eq=False)
class Attempt:
    """One attempt to record a signature.

    Attributes:
        entry: the recording, weakly; gives None where there is none (any more).
        replays: calls served, once the recording is dropped.
        refusals: why there is no recording, where it was refused.
        initialised: whether the call initialised something, so that it is left to the next one like it to be recorded.
        again: whether one like it was served since.
    """

    signature: tuple[Any, ...]
    entry: Callable[[], RecordedStep | None]
    replays: int = 0
    refusals: Sequence[Refusal] = ()
    initialised: bool = False
    again: bool = False

    @property
    def in_vain(self) -> bool:
        """Whether nobody but the call that it was made for was served."""
        if self.initialised:
            return not self.again
        entry = self.entry()
        return (self.replays if entry is None else sum(variant.replays for variant in entry.group.variants)) <= 1


@dataclass(eq=False)
class _Habit:
    """What is known of one place, everything else in the signature being equal.

    Attributes:
        most: recordings that are kept; a loop over as many layers passes once before they are used.
        few: attempts in vain before a value has to come up again.
        needed: appearances of a value before it is recorded.
        refusals: why those with fewer are not; empty as long as one is enough.
        seen: appearances by key, and the object, weakly; the last ones.
    """

    most: int
    few: int = _FEW
    needed: int = 1
    refusals: list[Refusal] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    seen: OrderedDict[Any, tuple[int, Callable[[], Any]]] = field(default_factory=OrderedDict)

    def appearances(self, key: Any, argument: Argument | None = None) -> int:
        """How often a value has been in this place, this time included. Another object of the same identity is another value."""
        count, reference = self.seen.pop(key, (0, lambda: None))
        if argument is not None and argument.is_object and reference() is not argument.value:
            count = 0
        self.seen[key] = count + 1, _reference(argument)
        if len(self.seen) > 2 * self.most:
            self.seen.popitem(last=False)
        return count + 1

    def in_vain(self) -> list[Attempt]:
        """The attempts to give up, once there are enough of them."""
        found = [attempt for attempt in self.attempts if attempt.in_vain]
        recorded = sum(not attempt.initialised or bool(attempt.refusals) for attempt in found)  # the others' turn may well come
        few = min(self.few, self.most) if self.needed == 1 else self.most
        return found if recorded >= few or len(found) >= self.most else []

    def asked(self, count: int) -> tuple[bool, list[Attempt]]:
        """Whether a value that has come up ``count`` times is to be recorded, and the attempts to give up."""
        given_up = self.in_vain() if count >= self.needed else []
        if given_up:
            self.needed *= 2
            self.attempts = [attempt for attempt in self.attempts if attempt not in given_up]
        return count >= self.needed, given_up


class Habits:
    """The places in which signatures of one captured module differ.

    A signature is asked about and noted together with its leaves that may have any number of values (`Leaves.changeable`).

    Args:
        most: recordings that it may keep.
        buckets: how many there are: as many more sizes may each come once.
    """

    def __init__(self, most: int, buckets: int = 0) -> None:
        self._most, self._few_sizes = most, _FEW_SIZES + buckets
        self._habits: OrderedDict[tuple[Any, ...], _Habit] = OrderedDict()

    def against(self, signature: tuple[Any, ...], changeable: list[Argument]) -> tuple[list[Refusal], list[Attempt]]:
        """Why not to try to record an unknown signature (empty: nothing speaks against it), and attempts to give up."""
        for argument in changeable if self._habits else ():
            habit = self._habits.get(_place(signature, argument))
            if habit is None:
                continue
            recorded, given_up = habit.asked(habit.appearances(signature[argument.place], argument))
            if not recorded:
                return _why(habit, argument, given_up), given_up
        return [], []

    def against_sizes(self, signature: tuple[Any, ...], names: Sequence[str]) -> list[Refusal]:
        """Why not to record a signature whose tensors, called ``names``, have sizes that were not there before."""
        habit = self._habits.get(_place_of_sizes(signature))
        if habit is None:
            return []
        recorded, given_up = habit.asked(habit.appearances(signature))
        if given_up:
            habit.refusals = _why_sizes([*given_up, Attempt(signature, lambda: None)], names)
        return [] if recorded else habit.refusals

    def against_anything(self, signature: tuple[Any, ...], *, full: bool) -> int:
        """Attempts in vain that speak against an unknown signature, whatever it is: 0 for none.

        Args:
            full: whether another recording is dropped for it; else the signature is only counted.
        """
        habit = self._habits.get(_ANYWHERE)
        if habit is None:
            return 0
        count = habit.appearances(signature)
        return 0 if not full or habit.asked(count)[0] else habit.few

    def tried(
        self,
        signature: tuple[Any, ...],
        changeable: list[Argument],
        entry: RecordedStep | None,
        refusals: Sequence[Refusal] = (),
        *,
        initialised: bool = False,
    ) -> Attempt:
        """Note an attempt to record a signature, and what came of it."""
        made = weakref.ref(entry) if entry is not None else lambda: None
        attempt = Attempt(signature, made, refusals=refusals, initialised=initialised)
        for argument in changeable:
            self._note(attempt, _place(signature, argument), signature[argument.place], argument)
        self._note(attempt, _place_of_sizes(signature), signature, few=self._few_sizes)
        self._note(attempt, _ANYWHERE, signature)
        return attempt

    def _note(
        self, attempt: Attempt, place: tuple[Any, ...], value: Any, argument: Argument | None = None, few: int = _FEW
    ) -> None:
        habit = self._habits.pop(place, None)
        if habit is None:
            habit = _Habit(max(self._most, _FEW), few)
            habit.appearances(value, argument)
        habit.attempts = [*habit.attempts[-4 * habit.most :], attempt]
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


def _place_of_sizes(signature: tuple[Any, ...]) -> tuple[Any, ...]:
    return "sizes", split_sizes(signature)[0]


def _reference(argument: Argument | None) -> Callable[[], Any]:
    try:
        return weakref.ref(argument.value) if argument is not None and argument.is_object else lambda: None
    except TypeError:  # of a type that cannot be referred to weakly: it is never recognised
        return lambda: None


def _why(habit: _Habit, argument: Argument, given_up: list[Attempt]) -> list[Refusal]:
    """The reason for the calls of a place. Where nothing could be recorded anyway, it is why that is."""
    if given_up and all(attempt.refusals for attempt in given_up):
        habit.refusals = list(given_up[-1].refusals)
    elif given_up:
        what = f"a {type(argument.value).__name__} made anew" if argument.is_object else "another value"
        detail = f"the argument was {what} in each of {_not_used(given_up)}"
        remedy = (
            "make the object once and pass it again, or pass the tensors that it holds"
            if argument.is_object
            else "pass a tensor: its value is refreshed at each call"
        )
        habit.refusals = [ChangingValue(detail, operator=argument.name, remedy=remedy)]
    return habit.refusals


def _not_used(attempts: Sequence[Attempt]) -> str:
    if any(attempt.initialised for attempt in attempts):
        return f"{len(attempts)} calls that were recorded or initialised something, and none like them came again"
    return f"{len(attempts)} recordings, and none of them was used again"


def _why_sizes(attempts: list[Attempt], names: Sequence[str]) -> list[Refusal]:
    """The reason for calls whose tensors have other sizes each time; it names those tensors."""
    if all(attempt.refusals for attempt in attempts[:-1]):
        return list(attempts[-2].refusals)
    last, now = (split_sizes(attempt.signature)[1] for attempt in attempts[-2:])
    changed = [(name, a, b) for name, a, b in zip(names, last, now, strict=True) if a != b]
    shapes = ", ".join(f"{list(a)} before {list(b)}" for _, a, b in changed)
    detail = f"the sizes were others in each of {_not_used(attempts[:-1])}: {shapes}"
    remedy = "pad what grows to a fixed length, declare buckets= for a batch that varies, or record the sizes ahead (record)"
    return [ChangingValue(detail, operator=", ".join(name for name, _, _ in changed) or "arguments", remedy=remedy)]
