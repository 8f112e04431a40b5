"""What the program, or a library, has put in the place of functions of torch's and of Python's, or beside them.

``F.gelu = counted``, ``nn.Linear.forward = quantised``, ``builtins.profile = ...``: nothing of the step's own leads to such a
function, which may keep something in its closure, its defaults or the object it is bound to. The same is true of the hooks that
torch calls for every module. So the functions that start in an observed run are asked which of it they can look up.
"""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from graphs.objects.c_objects import partial_content
from graphs.objects.kinds import ATOMS, Kind, kind_of
from graphs.objects.libraries import in_torchs_models, origin_of_code, origin_of_module, origin_of_type
from graphs.objects.raw_access import (
    IMMUTABLE_TYPE,
    attributes_of,
    bases_of,
    class_attribute,
    closure_of,
    functions_in,
    module_name,
    of_type,
)
from graphs.objects.special_names import OF_MODULES, OF_THE_INTERPRETER
from graphs.python_reads.code_reads import global_names, imported_names, names_in

_COMPLETE = ("torch", "python")
"""Whose namespaces are complete as they are: what else stands in them was put there."""
_OTHERS = ("user", "library")
_CONTAINERS = frozenset((dict, list, set, OrderedDict, defaultdict, deque, Counter))
_OF_C = frozenset(
    (
        *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
        *(types.GetSetDescriptorType, types.MemberDescriptorType),
    )
)
_OF_PYBIND = "pybind11_builtins"  # no module has this name
_BUILTINS: dict[str, Any] = vars(builtins)
_LEADING = (type, types.ModuleType)
_OF_THE_PROCESS = OF_MODULES | OF_THE_INTERPRETER
_LASTING = frozenset((types.FunctionType, types.BuiltinFunctionType))
"""What stays what it is, as classes do: torch's and Python's own are asked once."""
_own: dict[int, Any] = {}
"""Functions and classes that are torch's or Python's, by identity: there are a thousand of them in the classes of one model."""
_DEPTH = 4  # decorators of torch's and of Python's around one function


class Replaced:
    """Which of it a step can reach, as far as the functions tell that have started.

    Args:
        found: where to note it: the path to call it by, and what stands there.
        classes: classes of the objects that the step reaches.
    """

    def __init__(self, found: list[tuple[str, Any]], classes: Iterable[type[Any]]) -> None:
        self._found, self._known = found, {id(value) for _, value in found}
        self._names: set[str] = set()
        self._classes: dict[int, list[tuple[str, str, Any]]] = {}
        for kind in classes:
            self._add_class(kind)
        self._add_class(torch.Tensor)

    def looked_up_by(self, code: types.CodeType, space: dict[str, Any]) -> list[tuple[str, Any]]:
        """What can be looked up of it now that a function starts, and could not before."""
        origin = origin_of_code(code, space)
        machinery = origin == "torch" and not in_torchs_models(str(space.get("__name__")))
        names = (_mentioned(code) if machinery else names_in(code) | global_names(code)) - _OF_THE_PROCESS
        self._names |= names
        found = [] if origin != "torch" else [*_standing("{}", space, names, containers=not machinery)]
        found += self._in_namespaces(code, space, names, containers=not machinery)
        methods = (entry for entries in self._classes.values() for entry in entries)
        found += [(path, item) for path, name, item in methods if name in self._names or name.startswith("__")]
        new = []
        for path, value in found:
            if id(value) not in self._known:
                self._known.add(id(value))
                new.append((path, value))
        self._found += new
        return new

    def _add_class(self, kind: type[Any]) -> None:
        for base in bases_of(kind):
            if id(base) not in self._classes:
                self._classes[id(base)] = list(_in_class(base))

    def _in_namespaces(
        self, code: types.CodeType, space: dict[str, Any], names: frozenset[str], *, containers: bool
    ) -> Iterator[tuple[str, Any]]:
        """What a function names in the builtins and in the Python modules that it knows; classes are noted on the way."""
        yield from _standing("{}", _BUILTINS, names - space.keys(), containers=containers)
        pending = [(name, space[name]) for name in names & space.keys()]
        pending += [(name, module) for name in imported_names(code) if (module := _imported(name, space)) is not None]
        seen = set[int]()
        while pending:
            path, value = pending.pop()
            if not of_type(value, _LEADING) or id(value) in seen:
                continue
            seen.add(id(value))
            if of_type(value, type):
                self._add_class(value)
            elif of_type(value, types.ModuleType) and (origin := origin_of_module(value)) in _COMPLETE:
                content = attributes_of(value) or {}
                yield from _standing(path + ".{}", content, names, containers=containers and origin == "torch")
                pending += [(f"{path}.{name}", content[name]) for name in names & content.keys()]


def is_foreign(value: Any) -> bool:
    """Whether a function, or what is called like one, is the program's or a library's, or leads to such a one."""
    if _own.get(id(value)) is value:
        return False
    found = _is_foreign(value, _DEPTH)
    if not found and (of_type(value, type) or type(value) in _LASTING) and _holds_nothing(value):
        _own[id(value)] = value
    return found


def _is_foreign(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind in _OF_C or kind in ATOMS or issubclass(kind, types.ModuleType) or not depth:
        return False
    if kind is types.FunctionType:
        origin = origin_of_code(value.__code__, value.__globals__)
        return origin in _OTHERS or (origin != "own" and any(_is_foreign(one, depth - 1) for one in _wrapped(value)))
    if issubclass(kind, type):
        return origin_of_type(value) in _OTHERS
    parts = _parts(value)
    if parts is not None:
        return any(type(part) in _CONTAINERS or _is_foreign(part, depth - 1) for part in parts)
    if module_name(kind).startswith(_OF_PYBIND):
        return False
    origin = origin_of_type(kind)
    return origin == "user" or (origin == "library" and class_attribute(kind, "__call__") is not None)


def _holds_nothing(value: Any) -> bool:
    """Whether nothing but functions and classes is kept alive with a function or class."""
    if type(value) is not types.FunctionType:
        return True
    return all(one is None or type(one) in _LASTING or of_type(one, type) for one in _wrapped(value))


def _wrapped(function: types.FunctionType) -> Iterator[Any]:
    """What a function of torch's or of Python's may call that it was given."""
    yield function.__dict__.get("__wrapped__")
    for _, cell in closure_of(function):
        try:
            yield cell.cell_contents
        except ValueError:  # empty
            continue


def _parts(value: Any) -> tuple[Any, ...] | None:
    """What is called, or given to what is called, by way of an object of Python's own; None of any other object."""
    kind = type(value)
    if kind is types.MethodType:
        return value.__func__, value.__self__
    if kind is types.BuiltinMethodType:
        return (value.__self__,)
    if issubclass(kind, functools.partial):
        func, args, keywords = partial_content(value)
        return func, *args, *keywords.values()
    if issubclass(kind, (property, staticmethod, classmethod)):
        return tuple(functions_in(value))
    if issubclass(kind, functools.partialmethod):
        return value.func, *value.args, *value.keywords.values()
    return (value.__wrapped__,) if kind is functools._lru_cache_wrapper else None


def _in_class(base: type[Any]) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of what was put into a class of torch's."""
    if base.__flags__ & IMMUTABLE_TYPE or origin_of_type(base) != "torch":
        return
    for name, item in type.__getattribute__(base, "__dict__").items():
        if _own.get(id(item)) is not item and is_foreign(item):
            inner = functions_in(item) if kind_of(item) is Kind.DESCRIPTOR else [item]
            yield from ((f"{base.__name__}.{name}", name, one) for one in inner)


def _standing(form: str, content: dict[str, Any], names: frozenset[str], *, containers: bool) -> Iterator[tuple[str, Any]]:
    """What stands under names in a namespace of torch's or of Python's and is of neither."""
    for name in names & content.keys():
        item = content[name]
        if _own.get(id(item)) is not item and (is_foreign(item) or (containers and type(item) in _CONTAINERS)):
            yield form.format(name), item


def _mentioned(code: types.CodeType) -> frozenset[str]:
    """The names in a function of torch's machinery, of which nothing else is looked at."""
    inner = [_mentioned(one) for one in code.co_consts if type(one) is types.CodeType]
    return frozenset(code.co_names).union(*inner)


def _imported(name: str, space: dict[str, Any]) -> types.ModuleType | None:
    return sys.modules.get(name) or sys.modules.get(f"{space.get('__package__')}.{name}")
