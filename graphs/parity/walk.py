"""What hangs on a twin: the objects that can be reached from a model and its arguments, by path.

Reading runs no code of the user's: instance dictionaries, closures, cells and the built-in containers are read as they are;
properties, ``__getattr__``, ``__getitem__`` and ``__eq__`` of other types are not called.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphs.objects.libraries import origin_of_code, origin_of_module, origin_of_type
from graphs.objects.raw_access import closure_of
from graphs.objects.special_names import LAYER_MEMBERS

Tensor = torch.Tensor
PLAIN = (bool, int, float, str)
_LIMIT = 20_000
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True)
class Cell:
    """An entry of a dictionary or list: an attribute, an item, a global, the content of a cell.

    Attributes:
        path: as a user would write it.
        kind: ``"attribute"``, ``"item"``, ``"tensor"``, ``"global"``.
        container, key: where it is.
    """

    path: str
    kind: str
    container: Any
    key: Any

    @property
    def value(self) -> Any:
        """What is there now."""
        if isinstance(self.container, types.CellType):
            return self.container.cell_contents
        return vars(self.container)[self.key] if isinstance(self.container, type) else self.container[self.key]

    def set(self, value: Any) -> None:
        """Put ``value`` there, without asking the object that it hangs on."""
        if isinstance(self.container, types.CellType):
            self.container.cell_contents = value
        elif isinstance(self.container, type):
            type.__setattr__(self.container, self.key, value)
        else:
            self.container[self.key] = value


@dataclass(frozen=True)
class Reached:
    """Everything found on one walk, in a fixed order.

    Attributes:
        cells: entries that hold a plain number, flag, string or tensor.
        containers: lists and dicts themselves, by path.
        modules: modules, by path.
        functions: the user's functions, by path.
    """

    cells: list[Cell]
    containers: list[tuple[str, Any]]
    modules: list[tuple[str, nn.Module]]
    functions: list[tuple[str, types.FunctionType]]


def reached(roots: dict[str, Any]) -> Reached:
    """Walk from ``roots``, the name of each being the start of its paths."""
    found = Reached([], [], [], [])
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = list(reversed(roots.items()))
    while pending and len(seen) < _LIMIT:
        path, value = pending.pop()
        if id(value) in seen or isinstance(value, (*PLAIN, type(None), Tensor, types.ModuleType)):
            continue
        seen.add(id(value))
        inner = []
        for cell in _entries(path, value, found):
            held = cell.value
            if isinstance(held, (*PLAIN, Tensor)):
                found.cells.append(cell)
            else:
                inner.append((cell.path, held))
        pending.extend(reversed([*inner, *_behind(path, value)]))
    return found


def _entries(path: str, value: Any, found: Reached) -> Iterator[Cell]:
    kind = type(value)
    if isinstance(value, types.FunctionType):
        if is_users(value):
            found.functions.append((path, value))
            yield from _function(value)
    elif isinstance(value, type):
        if origin_of_type(value) == "user":
            yield from (
                Cell(f"{value.__name__}.{name}", "attribute", value, name)
                for name, item in vars(value).items()
                if not name.startswith("__") and (isinstance(item, PLAIN) or type(item) in (list, dict))
            )
    elif kind in (list, dict):
        found.containers.append((path, value))
        keys: Any = range(len(value)) if kind is list else list(value)
        yield from (Cell(f"{path}[{_text(key)}]", "item", value, key) for key in keys)
    elif isinstance(value, tuple):
        yield from ()
    elif isinstance(own := _dictionary(value), dict):
        if isinstance(value, nn.Module):
            found.modules.append((path, value))
            yield from _members(path, own)
        hidden = _OF_MODULES if isinstance(value, nn.Module) else frozenset[str]()
        yield from (Cell(f"{path}.{name}", "attribute", own, name) for name in list(own) if name not in hidden)


def _behind(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What an object leads to that is no entry of its own: its class, the function of a method, the items of a tuple."""
    if isinstance(value, types.MethodType):
        yield from ((path, value.__self__), (path, value.__func__))
    elif isinstance(value, functools.partial):
        yield from ((path, value.func), (path, value.args), (path, value.keywords))
    elif isinstance(value, tuple):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(tuple.__iter__(value)))
    elif isinstance(value, type):
        if origin_of_type(value) == "user":
            yield from ((f"{value.__name__}.{n}", f) for n, f in vars(value).items() if isinstance(f, types.FunctionType))
    elif not isinstance(value, (types.FunctionType, list, dict)) and origin_of_type(type(value)) == "user":
        yield type(value).__name__, type(value)


def _members(path: str, own: dict[str, Any]) -> Iterator[Cell]:
    for members in LAYER_MEMBERS:
        for name, member in own.get(members, {}).items():
            if member is not None:
                yield Cell(f"{path}.{name}", "tensor" if isinstance(member, Tensor) else "attribute", own[members], name)


def _function(function: types.FunctionType) -> Iterator[Cell]:
    """Closure cells, globals that the function names, and what it names of the user's modules."""
    for name, cell in closure_of(function):
        try:
            cell.cell_contents  # noqa: B018 - an empty cell raises
        except ValueError:
            continue
        yield Cell(name, "global", cell, "")
    space, names = function.__globals__, _names(function.__code__)
    for name in names:
        held = space.get(name)
        if isinstance(held, types.ModuleType):
            if origin_of_module(held) == "user":
                inner = vars(held)
                yield from (Cell(f"{name}.{one}", "global", inner, one) for one in names if isinstance(inner.get(one), PLAIN))
        elif name in space:
            yield Cell(name, "global", space, name)


def _names(code: types.CodeType) -> list[str]:
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _dictionary(value: Any) -> Any:
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def is_users(function: types.FunctionType) -> bool:
    """Whether a function is the user's own, and no library's."""
    return origin_of_code(function.__code__, function.__globals__) == "user"


def _text(key: Any) -> str:
    return repr(key) if isinstance(key, (*PLAIN, type(None))) else f"<{type(key).__name__}>"
