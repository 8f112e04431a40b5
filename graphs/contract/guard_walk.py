"""Finding the Python values that a step can have read, and a guard for each.

The walk starts at the model, its opaque arguments and the globals that the functions of the observed run look up. From an
object it follows only attributes whose names stand in the code that ran (`code_reads`): what no code names, no code has read.
Containers are followed whole. Looking runs no code of the user's: attributes are taken from the dictionaries and slots they
lie in, entries of dictionaries by the methods of ``dict``.
"""

from __future__ import annotations

import array
import functools
import logging
import os
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from graphs.contract.code_reads import CodeReads, global_names, names_in
from graphs.contract.counters import Counter
from graphs.contract.dict_watch import real_dict
from graphs.contract.guards import (
    CellGuard,
    FunctionGuard,
    Guard,
    Guards,
    MappingGuard,
    NamesGuard,
    SequenceGuard,
    SetGuard,
    ValueGuard,
)
from graphs.contract.libraries import origin_of_code, origin_of_module, origin_of_type
from graphs.contract.places import ABSENT, LEAVES
from graphs.contract.python_state import Link
from graphs.contract.raw_access import (
    IMMUTABLE_TYPE,
    attributes_of,
    class_attribute,
    elements_of,
    module_name,
    of_type,
    sequence_class,
    slots_of,
)

Tensor = torch.Tensor
_LIMIT = 200_000  # objects
_NOT_ENTERED = (
    *(types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(torch.Generator, torch.UntypedStorage, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
    *(logging.Logger, logging.Manager, logging.Handler, logging.LoggerAdapter),
    *(torch.SymInt, torch.SymFloat, torch.SymBool),
)
_FOREIGN = frozenset(("torch", "triton", "typing", "importlib", "threading", "concurrent", "sympy", "abc", "warnings"))
"""Packages whose objects are machinery, not settings of a step; ``torch.nn`` is entered all the same."""
_NOT_METHODS = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "__slots__")
)
_SMALL = 1 << 24  # bytes of a buffer that are compared at each call


def guards_of(
    reads: CodeReads,
    roots: Iterable[tuple[str, Any]],
    advanced: Sequence[Counter] = (),
    links: Sequence[Link] = (),
    uploaded: Sequence[Tensor] = (),
) -> Guards:
    """The guards of a recording.

    Args:
        reads: what the observed run asked for.
        roots: where values can hang, with the names to call them by.
        advanced: numbers that the recording advances itself.
        links: ways to the tensors that the recording reads in place.
        uploaded: host tensors that it holds copies of, whose versions tell of writes.
    """
    walk = GuardWalk(reads, roots, [(counter.container, counter.key) for counter in advanced])
    versions = [ValueGuard("a host tensor's version", functools.partial(_version, tensor), by_value=True) for tensor in uploaded]
    kinds = [ValueGuard(f"the type of {counter.path}", counter.kind) for counter in advanced]
    return walk.guards([*versions, *kinds, *walk.of_links(links)])


class GuardWalk:
    """One walk; `guards` is what came of it.

    Args:
        reads: what the observed run asked for.
        roots: where values can hang, with the names to call them by.
        advanced: container and key of the numbers that the recording advances itself.

    Attributes:
        complete: False when more hangs on the step than is worth comparing.
    """

    def __init__(self, reads: CodeReads, roots: Iterable[tuple[str, Any]], advanced: Iterable[tuple[Any, Any]] = ()) -> None:
        self._reads, self._roots = reads, list(roots)
        self._advanced: dict[int, set[Any]] = {}
        for container, key in advanced:
            self._advanced.setdefault(id(container), set()).add(key)
        self._codes = dict(reads.codes)
        self._everything = not reads.complete or reads.computed()
        self.complete = True
        while True:  # functions that were found and did not run in the observed run may run in others
            known = len(self._codes)
            self._walk()
            if len(self._codes) == known or not self.complete:
                break

    def guards(self, more: Iterable[Guard] = ()) -> Guards:
        """All guards, with ``more`` of the caller's."""
        return Guards(self._watched, [*self._polled, *more])

    def of_links(self, links: Sequence[Link]) -> list[Guard]:
        """Guards for ways to tensors that the walk did not find: behind objects that no observed function names."""
        guarded = {id(guard.mapping) for guard in self._watched} | {
            id(guard.mapping) for guard in self._polled if isinstance(guard, MappingGuard)
        }
        ways = [link for link in links if id(link.container) not in guarded and not isinstance(link.container, tuple)]
        dicts = {id(link.container): link.container for link in ways if isinstance(link.container, dict)}
        for identity, container in dicts.items():
            keys = {link.key: link.path for link in ways if id(link.container) == identity}
            self._mapping(next(iter(keys.values())).rpartition(".")[0] + ".{}", container, keys.__contains__, enter=False)
        return [
            ValueGuard(link.path, functools.partial(_held, link.container, link.key))
            for link in ways
            if id(link.container) not in dicts
        ]

    def _walk(self) -> None:
        self._names = frozenset(name for code, _ in self._codes.values() for name in names_in(code))
        self._relevant = self._names.__contains__  # not a method of this object, which holds the roots
        self._watched: list[MappingGuard] = []
        self._polled: list[Guard] = []
        self._seen: set[int] = set()
        self._keep: list[Any] = []
        self._pending: list[tuple[str, Any]] = [*self._roots]
        self._globals()
        if self._reads.environment:
            self._mapping("os.environ[{!r}]", os.environ._data)  # type: ignore[attr-defined]
        for name, setting in self._reads.settings.items():
            self._polled.append(ValueGuard(f"torch.{name}()", setting, by_value=True))
        for variable in self._reads.variables:
            self._polled.append(ValueGuard(f"ContextVar({variable.name!r})", functools.partial(variable.get, None)))
        root_ids = {id(root) for _, root in self._roots}
        while self._pending:
            path, value = self._pending.pop()
            if of_type(value, (*LEAVES, *_NOT_ENTERED)) or id(value) in self._seen:
                continue
            if len(self._seen) > _LIMIT:
                self.complete = False
                return
            self._seen.add(id(value))
            if id(value) not in root_ids:
                self._keep.append(value)
            self._visit(path, value)

    def _mapping(
        self, form: str, mapping: Mapping[Any, Any], relevant: Callable[[Any], bool] | None = None, enter: bool = True
    ) -> None:
        """Guard a dictionary; watched where it is one."""
        guard = MappingGuard(form, mapping, relevant, self._advanced.get(id(mapping), ()))
        (self._watched if isinstance(mapping, dict) else self._polled).append(guard)  # type: ignore[attr-defined]
        if enter:
            self._pending += [(form.format(key), value) for key, value in guard.expected.items()]

    def _globals(self) -> None:
        spaces: dict[int, tuple[dict[str, Any], set[str], set[str], bool]] = {}
        for code, space in self._codes.values():
            entry = spaces.setdefault(id(space), (space, set(), set(), origin_of_code(code, space) == "user"))
            entry[1].update(global_names(code))
            entry[2].update(names_in(code))
        chained: set[tuple[int, int]] = set()
        for space, names, attributes, users in spaces.values():
            guard = NamesGuard("{}", space, frozenset(names), self._advanced.get(id(space), ()))
            (self._polled if users else self._watched).append(guard)  # type: ignore[arg-type]
            for name, value in guard.expected.items():
                if isinstance(value, types.ModuleType):
                    self._module(name, value, frozenset(attributes), id(space), chained)
                else:
                    self._pending.append((name, value))

    def _module(
        self, path: str, module: types.ModuleType, names: frozenset[str], space: int, chained: set[tuple[int, int]]
    ) -> None:
        """Guard what functions look up in a module that they know by name, and in the modules in it."""
        content = vars(module)
        origin = origin_of_module(module)
        if (id(module), space) in chained or origin in ("python", "own"):
            return
        chained.add((id(module), space))
        looked_up = frozenset(name for name in names if name in content and not name.startswith("__"))
        guard = NamesGuard(path + ".{}", content, looked_up)
        (self._polled if origin == "user" else self._watched).append(guard)  # type: ignore[arg-type]
        for name, value in guard.expected.items():
            if isinstance(value, types.ModuleType):
                self._module(f"{path}.{name}", value, names, space, chained)
            elif origin != "torch":
                self._pending.append((f"{path}.{name}", value))

    def _visit(self, path: str, value: Any) -> None:
        walk = class_attribute(type(value), "__graphs_walk__")
        if walk is not None:
            self._pending.append((path, walk(value)))
        elif of_type(value, Tensor):
            attributes = attributes_of(value)
            if attributes:
                self._mapping(path + ".{}", attributes, self._relevant)
        elif type(value) is types.MethodType:
            self._pending += [(path, value.__self__), (path, value.__func__)]
        elif type(value) is types.FunctionType:
            self._function(path, value)
        elif of_type(value, functools.partial):
            self._pending += [(path, value.func), (path, value.args), (path, value.keywords)]
        elif of_type(value, type):
            self._class(value)
        elif of_type(value, (property, staticmethod, classmethod)):
            parts = ("fget", "fset") if isinstance(value, property) else ("__func__",)
            self._pending += [(path, getattr(value, part)) for part in parts]
        elif of_type(value, weakref.ref):
            self._polled.append(ValueGuard(path, value))
            self._pending.append((path, value()))
        elif not self._buffer(path, value):
            self._container(path, value)

    def _container(self, path: str, value: Any) -> None:
        """Lists, dictionaries and the like, which may have attributes too; and all other objects."""
        form, kind = path + "[{!r}]", sequence_class(value)
        if of_type(value, dict):
            self._mapping(form, value)
        elif type(value) is types.MappingProxyType:
            inner = real_dict(value)
            if inner is not None:
                self._mapping(form, inner)
        elif kind is not None:
            items = elements_of(value)
            if kind in (list, deque):
                self._polled.append(SequenceGuard(form, value, items, self._advanced.get(id(value), ())))
            elif kind is set:
                self._polled.append(SetGuard(path + "{}", value))
            self._pending += [(form.format(index), item) for index, item in enumerate(items)]
        if type(value) not in (dict, list, tuple, set, frozenset, deque, OrderedDict):
            self._object(path, value)

    def _buffer(self, path: str, value: Any) -> bool:
        """Memory of bytes: numpy arrays, ``array.array``, bytearrays, views of them."""
        if of_type(value, (bytearray, array.array, memoryview)):
            self._polled.append(ValueGuard(path, functools.partial(bytes, memoryview(value).cast("B")), by_value=True))
            return True
        if module_name(type(value)).partition(".")[0] != "numpy":
            return False
        if hasattr(value, "tobytes") and value.nbytes <= _SMALL and not value.dtype.hasobject:
            self._polled.append(ValueGuard(path, value.tobytes, by_value=True))
        return True

    def _function(self, path: str, function: types.FunctionType) -> None:
        code = function.__code__
        users = origin_of_code(code, function.__globals__) == "user"
        if id(code) not in self._codes:
            if not users:
                return
            self._codes[id(code)] = (code, function.__globals__)
        if users:
            self._polled.append(FunctionGuard(path, function))
        self._pending += [(f"{path}'s default", default) for default in function.__defaults__ or ()]
        if function.__kwdefaults__:
            self._mapping(path + "'s default {}", function.__kwdefaults__)
        if function.__dict__:
            self._mapping(function.__name__ + ".{}", function.__dict__)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            guard = CellGuard(name, cell)
            if users:
                self._polled.append(guard)
            self._pending.append((name, guard.value))

    def _class(self, kind: type[Any]) -> None:
        for base in type.__getattribute__(kind, "__mro__"):
            if base.__flags__ & IMMUTABLE_TYPE or (id(base) in self._seen and base is not kind):
                continue
            self._seen.add(id(base))
            content = real_dict(type.__getattribute__(base, "__dict__"))
            if content is None or origin_of_type(base) == "python":
                continue
            guard = MappingGuard(
                base.__name__ + ".{}", content, functools.partial(_is_looked_up, self._names), self._advanced.get(id(content), ())
            )
            self._watched.append(guard)
            if origin_of_type(base) != "torch":
                named = [(key, item) for key, item in guard.expected.items() if _is_code(item) or not key.startswith("__")]
                self._pending += [(f"{base.__name__}.{key}", item) for key, item in named]

    def _object(self, path: str, value: Any) -> None:
        kind = type(value)
        users = origin_of_type(kind) == "user"
        module = of_type(value, torch.nn.Module)
        package = module_name(kind)
        if not users and not module and package.partition(".")[0] in _FOREIGN and not package.startswith("torch.nn"):
            return
        whole = self._everything and (users or not self._reads.complete)
        form, relevant = path + ".{}", None if whole else self._relevant
        attributes = attributes_of(value)
        if attributes is not None:
            self._mapping(form, attributes, relevant)
            for members in ("_parameters", "_buffers", "_modules") if module else ():
                held = attributes.get(members)
                if isinstance(held, dict):
                    self._seen.add(id(held))
                    self._mapping(form, held)
        for name, slot in slots_of(kind).items():
            if relevant is None or relevant(name):
                self._slot(f"{path}.{name}", value, slot)
        self._pending.append((path, kind))

    def _slot(self, path: str, value: Any, slot: types.MemberDescriptorType) -> None:
        guard = ValueGuard(path, functools.partial(_slot_content, slot, value))
        self._polled.append(guard)
        self._pending.append((path, guard.value))


def _is_looked_up(names: frozenset[str], key: str) -> bool:
    """Whether a class attribute is one of ``names``, or looked up by Python itself (``__call__``, ``__len__``)."""
    return key in names or (key.startswith("__") and key.endswith("__") and key not in _NOT_METHODS)


def _is_code(item: Any) -> bool:
    return isinstance(item, (types.FunctionType, property, staticmethod, classmethod))


def _slot_content(descriptor: Any, value: Any) -> Any:
    try:
        return descriptor.__get__(value)
    except AttributeError:
        return None


def _held(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError):
        return ABSENT


def _version(tensor: Tensor) -> int:
    return tensor._version
