"""Guards of containers: dictionaries, names of Python modules, lists, sets."""

from __future__ import annotations

import functools
import itertools
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from graphs.guards.guard import Bind
from graphs.objects.cells import ABSENT, Difference, same, text_of
from graphs.objects.dict_watch import numbered_versions, version_in
from graphs.objects.raw_access import elements_of, items_of

_UNROLLED = 24  # items of a sequence that are compared by expressions of their own


class MappingGuard:
    """Entries of a dictionary, or of the attributes of an object or class.

    Keys and values are compared by identity, in order where all entries count: a key of the user's is never asked whether it
    equals another.

    Args:
        form: the path of an entry, with ``{}`` for its key.
        mapping: the dictionary itself, so that looking at it runs nobody's code.
        relevant: tells which keys, texts then, the step can look up; entries under other keys may come and go.
        ignored: keys of values that the recording advances itself.
    """

    def __init__(
        self,
        form: str,
        mapping: Mapping[Any, Any],
        relevant: Callable[[Any], bool] | None = None,
        ignored: Collection[Any] = (),
    ) -> None:
        self.form, self.mapping, self._relevant = form, mapping, relevant
        self._ignored = ignored
        self._take(self._present())

    def _take(self, entries: list[tuple[Any, Any]]) -> None:
        """Take what there is now for what has to be there."""
        self._version = version_in(self.mapping)
        self.entries, self._length = entries, _length(self.mapping)
        counted = {id(key) for key, _ in entries}
        others = [] if self._relevant is None else [key for key, _ in _items(self.mapping) if id(key) not in counted]
        self._others = frozenset(others) if all(type(key) is str for key in others) else None
        self._keys, self._values = [key for key, _ in entries], [value for _, value in entries]
        known = type(self.mapping) in (dict, OrderedDict) and self._others is not None and not self._ignored
        self.is_plain = known and (self._relevant is None or _are_texts(entries))

    def _present(self) -> list[tuple[Any, Any]]:
        return [(key, value) for key, value in _items(self.mapping) if self._counts(key)]

    def _counts(self, key: Any) -> bool:
        if self._relevant is not None and not self._relevant(key):
            return False
        return not self._ignored or not any(same(key, other) for other in self._ignored)

    def difference(self) -> Difference | None:
        """The first entry that was exchanged, removed or added, or stands in another place."""
        if self.is_plain and self._is_untouched():
            self._version = version_in(self.mapping)
            return None
        now = self._present()
        if self._relevant is not None:  # attributes: their order means nothing
            now.sort(key=_place_of)
            self.entries.sort(key=_place_of)
        for (key, value), (other, current) in zip(self.entries, now, strict=False):
            if not same(key, other):
                kept = any(same(key, one) for one, _ in now)
                path = self.form.format(_text_of_key(other if kept else key))
                return Difference(path, *(("absent", text_of(current)) if kept else (text_of(value), "absent")))
            if current is not value and not same(current, value):
                return Difference(self.form.format(_text_of_key(key)), text_of(value), text_of(current))
        if len(now) != len(self.entries):
            longer, absent = (now, True) if len(now) > len(self.entries) else (self.entries, False)
            key, value = longer[min(len(now), len(self.entries))]
            texts = ("absent", text_of(value)) if absent else (text_of(value), "absent")
            return Difference(self.form.format(_text_of_key(key)), *texts)
        self._take(now)
        return None

    def _is_untouched(self) -> bool:
        """Whether the same objects stand under the same keys; looked at by C alone."""
        mapping, keys, values = self.mapping, self._keys, self._values
        if len(mapping) != self._length:
            return False
        if self._relevant is None:
            return all(map(operator.is_, mapping, keys)) and all(map(operator.is_, mapping.values(), values))
        there = map(operator.is_, map(mapping.get, keys, itertools.repeat(ABSENT)), values)
        return all(there) and (not self._others or mapping.keys() >= self._others)

    def exchanged(self) -> list[tuple[Any, Any]] | None:
        """Values that stand in the place of others now, each with what was there; None where keys differ."""
        before, now = self._sorted(self.entries), self._sorted(self._present())
        if len(before) != len(now) or not all(same(key, other) for (key, _), (other, _) in zip(before, now, strict=True)):
            return None
        return [(value, current) for (_, value), (_, current) in zip(before, now, strict=True) if not same(value, current)]

    def adopt(self) -> None:
        """Take what stands there now for what was there."""
        self._take(self._present())

    @property
    def length(self) -> int:
        """How many entries there were, those that do not count included."""
        return self._length

    @property
    def others(self) -> frozenset[str] | None:
        """Keys that do not count; None where some are no texts."""
        return self._others

    @property
    def by_name(self) -> bool:
        """Whether the entries are attributes: their order means nothing."""
        return self._relevant is not None

    def _sorted(self, entries: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return sorted(entries, key=_place_of) if self.by_name else entries

    def _unchanged(self) -> bool:
        return self.difference() is None

    def conditions(self, bind: Bind) -> Iterator[str]:
        """The version of the dictionary where it has one; else, or where it was written, what it holds."""
        compared = "\n            and ".join(self._comparisons(bind))
        if self._version is None:
            yield compared
        else:
            yield f"({bind(numbered_versions())}({bind(self.mapping)}) == {self._version} or ({compared}))"

    def _comparisons(self, bind: Bind) -> Iterator[str]:
        """Every entry by identity; the length and the keys that do not count, which together tell of new ones that do."""
        by_key = self._relevant is not None
        known = type(self.mapping) in (dict, OrderedDict, types.MappingProxyType)
        if not known or self._others is None or (self._ignored and not by_key) or (by_key and not _are_texts(self.entries)):
            yield f"{bind(self._unchanged)}()"
            return
        name = bind(self.mapping)
        yield f"len({name}) == {self._length}" if self._length else f"not {name}"
        if by_key:
            yield from (f"{name}[{key!r}] is {bind(value)}" for key, value in self.entries)
            yield from (f"{name}.keys() >= {bind(self._others)}",) if self._others else ()
        elif self.entries:
            yield f"{bind(_all_identical)}({name}, {bind([key for key, _ in self.entries])})"
            yield f"{bind(_all_identical)}({name}.values(), {bind([value for _, value in self.entries])})"


class NamesGuard:
    """Names of a Python module that functions look up; a name that is missing there is one of the builtins."""

    def __init__(self, form: str, mapping: dict[str, Any], names: frozenset[str], ignored: Collection[Any] = ()) -> None:
        self.form, self.mapping = form, mapping
        self._expected = {name: mapping[name] for name in sorted(names) if name in mapping and name not in ignored}
        self._missing = sorted(name for name in names if name not in mapping and name not in ignored)

    @property
    def entries(self) -> list[tuple[str, Any]]:
        """Names and what they meant."""
        return list(self._expected.items())

    @property
    def missing(self) -> list[str]:
        """Names that meant nothing."""
        return self._missing

    def difference(self) -> Difference | None:
        """The first name that means something else."""
        for key, value in self._expected.items():
            current = self.mapping.get(key, ABSENT)
            if current is not value and not same(current, value):
                return Difference(self.form.format(key), text_of(value), text_of(current))
            self._expected[key] = current
        added = next((name for name in self._missing if name in self.mapping), None)
        return Difference(self.form.format(added), text_of(ABSENT), text_of(self.mapping[added])) if added else None

    def conditions(self, bind: Bind) -> Iterator[str]:
        """Every name by identity; other names of the module do not matter."""
        name = bind(self.mapping)
        yield from (f"{name}[{key!r}] is {bind(value)}" for key, value in self._expected.items())
        yield from (f"{key!r} not in {name}" for key in self._missing)


class SequenceGuard:
    """The items of a list or deque, by identity; without those that the recording advances itself.

    A subclass may answer for its length and items, so it is read through the class it derives from.
    """

    def __init__(self, form: str, sequence: Sequence[Any], items: list[Any], ignored: Collection[int] = ()) -> None:
        self.form, self.sequence, self.items, self._ignored = form, sequence, items, ignored

    def difference(self) -> Difference | None:
        """The first item that was exchanged, or the length."""
        now = elements_of(self.sequence)
        if len(now) != len(self.items):
            return Difference(self.form.format("..."), f"{len(self.items)} items", f"{len(now)} items")
        for index, (value, current) in enumerate(zip(self.items, now, strict=True)):
            if index not in self._ignored and current is not value and not same(current, value):
                return Difference(self.form.format(index), text_of(value), text_of(current))
        self.items = now
        return None

    def exchanged(self) -> list[tuple[Any, Any]] | None:
        """Items that stand in the place of others now, each with what was there; None where there are more or fewer."""
        now = elements_of(self.sequence)
        if len(now) != len(self.items):
            return None
        pairs = enumerate(zip(self.items, now, strict=True))
        return [(a, b) for index, (a, b) in pairs if index not in self._ignored and not same(a, b)]

    def adopt(self) -> None:
        """Take what stands there now for what was there."""
        self.items = elements_of(self.sequence)

    def conditions(self, bind: Bind) -> Iterator[str]:
        """The length and every item; long sequences in one comparison."""
        if type(self.sequence) not in (list, deque):
            yield f"{bind(functools.partial(_same_elements, self.sequence, self.items, self._ignored))}()"
            return
        name = bind(self.sequence)
        yield f"len({name}) == {len(self.items)}" if self.items else f"not {name}"
        if len(self.items) <= _UNROLLED or self._ignored:
            yield from (f"{name}[{i}] is {bind(item)}" for i, item in enumerate(self.items) if i not in self._ignored)
        else:
            yield f"{bind(_all_identical)}({name}, {bind(self.items)})"


class SetGuard:
    """The items of a set, in the order in which they are gone through.

    A registry, which holds classes and nothing else, is compared by its size until something else is compared as well.
    """

    def __init__(self, path: str, items: set[Any]) -> None:
        self._path, self._items, self._recorded = path, items, list(set.__iter__(items))

    @property
    def items(self) -> list[Any]:
        """What was in the set."""
        return self._recorded

    def difference(self) -> Difference | None:
        """That the items changed."""
        now = list(set.__iter__(self._items))
        if len(now) == len(self._recorded) and all(map(same, now, self._recorded)):
            self._recorded = now
            return None
        return Difference(self._path, f"{len(self._recorded)} items", f"{len(now)} others, or in another order")

    def conditions(self, bind: Bind) -> Iterator[str]:
        """The size, and the identity of each item."""
        name = bind(self._items)
        if type(self._items) is not set:
            yield f"{bind(self.difference)}() is None"
        elif not self._recorded:
            yield f"not {name}"
        else:
            yield f"len({name}) == {len(self._recorded)}"
            if not all(isinstance(item, type) for item in self._recorded):
                yield f"{bind(_all_identical)}({name}, {bind(self._recorded)})"


def _items(mapping: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    return items_of(mapping) if isinstance(mapping, dict) else iter(mapping.items())


def _same_elements(sequence: Sequence[Any], items: list[Any], ignored: Collection[int]) -> bool:
    now = elements_of(sequence)
    return len(now) == len(items) and all(a is b or i in ignored for i, (a, b) in enumerate(zip(now, items, strict=True)))


def _length(mapping: Mapping[Any, Any]) -> int:
    return dict.__len__(mapping) if isinstance(mapping, dict) else len(mapping)


def _place_of(entry: tuple[Any, Any]) -> tuple[int, Any]:
    """Where an entry stands in an order that asks no key of the user's: texts first, what cannot be ordered by its identity."""
    key = entry[0]
    return (0, key) if type(key) is str else (1, key) if type(key) is int else (2, id(key))


def _are_texts(entries: list[tuple[Any, Any]]) -> bool:
    return all(type(key) is str for key, _ in entries)


def _text_of_key(key: Any) -> Any:
    """A key as a path shows it; one of the user's is not asked for its text."""
    return key if type(key) in (str, int, bool, float) else f"a {type(key).__name__}"


def _all_identical(now: Iterable[Any], then: Iterable[Any]) -> bool:
    return all(map(operator.is_, now, then))
