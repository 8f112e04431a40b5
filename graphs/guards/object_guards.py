"""The guards of one object, by its kind, and what it leads to.

Each function here adds the guards of an object to a traversal, and enters what is to be looked at next.
"""

from __future__ import annotations

import abc
import enum
import functools
import logging
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch

from graphs.guards.container_guards import MappingGuard, SequenceGuard, SetGuard
from graphs.guards.memory_guards import guard_inside, guard_memory, keeps_memory
from graphs.guards.traversal import Traversal
from graphs.guards.value_guards import AliveGuard, CellGuard, FunctionGuard, TypeGuard
from graphs.objects.c_objects import held_inside, local_attributes, names_looked_up, partial_content
from graphs.objects.cells import ABSENT, reference_to
from graphs.objects.dict_watch import real_dict
from graphs.objects.kinds import Kind, kind_of
from graphs.objects.libraries import in_torchs_models, origin_of_code, origin_of_type
from graphs.objects.raw_access import (
    IMMUTABLE_TYPE,
    attributes_of,
    bases_of,
    class_attribute,
    closure_of,
    elements_of,
    filled_slots,
    functions_in,
    module_name,
    notes_of,
    of_type,
    sequence_class,
    slots_of,
)
from graphs.objects.special_names import DECIDE_LOGGING, DESCRIPTIONS, LAYER_MEMBERS, OF_CLASSES, OF_FUNCTIONS
from graphs.python_reads.code_reads import words_in

Tensor = torch.Tensor
_COMPARED_BY_HOLDING = (Tensor, dict, types.FunctionType, type, functools.partial)
_WITHOUT_ATTRIBUTES = (dict, list, tuple, set, frozenset, deque, OrderedDict)
_GRADIENT: Callable[[Tensor], Any] = vars(torch._C.TensorBase)["grad"].__get__
_FOREIGN = frozenset(("torch", "triton", "typing", "importlib", "threading", "concurrent", "sympy", "abc", "warnings"))
"""Packages whose objects are machinery, not settings of a step; torch's layers and the like are entered all the same."""


def guard_object(into: Traversal, path: str, value: Any) -> None:
    """Add the guards of an object, and enter what it leads to."""
    _VISITS.get(kind_of(value), _container)(into, path, value)


def guard_weakly_held(into: Traversal, path: str, reference: weakref.ref[Any]) -> None:
    """Guard that an object lives which only this reference is known to lead to, without keeping it alive."""
    value = weakref.ref.__call__(reference)
    if value is None:
        return  # and will be
    into.add(AliveGuard(path, weakref.ref(value)))
    if id(value) in into.seen:
        return
    held = of_type(value, _COMPARED_BY_HOLDING) or sequence_class(value) is not None
    if held or keeps_memory(value):
        into.refuse(path, f"a {type(value).__name__} is held weakly, which what compares it at each call would keep alive")
        return
    into.enter(path, value)


def version_of(tensor: Tensor) -> int:
    """How often operators have written to a tensor."""
    return tensor._version


def _stand_in(into: Traversal, path: str, value: Any) -> None:
    into.enter(path, class_attribute(type(value), "__graphs_walk__")(value))


def _tensor(into: Traversal, path: str, tensor: Tensor) -> None:
    """What a tensor answers that the step does not compute with: its shape, whether it requires a gradient, the gradient."""
    attributes = attributes_of(tensor)
    if attributes is not None:
        into.mapping(path + ".{}", attributes, into.relevant, members=True)
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout != torch.strided:
        return
    if id(tensor) not in into.scope.placed:
        into.add_value(path, functools.partial(layout_of, tensor), by_value=True)
    if "grad" in into.names:
        into.add_value(f"{path}.grad", functools.partial(_GRADIENT, tensor))
    if "_version" in into.names and not tensor.is_inference():
        into.add_value(f"{path}._version", functools.partial(version_of, tensor), by_value=True)


def _method(into: Traversal, path: str, value: Any) -> None:
    into.pending += [(path, value.__self__), (path, value.__func__)]


def _function(into: Traversal, path: str, function: types.FunctionType) -> None:
    """What hangs on a function. What decorators of libraries and of torch wrap is entered like everything else."""
    code, codes = function.__code__, into.scope.codes
    users = origin_of_code(code, function.__globals__) == "user"
    if users:
        codes.setdefault(id(code), (code, function.__globals__))
        into.add(FunctionGuard(path, function, sorted(OF_FUNCTIONS & into.names)))
    if users or id(code) in codes:
        into.pending += [(f"{path}'s default", default) for default in function.__defaults__ or ()]
        if function.__kwdefaults__:
            into.mapping(path + "'s default {}", function.__kwdefaults__)
    if users or function.__dict__:
        notes = notes_of(function)
        others = functools.partial(_is_none_of, notes) if notes else None
        into.mapping(function.__name__ + ".{}", function.__dict__, into.relevant if users else others)
    for name, cell in closure_of(function):
        guard = CellGuard(name, cell)
        if users or id(code) in codes:
            into.add(guard)
        into.enter(name, guard.value)


def _partial(into: Traversal, path: str, value: functools.partial[Any]) -> None:
    parts = partial_content(value)
    reference = reference_to(value)
    for index, name in enumerate(("func", "args", "keywords")):  # `__setstate__` exchanges them
        into.add_value(f"{path}.{name}", functools.partial(_part_of, reference, index))
    into.pending += [(path, part) for part in parts]
    into.scope.extra.update(text for text in parts[1] if isinstance(text, str) and text.isidentifier())
    _plain_object(into, path, value)


def _weak_reference(into: Traversal, path: str, value: weakref.ref[Any]) -> None:
    into.weakly.append((path, value))
    _plain_object(into, path, value)


def _class(into: Traversal, path: str, kind: type[Any]) -> None:
    into.enter(f"type({kind.__name__})", type(kind))
    if origin_of_type(kind) == "user":
        _of_users_class(into, kind)
    if issubclass(kind, enum.Enum):
        into.pending += [(f"{kind.__name__}.{member}", kind._member_map_[member]) for member in kind._member_map_]
    for base in bases_of(kind):
        if base.__flags__ & IMMUTABLE_TYPE or (id(base) in into.seen and base is not kind):
            continue
        into.seen.add(id(base))
        content = real_dict(type.__getattribute__(base, "__dict__"))
        if content is None or origin_of_type(base) == "python":
            continue
        arguments = content.get("__match_args__")
        into.scope.extra.update(arguments if isinstance(arguments, tuple) else ())
        relevant = functools.partial(_is_looked_up, into.names)
        guard = MappingGuard(base.__name__ + ".{}", content, relevant, into.advanced_in(content))
        into.add(guard, watched=True)
        if origin_of_type(base) != "torch":
            named = [(key, item) for key, item in guard.entries if _is_code(item) or key in into.names]
            into.pending += [(f"{base.__name__}.{key}", item) for key, item in named]


def _of_users_class(into: Traversal, kind: type[Any]) -> None:
    """What of a class no dictionary holds."""
    into.add_value(f"{kind.__name__}.__mro__", functools.partial(type.__getattribute__, kind, "__mro__"))
    if "__name__" in into.names or "__qualname__" in into.names:
        into.add_value(f"{kind.__name__}.__name__", functools.partial(_names_of, kind), by_value=True)
    if issubclass(type(kind), abc.ABCMeta):
        into.add_value("abc.get_cache_token()", abc.get_cache_token, by_value=True)


def _descriptor(into: Traversal, path: str, value: Any) -> None:
    into.pending += [(path, function) for function in functions_in(value)]


def _memory(into: Traversal, path: str, value: Any) -> None:
    guard_memory(into, path, value)
    if attributes_of(value) is not None:  # of NumPy, and written in Python
        _plain_object(into, path, value)


def _iterator(into: Traversal, path: str, value: Any) -> None:
    detail = f"a {type(value).__name__} is used, which gives something else each time, or hides what it stands for"
    into.refuse(path, detail)


def _inside_c_object(into: Traversal, path: str, value: Any) -> None:
    into.pending += [(path, item) for _, item in held_inside(value)]


def _getter(into: Traversal, path: str, value: Any) -> None:
    into.scope.extra.update(word for name in names_looked_up(value) for word in words_in(name))


def _thread_local(into: Traversal, path: str, value: Any) -> None:
    into.add_value(path, functools.partial(local_attributes, value))
    into.mapping(path + ".{}", local_attributes(value))


def _logger(into: Traversal, path: str, logger: logging.Logger) -> None:
    """Whether a logger writes is decided by its level, its parents', and what is disabled for all."""
    into.mapping(path + ".{}", vars(logger), DECIDE_LOGGING.__contains__, enter=False)
    into.mapping(path + ".manager.{}", vars(logger.manager), frozenset(("_disable", "disable")).__contains__, enter=False)
    if logger.parent is not None:
        into.enter(path + ".parent", logger.parent)


def _container(into: Traversal, path: str, value: Any) -> None:
    """Lists, dictionaries and the like, which may have attributes too; and all other objects."""
    form, kind = path + "[{!r}]", sequence_class(value)
    if of_type(value, dict):
        into.mapping(form, value)
        if of_type(value, defaultdict):
            factory = class_attribute(defaultdict, "default_factory")
            into.add_value(f"{path}.default_factory", functools.partial(factory.__get__, value))
    elif type(value) is types.MappingProxyType:
        inner = real_dict(value)
        if inner is not None:
            into.mapping(form, inner)
    elif kind is not None:
        items = elements_of(value)
        if kind in (list, deque):
            into.add(SequenceGuard(form, value, items, into.advanced_in(value)))
        elif kind is set:
            into.add(SetGuard(path + "{}", value))
        into.pending += [(form.format(index), item) for index, item in enumerate(items)]
    if type(value) not in _WITHOUT_ATTRIBUTES:
        guard_inside(into, path, value)
        _plain_object(into, path, value)


def _plain_object(into: Traversal, path: str, value: Any) -> None:
    """Class, attributes and slots of an object."""
    kind = type(value)
    origin, layer, package = origin_of_type(kind), of_type(value, torch.nn.Module), module_name(kind)
    users = origin == "user"
    if not users and not layer and package.partition(".")[0] in _FOREIGN and not in_torchs_models(package):
        return
    whole = (
        origin == "python"  # its code is not observed, so every attribute counts
        or issubclass(kind, enum.Enum)
        or (into.scope.everything and (users or not into.scope.reads.complete))
    )
    relevant = None if whole else into.relevant
    lazy = _filled_later(into, kind, value) if origin == "python" else frozenset()
    if lazy and relevant is None:
        relevant = functools.partial(_is_none_of, lazy)
    if not kind.__flags__ & IMMUTABLE_TYPE:
        into.add(TypeGuard(path, value), watched=not users)
    _attributes(into, path, value, relevant, layer=layer)
    for name, slot in slots_of(kind).items():
        if relevant is None or relevant(name):
            read = functools.partial(_slot_content, slot, reference_to(value))
            into.enter(f"{path}.{name}", into.add_value(f"{path}.{name}", read))
    into.enter(path, kind)


def _attributes(into: Traversal, path: str, value: Any, relevant: Callable[[Any], bool] | None, *, layer: bool) -> None:
    attributes = attributes_of(value)
    if attributes is None:
        return
    if "__wrapped__" in attributes:
        into.enter(path, attributes["__wrapped__"])
    form = path + ".{}"
    into.mapping(form, attributes, relevant)
    for members in LAYER_MEMBERS if layer else ():
        held = attributes.get(members)
        if isinstance(held, dict):
            into.seen.add(id(held))
            into.mapping(form, held, members=True)


def _is_looked_up(names: frozenset[str], key: str) -> bool:
    """Whether a class attribute is one of ``names``, or looked up by Python itself (``__call__``, ``__len__``)."""
    return key in names or (key.startswith("__") and key.endswith("__") and key not in OF_CLASSES and key not in DESCRIPTIONS)


def _filled_later(into: Traversal, kind: type[Any], value: Any) -> frozenset[str]:
    """Slots and cached properties of a class of Python's own that are empty: whoever looks at the object fills them with what
    they mean already. The step did not look, or it would have filled them itself.
    """
    slots = slots_of(kind)
    caches = (name for base in bases_of(kind) for name, item in vars(base).items() if of_type(item, functools.cached_property))
    filled = filled_slots(slots, value).keys() | (attributes_of(value) or {}).keys()
    return frozenset((*slots, *caches)) - filled - into.names


def _is_none_of(names: frozenset[str], key: Any) -> bool:
    return key not in names


def _is_code(item: Any) -> bool:
    return kind_of(item) in (Kind.FUNCTION, Kind.DESCRIPTOR)


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


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and what it answers of that."""
    storage = tensor.untyped_storage()
    return tensor.data_ptr(), storage.data_ptr(), storage.nbytes(), tensor.storage_offset(), tensor.is_leaf


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor answers of itself besides its values."""
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, tensor.requires_grad


_VISITS: dict[Kind, Callable[[Traversal, str, Any], None]] = {
    Kind.STAND_IN: _stand_in,
    Kind.TENSOR: _tensor,
    Kind.METHOD: _method,
    Kind.FUNCTION: _function,
    Kind.PARTIAL: _partial,
    Kind.WEAK_REFERENCE: _weak_reference,
    Kind.CLASS: _class,
    Kind.DESCRIPTOR: _descriptor,
    Kind.NUMPY: _memory,
    Kind.MEMORY: _memory,
    Kind.ITERATOR: _iterator,
    Kind.COROUTINE: _iterator,
    Kind.BOUND_BUILTIN: _inside_c_object,
    Kind.VIEW: _inside_c_object,
    Kind.GETTER: _getter,
    Kind.THREAD_LOCAL: _thread_local,
    Kind.LOGGER: _logger,
}
"""Kinds that are not looked at as containers with attributes, as all others are."""
