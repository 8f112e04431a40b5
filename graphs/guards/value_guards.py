"""Guards of single values: the class of an object, what a function reads, the content of a closure, the code of a function."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from graphs.guards.guard import Bind
from graphs.objects.cells import ABSENT, Difference, reference_to, same, text_of


class TypeGuard:
    """The class of an object, which can be exchanged under it (``model.layer.__class__ = Other``)."""

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.kind = path, type(value)
        self.read = reference_to(value)

    def difference(self) -> Difference | None:
        """The class, if it is another one."""
        kind = type(self.read())
        return None if kind in (self.kind, type(None)) else Difference(f"{self.path}.__class__", repr(self.kind), repr(kind))

    def conditions(self, bind: Bind) -> Iterator[str]:
        """One comparison."""
        yield f"type({bind(self.read)}()) is {bind(self.kind)}"


class ValueGuard:
    """A value that is read by a function: the content of a buffer, a context variable, an attribute in a slot."""

    def __init__(self, path: str, read: Callable[[], Any], *, by_value: bool = False) -> None:
        self.path, self._read, self.value, self._by_value = path, read, read(), by_value

    def difference(self) -> Difference | None:
        """The value, if it is another one."""
        try:
            now = self._read()
        except Exception as error:  # memory that was given back, say: eager says what is wrong with it
            return Difference(self.path, "readable", f"{type(error).__name__}: {error}")
        if now is self.value or (self._by_value and now == self.value) or same(now, self.value):
            self.value = now
            return None
        if self._by_value:
            return Difference(self.path, "in another state", "changed")
        return Difference(self.path, text_of(self.value), text_of(now))

    def conditions(self, bind: Bind) -> Iterator[str]:
        """One comparison."""
        yield f"{bind(self._read)}() {'==' if self._by_value else 'is'} {bind(self.value)}"


class AliveGuard:
    """That an object which is held weakly has not died; the guard does not hold it either."""

    def __init__(self, path: str, reference: Callable[[], Any]) -> None:
        self._path, self._reference = path, reference

    def difference(self) -> Difference | None:
        """That the object is gone."""
        return Difference(self._path, "alive", "gone") if self._reference() is None else None

    def conditions(self, bind: Bind) -> Iterator[str]:
        """One comparison."""
        yield f"{bind(self._reference)}() is not None"


class Changed:
    """What never holds again."""

    def __init__(self, found: Difference) -> None:
        self._found = found

    def difference(self) -> Difference | None:
        """The change that was found."""
        return self._found

    def conditions(self, bind: Bind) -> Iterator[str]:
        """Never true."""
        yield "False"


class CellGuard:
    """The content of a closure's cell."""

    def __init__(self, path: str, cell: types.CellType) -> None:
        self._path, self.cell, self.value = path, cell, _content(cell)

    def difference(self) -> Difference | None:
        """The content, if it is another object."""
        now = _content(self.cell)
        if not same(now, self.value):
            return Difference(self._path, text_of(self.value), text_of(now))
        self.value = now
        return None

    def conditions(self, bind: Bind) -> Iterator[str]:
        """The content by identity; an empty cell raises, and is looked at by `difference`."""
        yield f"{bind(self.cell)}.cell_contents is {bind(self.value)}"


class FunctionGuard:
    """The code and the defaults of a function, which may be exchanged while the function stays what it is.

    Args:
        also: further attributes that Python keeps of it (``__doc__``, ``__name__``) and that the step looks up.
    """

    def __init__(self, path: str, function: types.FunctionType, also: Iterable[str] = ()) -> None:
        self._path, self._function = path, function
        self._parts = ["__code__", "__defaults__", "__kwdefaults__", *also]
        self._values = [getattr(function, part) for part in self._parts]

    def difference(self) -> Difference | None:
        """The part that was exchanged."""
        for part, value in zip(self._parts, self._values, strict=True):
            now = getattr(self._function, part)
            if now is not value:
                return Difference(f"{self._path}.{part}", text_of(value), text_of(now))
        return None

    def conditions(self, bind: Bind) -> Iterator[str]:
        """Each part by identity."""
        name = bind(self._function)
        yield from (f"{name}.{part} is {bind(value)}" for part, value in zip(self._parts, self._values, strict=True))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT
