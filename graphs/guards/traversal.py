"""One look at all objects that a step reaches: those still to be looked at, those seen, and the guards gathered so far."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from graphs.errors import Refusal, UnguardedRead
from graphs.guards.container_guards import MappingGuard
from graphs.guards.guard import Guard
from graphs.guards.value_guards import ValueGuard
from graphs.objects.kinds import ATOMS
from graphs.objects.special_names import CALLED_BY_TORCH
from graphs.python_reads.code_reads import CodeReads, names_in

LEAVES = ATOMS | {slice}
"""Classes whose instances are compared by whoever holds them, and not looked into."""


class Scope:
    """What a step can look up, as far as it is known: its functions and the names in them. Grows as functions are found.

    Args:
        reads: what the observed run asked for.
        advanced: container and key of the numbers that the recording advances itself.
        placed: identities of tensors whose place and layout are checked elsewhere.
        codes, extra, everything: what is known from an earlier look.

    Attributes:
        codes: functions that ran or were found, with their globals, by identity of the code.
        extra: names of attributes that no code mentions: of an ``attrgetter``, or matched by a pattern.
        everything: whether the user's code looks attributes up by names that it computes.
    """

    def __init__(
        self,
        reads: CodeReads,
        advanced: Mapping[int, set[Any]],
        placed: frozenset[int],
        codes: Mapping[int, tuple[types.CodeType, dict[str, Any]]] | None = None,
        extra: Iterable[str] = (),
        everything: bool | None = None,
    ) -> None:
        self.reads, self.advanced, self.placed = reads, advanced, placed
        self.codes: dict[int, tuple[types.CodeType, dict[str, Any]]] = dict(reads.codes if codes is None else codes)
        self.extra: set[str] = set(extra)
        self.everything = not reads.complete or reads.computed() if everything is None else everything

    @property
    def size(self) -> tuple[int, int]:
        """How many functions and names there are."""
        return len(self.codes), len(self.extra)

    def found(self) -> tuple[Mapping[int, tuple[types.CodeType, dict[str, Any]]], Iterable[str], bool]:
        """What a look at other objects begins with, where all of this is in scope too."""
        return self.codes, self.extra, self.everything

    def kept(self) -> Scope:
        """The same for looks at other objects later; it holds nothing of the run."""
        return Scope(CodeReads(complete=self.reads.complete), {}, frozenset(), self.codes, self.extra, self.everything)

    def names(self) -> frozenset[str]:
        """The attributes that some function can look up."""
        mentioned = frozenset(name for code, _ in self.codes.values() for name in names_in(code))
        return mentioned | self.extra | CALLED_BY_TORCH


class Traversal:
    """One look, with the names that are in scope as it begins.

    Attributes:
        names: attributes that some function can look up; ``relevant`` tells of one name whether it is among them.
        watched, polled: the guards, see `graphs.guards.python_guards.Guards`.
        incomparable: what was found that no later call can be compared with.
        pending: objects to look at, with the paths to call them by.
        weakly: weak references, which are followed once nothing else is left to look at.
        seen: identities of what was looked at.
        chained: Python modules that were looked into, for the functions of which namespace.
        subject: identity of the object that is being looked at, None between objects; ``subjects`` tells by the identity of a
            guard what it is about.
    """

    def __init__(self, scope: Scope, names: frozenset[str] | None = None) -> None:
        self.scope = scope
        self.names = scope.names() if names is None else names
        self.relevant: Callable[[Any], bool] = self.names.__contains__  # not a method of this object, which holds the roots
        self.watched: list[Guard] = []
        self.polled: list[Guard] = []
        self.incomparable: list[Refusal] = []
        self.pending: list[tuple[str, Any]] = []
        self.weakly: list[tuple[str, weakref.ref[Any]]] = []
        self.seen: set[int] = set()
        self.keep: list[Any] = []  # so that no identity is reused meanwhile
        self.chained: set[tuple[int, int]] = set()
        self.subject: tuple[int, str] | None = None
        self.subjects: dict[int, tuple[int, str]] = {}

    @property
    def size(self) -> int:
        """How many guards there are."""
        return len(self.watched) + len(self.polled)

    def enter(self, path: str, value: Any) -> None:
        """Look at an object later."""
        self.pending.append((path, value))

    def add(self, guard: Guard, *, watched: bool = False) -> None:
        """Take in a guard; ``watched`` if it is enough to ask it after a watched dictionary was written."""
        (self.watched if watched else self.polled).append(guard)
        if self.subject is not None:
            self.subjects[id(guard)] = self.subject

    def add_value(self, path: str, read: Callable[[], Any], *, by_value: bool = False) -> Any:
        """Guard what a function reads; returns what it reads now."""
        guard = ValueGuard(path, read, by_value=by_value)
        self.add(guard)
        return guard.value

    def refuse(self, path: str, detail: str) -> None:
        """Note a value that no later call can be compared with."""
        self.incomparable.append(UnguardedRead(detail, operator=path))

    def advanced_in(self, container: Any) -> Any:
        """Keys of the numbers in a container that the recording advances itself."""
        return self.scope.advanced.get(id(container), ())

    def mapping(
        self,
        form: str,
        mapping: Mapping[Any, Any],
        relevant: Callable[[Any], bool] | None = None,
        enter: bool = True,
        members: bool = False,
    ) -> None:
        """Guard a dictionary; watched where every write to it can be seen.

        That is not so where an empty one is filled by copying another into it whole, which nobody does with the ``members``
        of a module, nor where the order of an ordered one changes.
        """
        guard = MappingGuard(form, mapping, relevant, self.advanced_in(mapping))
        unseen = (type(mapping) is dict and not mapping and not members) or (
            isinstance(mapping, OrderedDict) and OrderedDict.__len__(mapping) > 1
        )
        self.add(guard, watched=isinstance(mapping, dict) and not unseen)
        if enter:
            self.pending += [(f"a key of {form.partition('[')[0]}", key) for key, _ in guard.entries if type(key) not in LEAVES]
            self.pending += [(form.format(key), value) for key, value in guard.entries]
