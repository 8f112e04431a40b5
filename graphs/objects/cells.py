"""Mutable things a snapshot remembers: how to read them, compare them and write them back."""

from __future__ import annotations

import enum
import math
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from graphs.objects.raw_access import IMMUTABLE_TYPE, mapping_class, sequence_class, slots_of

Tensor = torch.Tensor
LEAVES = (str, bytes, int, float, complex, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
"""Types of values that are compared by value, and that nothing hangs on."""
ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """A cell whose content changed: ``path`` as the user would write it, ``before`` and ``after`` as text.

    ``irreversible`` is True where the change cannot be undone (an iterator that moved on).
    """

    path: str
    before: str
    after: str
    irreversible: bool = False


class CellView:
    """A closure cell as a mapping with one item."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError as error:  # empty
            raise KeyError(key) from error

    def read(self) -> dict[str, Any]:
        """The content of the cell; nothing while it is empty."""
        try:
            return {"": self.cell.cell_contents}
        except ValueError:
            return {}

    def write(self, content: dict[str, Any]) -> None:
        """Put back what `read` gave."""
        if content:
            self.cell.cell_contents = content[""]


class SpecialView:
    """What of an object no dictionary holds, as a mapping: its class and the dictionary itself, the defaults of a function."""

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self._owner, self._names = owner, names

    def read(self) -> dict[str, Any]:
        """What it has of it, asked of no code of its own."""
        return {name: self._now(name) for name in self._names}

    def write(self, content: dict[str, Any]) -> None:
        """Put back what `read` gave, where it is another."""
        for name, value in content.items():
            if self._now(name) is not value:
                object.__setattr__(self._owner, name, value)

    def _now(self, name: str) -> Any:
        return type(self._owner) if name == "__class__" else object.__getattribute__(self._owner, name)


class AttributesView:
    """Some attributes of an object's slots or of a class, or some names of a namespace, as a mapping."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        slotted = not isinstance(owner, (dict, type))
        self._reference = reference_to(owner) if slotted else lambda: owner
        self._names = dict.fromkeys(names)
        self._slots = slots_of(type(owner)) if slotted else {}

    @property
    def _owner(self) -> Any:
        """What has the attributes; an object with slots is held weakly, so that it lives no longer than without this view."""
        return self._reference()

    def __getitem__(self, key: str) -> Any:
        if isinstance(self._owner, dict):
            return self._owner[key]
        if isinstance(self._owner, type):
            return type.__getattribute__(self._owner, "__dict__")[key]
        try:
            return self._slots[key].__get__(self._owner)
        except (AttributeError, TypeError) as error:  # empty, or the object is gone
            raise KeyError(key) from error

    def read(self) -> dict[str, Any]:
        """The attributes that exist, by name."""
        content = {}
        for name in self._names:
            try:
                content[name] = self[name]
            except KeyError:
                continue
        return content

    def write(self, content: dict[str, Any]) -> None:
        """Set those attributes that are not what ``content`` says."""
        now = self.read()
        for name, value in content.items():
            if now.get(name, ABSENT) is value:
                continue
            if isinstance(self._owner, dict):
                self._owner[name] = value
            elif isinstance(self._owner, type):
                type.__setattr__(self._owner, name, value)
            else:
                self._slots[name].__set__(self._owner, value)
        for name in now.keys() - content.keys():
            if isinstance(self._owner, dict):
                del self._owner[name]
            elif isinstance(self._owner, type):
                type.__delattr__(self._owner, name)
            else:
                self._slots[name].__delete__(self._owner)


def reference_to(value: Any) -> Callable[[], Any]:
    """A weak reference where the object allows one: a recording does not keep a cache alive."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


@dataclass(slots=True)
class Cell:
    """A mutable thing with a copy of its content, and how to read and write it."""

    form: str  # path of an entry, with {} for its key
    content: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]
    irreversible: bool = False
    container: Any = None  # the dict or list itself, where it is one
    draw: Callable[[], Any] | None = None  # of a random generator


def write_sequence(container: Any, content: list[Any]) -> None:
    """Make a list or deque hold ``content``."""
    kind = sequence_class(container)
    if kind is list:
        list.__setitem__(container, slice(None), content)
    else:
        kind.clear(container)
        kind.extend(container, content)


def write_mapping(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    """Make a dictionary hold ``content``, in its order; entries that are right are left alone."""
    kind = mapping_class(container)
    for key in [key for key in kind.keys(container) if key not in content]:
        kind.__delitem__(container, key)
    for key, value in content.items():
        if kind.get(container, key, ABSENT) is not value:
            kind.__setitem__(container, key, value)
    if list(kind.keys(container)) != list(content):
        kind.clear(container)
        for key, value in content.items():
            kind.__setitem__(container, key, value)


def write_set(container: Any, content: Any) -> None:
    """Make a set hold ``content``."""
    set.clear(container)
    set.update(container, content)


def read_set(container: set[Any]) -> tuple[Any, ...]:
    """The items of a set in an order of their own, to be compared by identity: equality would be the items' own."""
    return tuple(sorted(set.__iter__(container), key=id))


def same(a: Any, b: Any) -> bool:
    """Identity, or equality of values of one immutable type (NaN equals itself, and the zeros differ by their signs)."""
    if a is b:
        return True
    if type(a) is type(b) is float:
        return (a == b and math.copysign(1.0, a) == math.copysign(1.0, b)) or (a != a and b != b)
    if type(a) is type(b) is complex:
        return same(a.real, b.real) and same(a.imag, b.imag)
    if type(a) is type(b) and issubclass(type(a), LEAVES):
        return bool(a == b or (a != a and b != b)) if _is_plain(type(a)) else False  # type: ignore[arg-type]
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return False


def _is_plain(kind: type[Any]) -> bool:
    """Whether values of a class are compared by Python's or torch's own code."""
    compares = next(base for base in type.__getattribute__(kind, "__mro__") if "__eq__" in vars(base))
    return bool(compares.__flags__ & IMMUTABLE_TYPE)


def text_of(value: Any) -> str:
    """A value as a message shows it."""
    if value is ABSENT:
        return "absent"
    kind = type(value)
    if kind in (Tensor, torch.nn.Parameter):
        return f"tensor{tuple(value.shape)} at {value.data_ptr():#x}" if value.layout == torch.strided else "a tensor"
    return repr(value) if kind in LEAVES or issubclass(kind, enum.Enum) else f"a {kind.__name__}"


def is_untouched(cell: Cell) -> bool:
    """Whether a cell holds the very same objects, in the same order. Quick; where it says no, `cell_differences` decides."""
    before, container = cell.content, cell.container
    if container is None or type(before) is not dict:
        return False
    kind = type(container)
    if kind is not dict and kind is not OrderedDict:
        kind = mapping_class(container)
    elif not before:
        return not container
    return (
        kind.__len__(container) == len(before)
        and all(map(operator.is_, kind.__iter__(container), before))
        and all(map(operator.is_, kind.values(container), before.values()))
    )


def cell_differences(cell: Cell) -> list[Difference]:
    """What changed in one cell since it was read first."""
    if is_untouched(cell):
        return []
    before, after = cell.content, cell.read()
    if not isinstance(before, (dict, list)):
        if same(before, after) or (not isinstance(before, tuple) and before == after):
            return []
        return [Difference(cell.form.format(""), "in another state", "advanced", cell.irreversible)]
    return [Difference(cell.form.format(key), text_of(a), text_of(b)) for key, a, b in changed_entries(cell)]


def changed_entries(cell: Cell) -> list[tuple[Any, Any, Any]]:
    """Key, value before and value now of what changed in a mapping or list."""
    if is_untouched(cell):
        return []
    before, after = cell.content, cell.read()
    old = before if isinstance(before, dict) else dict(enumerate(before))
    new = after if isinstance(after, dict) else dict(enumerate(after))
    keys = [*old, *(key for key in new if key not in old)]
    pairs = [(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys]
    return [(key, a, b) for key, a, b in pairs if not same(a, b)]
