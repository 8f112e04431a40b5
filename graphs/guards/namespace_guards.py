"""Guards of what functions look up by name: their globals, builtins, attributes of modules, environment variables."""

from __future__ import annotations

import builtins
import os
import sys
import types
from typing import Any

from graphs.guards.container_guards import NamesGuard
from graphs.guards.traversal import Traversal
from graphs.objects.libraries import origin_of_code, origin_of_module
from graphs.objects.special_names import OF_MODULES, OF_THE_INTERPRETER
from graphs.python_reads.code_reads import global_names, imported_names, names_in

_TABLES_OF_PYTHON = (type(os.environ),)
"""Objects in modules of Python's that are looked at by themselves."""


class _Space:
    """One namespace: the names that functions look up there, and the attributes that these functions mention."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content, self.of_user = content, False
        self.names: set[str] = set()
        self.attributes: set[str] = set()


def guard_namespaces(into: Traversal) -> None:
    """Guard all that the known functions look up by name, except attributes of objects."""
    missing: set[str] = set()
    for space in _spaces(into):
        missing.update(name for name in space.names if name not in space.content)
        guard = NamesGuard("{}", space.content, frozenset(space.names), into.advanced_in(space.content))
        into.add(guard, watched=not space.of_user)
        for name, value in guard.entries:
            if isinstance(value, types.ModuleType):
                guard_module(into, name, value, frozenset(space.attributes), id(space.content))
            else:
                into.enter(name, value)
    into.add(NamesGuard("builtins.{}", vars(builtins), frozenset(missing)), watched=True)
    _guard_imports(into)


def guard_environment(into: Traversal) -> None:
    """Guard all environment variables."""
    into.mapping("os.environ[{!r}]", os.environ._data)  # type: ignore[attr-defined]


def guard_module(into: Traversal, path: str, module: types.ModuleType, names: frozenset[str], space: int) -> None:
    """Guard what functions look up in a module that they know by name, and in the modules in it.

    Args:
        names: attributes that functions of one namespace mention.
        space: the identity of that namespace.
    """
    origin = origin_of_module(module)
    if (id(module), space) in into.chained or origin == "own":
        return
    into.chained.add((id(module), space))
    guard = NamesGuard(path + ".{}", vars(module), _looked_up(into, module, names, origin))
    into.add(guard, watched=origin != "user")
    for name, value in guard.entries:
        if isinstance(value, types.ModuleType):
            guard_module(into, f"{path}.{name}", value, names, space)
        elif origin != "torch" and (origin != "python" or isinstance(value, (list, dict, set))):
            into.enter(f"{path}.{name}", value)


def _spaces(into: Traversal) -> list[_Space]:
    """The namespaces of the known functions; one is the user's if the first function found in it is."""
    spaces: dict[int, _Space] = {}
    for code, content in into.scope.codes.values():
        space = spaces.get(id(content))
        if space is None:
            space = spaces[id(content)] = _Space(content)
            space.of_user = origin_of_code(code, content) == "user"
        space.names.update(global_names(code))
        space.attributes.update(names_in(code))
    return list(spaces.values())


def _guard_imports(into: Traversal) -> None:
    """Guard modules that functions import as they run, and that those which are not there yet stay away."""
    missing: set[str] = set()
    for code, space in into.scope.codes.values():
        for name in imported_names(code):
            package = f"{space.get('__package__')}.{name}"
            missing |= {name, package} - sys.modules.keys()
            module = sys.modules.get(name) or sys.modules.get(package)
            if type(module) is types.ModuleType:
                guard_module(into, name, module, frozenset(names_in(code)), id(space))
    into.add(NamesGuard("sys.modules[{!r}]", sys.modules, frozenset(missing)), watched=True)


def _looked_up(into: Traversal, module: types.ModuleType, names: frozenset[str], origin: str) -> frozenset[str]:
    """Which names of a module count."""
    content = vars(module)
    whole = into.scope.everything and origin == "user"  # `getattr(settings, name)`
    looked_up = (names | content.keys() if whole else names) - OF_MODULES
    if origin in ("python", "torch") or type(module) is not types.ModuleType:  # complete as they are, or fill themselves
        looked_up &= content.keys()
    if origin == "python":  # numbers and texts (sys.argv, math.pi), and functions that were exchanged
        kept = {name for name in looked_up if not isinstance(content[name], (types.ModuleType, *_TABLES_OF_PYTHON))}
        return frozenset(kept - OF_THE_INTERPRETER)
    return looked_up
