"""Finding the Python values that a step can have read, and a guard for each.

The walk starts at the model, its opaque arguments and the globals that the functions of the observed run look up. From an
object it follows only attributes whose names stand in the code that ran (`code_reads`): what no code names, no code has read.
Containers are followed whole. Looking runs no code of the user's: attributes are taken from the dictionaries and slots they
lie in, entries of dictionaries by the methods of ``dict``.
"""

from __future__ import annotations

import abc
import builtins
import enum
import functools
import logging
import os
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from graphs.errors import Refusal, UnguardedRead
from graphs.guards.python_guards import (
    AliveGuard,
    CellGuard,
    FunctionGuard,
    Guard,
    Guards,
    MappingGuard,
    NamesGuard,
    SequenceGuard,
    SetGuard,
    TypeGuard,
    ValueGuard,
)
from graphs.objects.c_objects import (
    GETTERS,
    VIEWS,
    cannot_be_compared,
    elements_in,
    is_memory,
    is_thread_local,
    local_attributes,
    names_looked_up,
    reader_of,
)
from graphs.objects.cells import ABSENT, LEAVES, Difference, reference_to
from graphs.objects.dict_watch import real_dict
from graphs.objects.libraries import origin_of_code, origin_of_module, origin_of_type
from graphs.objects.raw_access import (
    IMMUTABLE_TYPE,
    attributes_of,
    class_attribute,
    elements_of,
    module_name,
    of_type,
    sequence_class,
    slots_of,
)
from graphs.python_reads.code_reads import CodeReads, global_names, imported_names, names_in, words_in
from graphs.state.c_state import partial_content, variable_content
from graphs.state.counters import Counter
from graphs.state.python_state import Link

Tensor = torch.Tensor
_COMPARED_BY_HOLDING = (Tensor, dict, types.FunctionType, type, functools.partial)
_GRADIENT: Callable[[Tensor], Any] = vars(torch._C.TensorBase)["grad"].__get__
_LIMIT = 200_000  # objects
_NOT_ENTERED = (
    *(types.ModuleType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(torch.Generator, torch.UntypedStorage, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
    *(logging.Manager, logging.Handler),
    *(torch.SymInt, torch.SymFloat, torch.SymBool),
)
_LEAVES = frozenset(
    (*(kind for kind in LEAVES if kind is not enum.Enum), types.NotImplementedType, types.EllipsisType, range, slice)
)
_BY_C = frozenset(("forward", "setup_context"))  # what torch looks up in an autograd.Function
_LOGGED = frozenset(("level", "disabled", "parent", "propagate", "manager"))
_OF_FUNCTIONS = frozenset(("__doc__", "__name__", "__qualname__", "__annotations__", "__module__"))
_TABLES_OF_PYTHON = (type(os.environ),)
_NOT_SETTINGS = frozenset(("modules", "path_importer_cache", "meta_path", "path_hooks", "stdout", "stderr", "stdin"))
"""What the interpreter itself fills, and what is looked at by itself."""
_OF_MODULES = frozenset(
    (
        "__builtins__",
        "__dict__",
        "__spec__",
        "__loader__",
        "__name__",
        "__package__",
        "__path__",
        "__file__",
        "__doc__",
        "__class__",
    )
)
"""What every module has, which is named where the same is asked of something else."""
_FOREIGN = frozenset(("torch", "triton", "typing", "importlib", "threading", "concurrent", "sympy", "abc", "warnings"))
"""Packages whose objects are machinery, not settings of a step; ``torch.nn`` is entered all the same."""
_NOT_METHODS = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "__slots__")
)


def guards_of(
    reads: CodeReads,
    roots: Iterable[tuple[str, Any]],
    advanced: Sequence[Counter] = (),
    links: Sequence[Link] = (),
    uploaded: Sequence[Tensor] = (),
    placed: Iterable[int] = (),
) -> Guards:
    """The guards of a recording.

    Args:
        reads: what the observed run asked for.
        roots: where values can hang, with the names to call them by.
        advanced: numbers that the recording advances itself.
        links: ways to the tensors that the recording reads in place.
        uploaded: host tensors that it holds copies of, whose versions tell of writes.
        placed: see `GuardWalk`.
    """
    walk = GuardWalk(reads, roots, [(counter.container, counter.key) for counter in advanced], placed)
    versions = [ValueGuard("a host tensor's version", functools.partial(_version, tensor), by_value=True) for tensor in uploaded]
    kinds = [ValueGuard(f"the type of {counter.path}", counter.kind) for counter in advanced]
    return walk.guards([*versions, *kinds, *walk.of_links(links)])


class GuardWalk:
    """One walk; `guards` is what came of it.

    Args:
        reads: what the observed run asked for.
        roots: where values can hang, with the names to call them by.
        advanced: container and key of the numbers that the recording advances itself.
        placed: identities of tensors whose place and layout are checked elsewhere.

    Attributes:
        incomparable: what was found that no later call can be compared with.
        complete: False when more hangs on the step than is worth comparing.
    """

    def __init__(
        self,
        reads: CodeReads,
        roots: Iterable[tuple[str, Any]],
        advanced: Iterable[tuple[Any, Any]] = (),
        placed: Iterable[int] = (),
    ) -> None:
        self._reads, self._roots = reads, list(roots)
        self._advanced: dict[int, set[Any]] = {}
        for container, key in advanced:
            self._advanced.setdefault(id(container), set()).add(key)
        self._codes = dict(reads.codes)
        self._extra: set[str] = set()
        self._placed = frozenset(placed)
        self._everything = not reads.complete or reads.computed()
        self.complete = True
        while True:  # functions that were found and did not run in the observed run may run in others
            known = len(self._codes), len(self._extra)
            self._walk()
            if (len(self._codes), len(self._extra)) == known or not self.complete:
                break

    def guards(self, more: Iterable[Guard] = ()) -> Guards:
        """All guards, with ``more`` of the caller's."""
        return Guards(self._watched, [*self._polled, *more])

    def changed(self) -> Difference | None:
        """The first value that is not what it was when the walk saw it."""
        return next((found for guard in (*self._watched, *self._polled) if (found := guard.difference()) is not None), None)

    def of_links(self, links: Sequence[Link]) -> list[Guard]:
        """Guards for ways to tensors that the walk did not find: behind objects that no observed function names."""
        guarded = {id(g.mapping) for g in (*self._watched, *self._polled) if isinstance(g, (MappingGuard, NamesGuard))}
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
        self._names = frozenset(name for code, _ in self._codes.values() for name in names_in(code)) | self._extra | _BY_C
        self.incomparable: list[Refusal] = []
        self._relevant = self._names.__contains__  # not a method of this object, which holds the roots
        self._watched: list[Guard] = []
        self._polled: list[Guard] = []
        self._seen: set[int] = set()
        self._keep: list[Any] = []
        self._weakly: list[tuple[str, weakref.ref[Any]]] = []
        self._chained: set[tuple[int, int]] = set()
        self._pending: list[tuple[str, Any]] = [*self._roots, ("Tensor", Tensor)]
        self._globals()
        if self._reads.environment:
            self._mapping("os.environ[{!r}]", os.environ._data)  # type: ignore[attr-defined]
        for name, setting in self._reads.settings.items():
            self._polled.append(ValueGuard(f"{name}()", setting, by_value=True))
        for variable in self._reads.variables:
            guard = ValueGuard(f"ContextVar({variable.name!r})", functools.partial(variable_content, variable))
            self._polled.append(guard)
            self._pending.append((f"ContextVar({variable.name!r})", guard.value))
        root_ids = {id(root) for _, root in self._roots}
        while self._pending or self._weakly:
            if not self._pending:
                self._held_weakly(*self._weakly.pop())
                continue
            path, value = self._pending.pop()
            if type(value) is types.ModuleType:  # that an object holds, or an argument is
                self._module(path, value, self._names, id(value))
            if type(value) in _LEAVES or of_type(value, _NOT_ENTERED) or id(value) in self._seen:
                continue
            if len(self._seen) > _LIMIT:
                self.complete = False
                return
            self._seen.add(id(value))
            if id(value) not in root_ids:
                self._keep.append(value)
            self._visit(path, value)

    def _mapping(
        self,
        form: str,
        mapping: Mapping[Any, Any],
        relevant: Callable[[Any], bool] | None = None,
        enter: bool = True,
        members: bool = False,
    ) -> None:
        """Guard a dictionary; watched where every write to it can be seen.

        That is not so where an empty one is filled by copying another into it whole, which is nobody's way with the ``members``
        of a module, nor where the order of an ordered one changes.
        """
        guard = MappingGuard(form, mapping, relevant, self._advanced.get(id(mapping), ()))
        unseen = (type(mapping) is dict and not mapping and not members) or (
            isinstance(mapping, OrderedDict) and OrderedDict.__len__(mapping) > 1
        )
        (self._watched if isinstance(mapping, dict) and not unseen else self._polled).append(guard)
        if enter:
            self._pending += [(f"a key of {form.partition('[')[0]}", key) for key, _ in guard.entries if type(key) not in _LEAVES]
            self._pending += [(form.format(key), value) for key, value in guard.entries]

    def _globals(self) -> None:
        spaces: dict[int, tuple[dict[str, Any], set[str], set[str], bool]] = {}
        for code, space in self._codes.values():
            entry = spaces.setdefault(id(space), (space, set(), set(), origin_of_code(code, space) == "user"))
            entry[1].update(global_names(code))
            entry[2].update(names_in(code))
        missing: set[str] = set()
        for space, names, attributes, users in spaces.values():
            missing.update(name for name in names if name not in space)
            guard = NamesGuard("{}", space, frozenset(names), self._advanced.get(id(space), ()))
            (self._polled if users else self._watched).append(guard)  # type: ignore[arg-type]
            for name, value in guard.entries:
                if isinstance(value, types.ModuleType):
                    self._module(name, value, frozenset(attributes), id(space))
                else:
                    self._pending.append((name, value))
        self._watched.append(NamesGuard("builtins.{}", vars(builtins), frozenset(missing)))
        imported: set[str] = set()
        for code, space in self._codes.values():
            for name in imported_names(code):
                package = f"{space.get('__package__')}.{name}"
                imported |= {name, package} - sys.modules.keys()
                module = sys.modules.get(name) or sys.modules.get(package)
                if type(module) is types.ModuleType:
                    self._module(name, module, frozenset(names_in(code)), id(space))
        self._watched.append(NamesGuard("sys.modules[{!r}]", sys.modules, frozenset(imported)))

    def _module(self, path: str, module: types.ModuleType, names: frozenset[str], space: int) -> None:
        """Guard what functions look up in a module that they know by name, and in the modules in it."""
        content = vars(module)
        origin = origin_of_module(module)
        if (id(module), space) in self._chained or origin == "own":
            return
        self._chained.add((id(module), space))
        whole = self._everything and origin == "user"  # `getattr(settings, name)`
        looked_up = (names | content.keys() if whole else names) - _OF_MODULES
        if origin in ("python", "torch") or type(module) is not types.ModuleType:  # which are not, or which fill themselves
            looked_up &= content.keys()
        if origin == "python":  # numbers and texts (sys.argv, math.pi), and functions that were exchanged
            kept = {name for name in looked_up if not isinstance(content[name], (types.ModuleType, *_TABLES_OF_PYTHON))}
            looked_up = frozenset(kept - _NOT_SETTINGS)
        guard = NamesGuard(path + ".{}", content, looked_up)
        (self._polled if origin == "user" else self._watched).append(guard)  # type: ignore[arg-type]
        for name, value in guard.entries:
            if isinstance(value, types.ModuleType):
                self._module(f"{path}.{name}", value, names, space)
            elif origin != "torch" and (origin != "python" or isinstance(value, (list, dict, set))):
                self._pending.append((f"{path}.{name}", value))

    def _visit(self, path: str, value: Any) -> None:
        walk = class_attribute(type(value), "__graphs_walk__")
        if walk is not None:
            self._pending.append((path, walk(value)))
        elif of_type(value, Tensor):
            attributes = attributes_of(value)
            if attributes is not None:
                self._mapping(path + ".{}", attributes, self._relevant, members=True)
            self._tensor(path, value)
        elif type(value) is types.MethodType:
            self._pending += [(path, value.__self__), (path, value.__func__)]
        elif type(value) is types.FunctionType:
            self._function(path, value)
        elif of_type(value, functools.partial):
            self._partial(path, value)
        elif of_type(value, type):
            self._class(value)
        elif of_type(value, (property, staticmethod, classmethod)):
            parts = ("fget", "fset") if isinstance(value, property) else ("__func__",)
            self._pending += [(path, getattr(value, part)) for part in parts]
        elif of_type(value, weakref.ref):
            self._weakly.append((path, value))
            self._object(path, value)
        elif not self._special(path, value):
            self._container(path, value)

    def _partial(self, path: str, value: functools.partial[Any]) -> None:
        parts = partial_content(value)
        reference = reference_to(value)
        for index, name in enumerate(("func", "args", "keywords")):  # `__setstate__` exchanges them
            self._polled.append(ValueGuard(f"{path}.{name}", functools.partial(_part_of, reference, index)))
        self._pending += [(path, part) for part in parts]
        self._extra.update(text for text in parts[1] if isinstance(text, str) and text.isidentifier())
        self._object(path, value)

    def _held_weakly(self, path: str, reference: weakref.ref[Any]) -> None:
        """Guard that an object lives which only this reference is known to lead to, without keeping it alive."""
        value = weakref.ref.__call__(reference)
        if value is None:
            return  # and will be
        self._polled.append(AliveGuard(path, weakref.ref(value)))
        if id(value) in self._seen:
            return
        if of_type(value, _COMPARED_BY_HOLDING) or sequence_class(value) is not None or is_memory(value):
            detail = f"a {type(value).__name__} is held weakly, which what compares it at each call would keep alive"
            self.incomparable.append(UnguardedRead(detail, operator=path))
            return
        self._pending.append((path, value))

    def _tensor(self, path: str, tensor: Tensor) -> None:
        """What a tensor answers that the step does not compute with: its shape, whether it requires a gradient, the gradient."""
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout != torch.strided:
            return
        if id(tensor) not in self._placed:
            self._polled.append(ValueGuard(path, functools.partial(_form_of, tensor), by_value=True))
        if "grad" in self._names:
            self._polled.append(ValueGuard(f"{path}.grad", functools.partial(_GRADIENT, tensor)))
        if "_version" in self._names and not tensor.is_inference():
            self._polled.append(ValueGuard(f"{path}._version", functools.partial(_version, tensor), by_value=True))

    def _container(self, path: str, value: Any) -> None:
        """Lists, dictionaries and the like, which may have attributes too; and all other objects."""
        form, kind = path + "[{!r}]", sequence_class(value)
        if of_type(value, dict):
            self._mapping(form, value)
            if of_type(value, defaultdict):
                factory = class_attribute(defaultdict, "default_factory")
                self._polled.append(ValueGuard(f"{path}.default_factory", functools.partial(factory.__get__, value)))
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

    def _memory(self, path: str, value: Any) -> None:
        read = reader_of(value)
        if read is not None:
            self._polled.append(ValueGuard(path, read, by_value=True))
        self._pending += [(f"{path}[{index}]", item) for index, item in enumerate(elements_in(value))]

    def _special(self, path: str, value: Any) -> bool:
        """Objects of C that need a look of their own; False for all others."""
        kind = type(value)
        if is_memory(value):
            self._memory(path, value)
        elif cannot_be_compared(value):
            detail = f"a {kind.__name__} is used, which gives something else each time, or hides what it stands for"
            self.incomparable.append(UnguardedRead(detail, operator=path))
        elif kind is types.BuiltinMethodType:  # a method of a table: T.get
            self._pending.append((path, value.__self__))
        elif issubclass(kind, GETTERS):
            self._extra.update(word for name in names_looked_up(value) for word in words_in(name))
        elif issubclass(kind, VIEWS):
            self._pending.append((path, value.mapping))
        elif is_thread_local(value):
            self._polled.append(ValueGuard(path, functools.partial(local_attributes, value)))
            self._mapping(path + ".{}", local_attributes(value))
        elif issubclass(kind, logging.Logger):
            self._logger(path, value)
        else:
            return False
        return True

    def _logger(self, path: str, logger: logging.Logger) -> None:
        """Whether a logger writes is decided by its level, its parents', and what is disabled for all."""
        self._mapping(path + ".{}", vars(logger), _LOGGED.__contains__, enter=False)
        self._mapping(path + ".manager.{}", vars(logger.manager), frozenset(("_disable", "disable")).__contains__, enter=False)
        if logger.parent is not None:
            self._pending.append((path + ".parent", logger.parent))

    def _function(self, path: str, function: types.FunctionType) -> None:
        """What hangs on a function. What decorators of libraries and of torch wrap is entered like everything else."""
        code = function.__code__
        users = origin_of_code(code, function.__globals__) == "user"
        if users:
            self._codes.setdefault(id(code), (code, function.__globals__))
            self._polled.append(FunctionGuard(path, function, sorted(_OF_FUNCTIONS & self._names)))
        if users or id(code) in self._codes:
            self._pending += [(f"{path}'s default", default) for default in function.__defaults__ or ()]
            if function.__kwdefaults__:
                self._mapping(path + "'s default {}", function.__kwdefaults__)
        if users or function.__dict__:
            self._mapping(function.__name__ + ".{}", function.__dict__, self._relevant if users else None)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            guard = CellGuard(name, cell)
            if users or id(code) in self._codes:
                self._polled.append(guard)
            self._pending.append((name, guard.value))

    def _class(self, kind: type[Any]) -> None:
        self._pending.append((f"type({kind.__name__})", type(kind)))
        if origin_of_type(kind) == "user":
            self._polled.append(ValueGuard(f"{kind.__name__}.__mro__", functools.partial(type.__getattribute__, kind, "__mro__")))
            if "__name__" in self._names or "__qualname__" in self._names:  # no dictionary holds them
                self._polled.append(ValueGuard(f"{kind.__name__}.__name__", functools.partial(_names_of, kind), by_value=True))
            if issubclass(type(kind), abc.ABCMeta):
                self._polled.append(ValueGuard("abc.get_cache_token()", abc.get_cache_token, by_value=True))
        if issubclass(kind, enum.Enum):
            self._pending += [(f"{kind.__name__}.{member}", kind._member_map_[member]) for member in kind._member_map_]
        for base in type.__getattribute__(kind, "__mro__"):
            if base.__flags__ & IMMUTABLE_TYPE or (id(base) in self._seen and base is not kind):
                continue
            self._seen.add(id(base))
            content = real_dict(type.__getattribute__(base, "__dict__"))
            if content is None or origin_of_type(base) == "python":
                continue
            arguments = content.get("__match_args__")
            self._extra.update(arguments if isinstance(arguments, tuple) else ())
            guard = MappingGuard(
                base.__name__ + ".{}", content, functools.partial(_is_looked_up, self._names), self._advanced.get(id(content), ())
            )
            self._watched.append(guard)
            if origin_of_type(base) != "torch":
                named = [(key, item) for key, item in guard.entries if _is_code(item) or key in self._names]
                self._pending += [(f"{base.__name__}.{key}", item) for key, item in named]

    def _object(self, path: str, value: Any) -> None:
        kind = type(value)
        users = origin_of_type(kind) == "user"
        module = of_type(value, torch.nn.Module)
        package = module_name(kind)
        if not users and not module and package.partition(".")[0] in _FOREIGN and not package.startswith("torch.nn"):
            return
        python = origin_of_type(kind) == "python"  # its code is not observed, so every attribute counts
        whole = python or issubclass(kind, enum.Enum) or (self._everything and (users or not self._reads.complete))
        form, relevant = path + ".{}", None if whole else self._relevant
        if not kind.__flags__ & IMMUTABLE_TYPE:
            (self._polled if users else self._watched).append(TypeGuard(path, value))
        attributes = attributes_of(value)
        if attributes is not None:
            if "__wrapped__" in attributes:
                self._pending.append((path, attributes["__wrapped__"]))
            self._mapping(form, attributes, relevant)
            for members in ("_parameters", "_buffers", "_modules") if module else ():
                held = attributes.get(members)
                if isinstance(held, dict):
                    self._seen.add(id(held))
                    self._mapping(form, held, members=True)
        for name, slot in slots_of(kind).items():
            if relevant is None or relevant(name):
                self._slot(f"{path}.{name}", value, slot)
        self._pending.append((path, kind))

    def _slot(self, path: str, value: Any, slot: types.MemberDescriptorType) -> None:
        guard = ValueGuard(path, functools.partial(_slot_content, slot, reference_to(value)))
        self._polled.append(guard)
        self._pending.append((path, guard.value))


def _is_looked_up(names: frozenset[str], key: str) -> bool:
    """Whether a class attribute is one of ``names``, or looked up by Python itself (``__call__``, ``__len__``)."""
    return key in names or (key.startswith("__") and key.endswith("__") and key not in _NOT_METHODS)


def _is_code(item: Any) -> bool:
    return isinstance(item, (types.FunctionType, property, staticmethod, classmethod))


def _slot_content(descriptor: Any, reference: Callable[[], Any]) -> Any:
    try:
        return descriptor.__get__(reference())
    except (AttributeError, TypeError):  # empty, or the object is gone
        return ABSENT


def _part_of(reference: Callable[[], Any], index: int) -> Any:
    value = reference()
    return ABSENT if value is None else partial_content(value)[index]


def _names_of(kind: type[Any]) -> tuple[Any, Any]:
    return tuple(type.__dict__[name].__get__(kind) for name in ("__name__", "__qualname__"))  # type: ignore[return-value]


def _form_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _held(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError):
        return ABSENT


def _version(tensor: Tensor) -> int:
    return tensor._version
