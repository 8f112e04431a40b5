"""State that functions reach by name: globals, attributes of modules and classes, attributes of functions.

Of the user's own code all of it counts that can be state. Of libraries, of Python and of torch only what the code of a
function mentions is looked at: a library is never gone through as a whole.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from graphs.objects.cells import AttributesView
from graphs.objects.kinds import NOT_ENTERED
from graphs.objects.libraries import origin_of_code, origin_of_module, origin_of_type
from graphs.objects.raw_access import IMMUTABLE_TYPE, attributes_of, bases_of, class_attribute, of_type
from graphs.objects.special_names import OF_CLASSES, OF_THE_INTERPRETER, TYPE_PARAMETERS
from graphs.python_reads.code_reads import global_names, imported_names, names_in, stored_names

SKIPPED = (*NOT_ENTERED, logging.Logger)
"""Classes whose instances hold no state of a step."""
_CALLS_OTHERS = (
    types.MethodType,
    types.BuiltinMethodType,
    types.MethodWrapperType,
    functools.partial,
    functools._lru_cache_wrapper,
)
_CONTAINERS = frozenset((list, dict, set, deque, OrderedDict, defaultdict))
_NOT_OF_MODULES = OF_THE_INTERPRETER | {"__dict__", "__builtins__"}
_NOT_OF_CLASSES = OF_CLASSES | TYPE_PARAMETERS


class Ran(NamedTuple):
    """A function that runs: its code, its globals, and the class whose method it is, if it is a library's."""

    code: types.CodeType
    space: dict[str, Any]
    owner: type[Any] | None = None


class NamesView(AttributesView):
    """Names of one namespace or class, as a mapping; more names can be added."""

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, ())

    def add(self, names: Iterable[str]) -> list[str]:
        """Take further names in; returns those that are new."""
        new = [name for name in names if name not in self._names]
        self._names.update(dict.fromkeys(new))
        return new

    def read(self) -> dict[str, Any]:
        """What stands under the names; nothing for those under which nothing stands."""
        content = content_of(self._owner)
        return {name: content[name] for name in self._names if name in content}


class ClassView(NamesView):
    """All that stands in a class of the user's, with what is added to it later."""

    def read(self) -> dict[str, Any]:
        """The attributes of the class itself."""
        return {name: item for name, item in content_of(self._owner).items() if name not in _NOT_OF_CLASSES}


def content_of(owner: Any) -> Any:
    """The names in a namespace or class."""
    return type.__getattribute__(owner, "__dict__") if isinstance(owner, type) else owner


def is_code(item: Any) -> bool:
    """Whether a class attribute is a function, or computes what is asked for."""
    code = (types.FunctionType, staticmethod, classmethod, property, types.MemberDescriptorType, types.GetSetDescriptorType)
    return isinstance(item, code)


def is_state(item: Any) -> bool:
    """Whether a global can be state of the step, or lead to it: not a module, nor a library's class or function."""
    kind = type(item)
    if kind is types.FunctionType:
        return origin_of_code(item.__code__, item.__globals__) == "user"
    if issubclass(kind, type):
        return origin_of_type(item) == "user"
    called = class_attribute(kind, "__call__") is not None and not issubclass(kind, _CALLS_OTHERS)
    return not issubclass(kind, SKIPPED) and (not called or issubclass(kind, torch.nn.Module) or origin_of_type(kind) == "user")


def named_by(ran: Ran) -> Iterator[tuple[str, Any, list[str]]]:
    """Where a function finds state by name: the form of a path, a namespace or class, and the names in it."""
    code, space = ran.code, ran.space
    names, stored, content = global_names(code), stored_names(code), space
    yield "{}", space, [name for name in sorted(names) if name in stored or (name in content and is_state(content[name]))]
    found: list[tuple[str, Any]] = [(name, space[name]) for name in sorted(names) if name in space]
    for name in sorted(imported_names(code)):
        module = sys.modules.get(name) or sys.modules.get(f"{space.get('__package__')}.{name}")
        found.append((name, module))
    if ran.owner is not None:
        found.append((ran.owner.__name__, ran.owner))
    yield from inside(found, code)


def functions_named_by(ran: Ran) -> Iterator[tuple[str, types.FunctionType]]:
    """Functions of libraries with variables of their own that a function names; the user's are globals like all others."""
    names = names_in(ran.code)
    for name in sorted(global_names(ran.code)):
        value = ran.space.get(name)
        content = (attributes_of(value) or {}) if of_type(value, types.ModuleType) else {}
        held = [(f"{name}.{inner}", content[inner]) for inner in names if inner in content]
        for path, item in [(name, value), *held]:
            if type(item) is types.FunctionType and _has_variables(item):
                yield path, item


def _has_variables(function: types.FunctionType) -> bool:
    """Whether a function is a library's, and something is kept in its closure or its defaults."""
    kept = function.__closure__ or function.__defaults__ or function.__kwdefaults__
    return bool(kept) and origin_of_code(function.__code__, function.__globals__) == "library"


def inside(found: list[tuple[str, Any]], code: types.CodeType) -> Iterator[tuple[str, Any, list[str]]]:
    """What a function names in modules, in classes that are not the user's, and in such functions, by `named_by`'s form."""
    names, stored = names_in(code), stored_names(code)
    seen, pending = set[int](), list(found)
    while pending:
        path, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if of_type(value, types.ModuleType):
            content, origin = attributes_of(value) or {}, origin_of_module(value)
            if origin == "own":
                continue
            yield path + ".{}", content, _counting(content, names, stored, origin)
            pending += [(f"{path}.{name}", content[name]) for name in names if name in content]
        elif of_type(value, type):
            yield from _in_classes(value, names, stored)
        elif type(value) is types.FunctionType and stored and origin_of_code(value.__code__, value.__globals__) != "user":
            yield path + ".{}", value.__dict__, sorted(stored)


def _in_classes(kind: type[Any], names: frozenset[str], stored: frozenset[str]) -> Iterator[tuple[str, Any, list[str]]]:
    for base in bases_of(kind):
        origin = origin_of_type(base)
        if origin in ("user", "own") or base.__flags__ & IMMUTABLE_TYPE:
            continue
        content = content_of(base)
        there = [name for name in _counting(content, names, stored, origin) if base is kind or name in content]
        if there:
            yield base.__name__ + ".{}", base, there


def _counting(content: Any, names: frozenset[str], stored: frozenset[str], origin: str) -> list[str]:
    """The names under which a function sets something or finds what can be state."""
    counts: Callable[[Any], bool] = _is_container if origin in ("python", "torch") else _is_held
    found = {name for name in names if name in content and counts(content[name])} | stored
    return sorted(found - _NOT_OF_MODULES)


def _is_container(item: Any) -> bool:
    return type(item) in _CONTAINERS


def _is_held(item: Any) -> bool:
    return not is_code(item) and is_state(item)
