"""What hangs on opaque arguments, described without holding it: whether another object may stand in the place of one.

A recording that was made with one cache serves another if the step, as far as Python goes, cannot tell them apart: the same
classes, the same constants, tensors in the same places, and the same of these one object. The pattern of a portrait says that;
it is compared with the pattern of the other object. Of what both share (a class, a function, a configuration) it is enough that
it is the same object.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from graphs.guards.container_guards import MappingGuard, SequenceGuard
from graphs.guards.guard import Guard
from graphs.guards.object_guards import guard_object, layout_of
from graphs.guards.traversal import LEAVES, Scope, Traversal
from graphs.guards.value_guards import TypeGuard, ValueGuard
from graphs.objects.cells import reference_to, same
from graphs.objects.kinds import NOT_ENTERED, Kind, kind_of
from graphs.objects.raw_access import IMMUTABLE_TYPE, bases_of, elements_of, of_type, per_class
from graphs.state.tensor_form import form_of

Tensor = torch.Tensor
_COMPARED = (Kind.TENSOR, Kind.OBJECT)
"""Kinds that a portrait goes into. What is of another kind has to be the same object."""
_LIMIT = 4096  # objects
_TRANSPARENT = frozenset((object, dict, list, tuple, set, frozenset, OrderedDict, defaultdict))


@dataclass(frozen=True)
class _Part:
    """An object of the portrait, by the order in which it was visited."""

    number: int


_numbered = functools.cache(_Part)  # one object for each number: patterns are compared often


@dataclass(frozen=True)
class _Same:
    """An object that both have to have, held weakly where that can be."""

    reference: Callable[[], Any]


@dataclass(frozen=True)
class _Form:
    """What a tensor answers of itself, whether or not an operator reads it."""

    form: tuple[Any, ...]


class _Everything(frozenset[int]):
    """Of tensors, the place is compared by whoever pairs them, and the layout at once for all."""

    def __contains__(self, item: object) -> bool:
        return True


@dataclass(frozen=True)
class Portrait:
    """One look at opaque arguments.

    Attributes:
        pattern: what there is to compare; it holds nothing that belongs to the arguments.
        tensors: in the order in which they were met, with their paths.
        visited: identities of all objects that were looked at.
        watched, polled: the guards of what was seen, but for the layout of tensors.
    """

    pattern: tuple[Any, ...]
    tensors: list[tuple[str, Tensor]]
    visited: frozenset[int]
    watched: list[Guard]
    polled: list[Guard]

    def with_layouts(self, placed: set[int]) -> list[Guard]:
        """The polled guards with those of tensors whose identities are not in ``placed``."""
        left = [(path, tensor) for path, tensor in self.tensors if id(tensor) not in placed]
        return [*self.polled, *(ValueGuard(p, functools.partial(layout_of, t), by_value=True) for p, t in left)]


def portrait(
    roots: Sequence[tuple[str, Any]],
    scope: Scope,
    names: frozenset[str] | None = None,
    reached: frozenset[int] = frozenset(),
) -> Portrait | None:
    """The portrait of opaque arguments; None where something hangs on them that cannot be described.

    Args:
        scope: what the functions of the step look up; ``names``, where these are known, are the names in it.
        reached: identities of what the step can look at without these arguments, and so tell from others that are like it.
    """
    into = Traversal(_anywhere(scope), names)
    into.pending += reversed(list(roots))
    numbers: dict[int, _Part] = {}
    tensors: list[tuple[str, Tensor]] = []
    while into.pending:
        path, value = into.pending.pop()
        if type(value) in LEAVES or of_type(value, NOT_ENTERED) or id(value) in into.seen:
            continue
        kind = kind_of(value)
        if kind not in _COMPARED or id(value) in reached or (kind is Kind.OBJECT and not _shows_all(type(value))):
            continue
        if len(into.seen) >= _LIMIT:
            return None
        into.seen.add(id(value))
        into.keep.append(value)
        known = into.size, len(into.pending)
        guard_object(into, path, value)
        if kind is Kind.TENSOR:
            tensors.append((path, value))
        if kind is Kind.TENSOR or (into.size, len(into.pending)) != known:
            numbers[id(value)] = _numbered(len(numbers))
    if into.incomparable or into.weakly or any(id(root) not in numbers for _, root in roots):
        return None
    described = [
        *(_described(guard, numbers) for guard in (*into.watched, *into.polled)),
        *_contents(into.keep, numbers),
        *(_Form((form_of(tensor), tensor.is_leaf)) for _, tensor in tensors),
    ]
    return None if None in described else Portrait(tuple(described), tensors, frozenset(numbers), into.watched, into.polled)


@per_class
def _shows_all(kind: type[Any]) -> bool:
    """Whether objects of a class hold nothing but attributes, slots, items and entries: what C keeps of others is not seen."""
    return all(base in _TRANSPARENT for base in bases_of(kind) if base.__flags__ & IMMUTABLE_TYPE)


def _anywhere(scope: Scope) -> Scope:
    """The scope for a look that leaves the layout of tensors to whoever pairs them."""
    return Scope(scope.reads, {}, _Everything(), scope.codes, scope.extra, scope.everything)


def _contents(visited: Sequence[Any], numbers: dict[int, _Part]) -> list[tuple[Any, ...] | None]:
    """The classes of the objects that have a number, and the items of those that no guard compares, since they never change."""
    found: list[tuple[Any, ...] | None] = []
    for value in visited:
        if id(value) not in numbers:
            continue  # nothing is known of it: it has to be the same object
        if of_type(value, tuple):
            found.append((type(value), *(_part(item, numbers) for item in elements_of(value))))
        elif of_type(value, (set, frozenset)):
            return [None]
        else:
            found.append((type(value),))
    return found


def guards_of_tensor(path: str, tensor: Tensor, scope: Scope) -> list[Guard]:
    """The guards of one tensor, but for its layout."""
    into = Traversal(_anywhere(scope))
    guard_object(into, path, tensor)
    return [*into.watched, *into.polled]


def alike(first: Any, second: Any) -> bool:
    """Whether two patterns say the same."""
    if first is second and type(first) is not _Same:
        return True
    if type(first) is tuple:
        return type(second) is tuple and len(first) == len(second) and all(map(alike, first, second))
    if type(first) is _Same and type(second) is _Same:
        found = first.reference()
        return found is not None and found is second.reference()
    kinds = type(first), type(second)
    return bool(first == second) if kinds in ((_Part, _Part), (_Form, _Form)) else same(first, second)


def _part(value: Any, numbers: dict[int, _Part]) -> Any:
    """A value as a pattern has it."""
    if type(value) in LEAVES:
        return value
    return numbers[id(value)] if id(value) in numbers else _Same(reference_to(value))


def _described(guard: Guard, numbers: dict[int, _Part]) -> tuple[Any, ...] | None:
    """What a guard compares, with the objects of the portrait by their numbers; None where that cannot be said."""

    def part(value: Any) -> Any:
        return _part(value, numbers)

    if isinstance(guard, MappingGuard):
        entries = sorted(guard.entries, key=itemgetter(0)) if guard.by_name else guard.entries
        return MappingGuard, guard.form, tuple((part(key), part(value)) for key, value in entries)
    if isinstance(guard, SequenceGuard):
        return SequenceGuard, guard.form, tuple(map(part, guard.items))
    if isinstance(guard, TypeGuard):
        return TypeGuard, guard.path, guard.kind
    if isinstance(guard, ValueGuard):
        return ValueGuard, guard.path, part(guard.value)
    return None
