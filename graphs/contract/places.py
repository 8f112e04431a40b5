"""Mutable things a snapshot remembers: how to read them, compare them and write them back."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
LEAVES = (str, bytes, int, float, complex, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
"""Types of values that are compared by value, and that nothing hangs on."""
ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """A place whose content changed: ``path`` as the user would write it, ``before`` and ``after`` as text.

    ``lasting`` is True where the change cannot be undone (an iterator that moved on).
    """

    path: str
    before: str
    after: str
    lasting: bool = False


class CellView:
    """A closure cell as a mapping with one item."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def __getitem__(self, key: str) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError as error:  # empty
            raise KeyError(key) from error

    def read(self) -> dict[str, Any]:
        """The content of the cell; nothing while it is empty."""
        try:
            return {"": self._cell.cell_contents}
        except ValueError:
            return {}

    def write(self, content: dict[str, Any]) -> None:
        """Put back what `read` gave."""
        if content:
            self._cell.cell_contents = content[""]


class AttributesView:
    """Some attributes of an object or class, or some names of a namespace, as a mapping."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        self._owner, self._names = owner, tuple(names)

    def __getitem__(self, key: str) -> Any:
        if isinstance(self._owner, dict):
            return self._owner[key]
        try:
            return vars(self._owner)[key] if isinstance(self._owner, type) else getattr(self._owner, key)
        except AttributeError as error:
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
        """Set the attributes in ``content``."""
        for name, value in content.items():
            if isinstance(self._owner, dict):
                self._owner[name] = value
            elif isinstance(self._owner, type):
                setattr(self._owner, name, value)
            else:
                object.__setattr__(self._owner, name, value)


@dataclass(slots=True)
class Place:
    """A mutable thing with a copy of its content, and how to read and write it."""

    form: str  # path of an entry, with {} for its key
    content: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]
    transient: bool = False  # changes between calls are the caller's own affair
    lasting: bool = False
    container: Any = None  # the dict or list itself, where it is one
    counted: frozenset[Any] = frozenset()  # keys of numbers that a recording advances itself


def write_list(container: Any, content: list[Any]) -> None:
    """Make a list or deque hold ``content``."""
    container.clear()
    container.extend(content)


def write_mapping(container: MutableMapping[Any, Any], content: dict[Any, Any]) -> None:
    """Make a mapping hold ``content``, in its order."""
    container.clear()
    container.update(content)


def write_set(container: Any, content: Any) -> None:
    """Make a set or bytearray hold ``content``."""
    container.clear()
    container |= content


def same(a: Any, b: Any) -> bool:
    """Identity, or equality of values of one immutable type (NaN equals itself)."""
    if a is b:
        return True
    if isinstance(a, LEAVES) and type(a) is type(b):
        return bool(a == b or (a != a and b != b))
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return False


def text_of(value: Any) -> str:
    """A value as a message shows it."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} at {value.data_ptr():#x}"
    return repr(value) if isinstance(value, LEAVES) else f"a {type(value).__name__}"


class LengthView:
    """The number of items of a container, as a mapping with one item."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def __getitem__(self, key: str) -> int:
        return len(self._container)


class VersionView:
    """How often a tensor was written, as a mapping with one item."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, key: str) -> int:
        return self._tensor._version


def place_differences(place: Place) -> list[Difference]:
    """What changed in one place since it was read first."""
    before, after = place.content, place.read()
    if not isinstance(before, (dict, list)):
        if before == after:
            return []
        return [Difference(place.form.format(""), "in another state", "advanced", place.lasting)]
    return [Difference(place.form.format(key), text_of(a), text_of(b)) for key, a, b in changed_entries(place)]


def changed_entries(place: Place) -> list[tuple[Any, Any, Any]]:
    """Key, value before and value now of what changed in a mapping or list."""
    before, after = place.content, place.read()
    old = before if isinstance(before, dict) else dict(enumerate(before))
    new = after if isinstance(after, dict) else dict(enumerate(after))
    keys = [key for key in [*old, *(k for k in new if k not in old)] if key not in place.counted]
    pairs = [(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys]
    return [(key, a, b) for key, a, b in pairs if not same(a, b)]
