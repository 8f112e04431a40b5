"""Looking at objects without asking them: nothing here runs a method, property or comparison of the user's.

Attributes are read from where they lie, class attributes along the method resolution order, and containers through the
methods of the class that Python ships, whatever a subclass makes of them (`ACT2FN["silu"]` of transformers instantiates).
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

IMMUTABLE_TYPE = 1 << 8
"""``Py_TPFLAGS_IMMUTABLETYPE``: classes written in C."""
_FUNCTOOLS = functools.wraps.__code__.co_filename
_NOTES = frozenset(("dispatch_cache", "cache_token", "_clear_cache"))
T = TypeVar("T")


def of_type(value: Any, kinds: Any) -> bool:
    """``isinstance`` by the type alone: an object may claim another ``__class__``, and computes the claim."""
    return issubclass(type(value), kinds)


def per_class(answer: Callable[[type[Any]], T]) -> Callable[[type[Any]], T]:
    """Ask a function once for each class. Classes are told apart by identity: a metaclass may compute a hash."""
    known: dict[int, tuple[type[Any], T]] = {}

    @functools.wraps(answer)
    def asked(kind: type[Any]) -> T:
        found = known.get(id(kind))
        if found is None or found[0] is not kind:
            found = known[id(kind)] = kind, answer(kind)
        return found[1]

    return asked


def bases_of(kind: type[Any]) -> tuple[type[Any], ...]:
    """A class and those that it derives from, in the order in which attributes are looked up."""
    bases: tuple[type[Any], ...] = type.__getattribute__(kind, "__mro__")
    return bases


def class_attribute(kind: type[Any], name: str) -> Any:
    """A class attribute as it lies there; None where there is none."""
    for base in bases_of(kind):
        content = type.__getattribute__(base, "__dict__")
        if name in content:
            return content[name]
    return None


def module_name(kind: type[Any]) -> str:
    """Name of the Python module of a class."""
    name = type.__dict__["__module__"].__get__(kind)  # of classes written in C it is computed
    return name if isinstance(name, str) else "builtins"


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The dictionary of an object's attributes; None where it has none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


@per_class
def slots_of(kind: type[Any]) -> dict[str, types.MemberDescriptorType]:
    """The slots of a class written in Python, by name."""
    slots: dict[str, types.MemberDescriptorType] = {}
    for base in bases_of(kind):
        if not base.__flags__ & IMMUTABLE_TYPE:
            content = type.__getattribute__(base, "__dict__")
            found = {name: item for name, item in content.items() if of_type(item, types.MemberDescriptorType)}
            slots = {**found, **slots}
    return {name: slot for name, slot in slots.items() if name not in ("__dict__", "__weakref__")}


def filled_slots(slots: dict[str, types.MemberDescriptorType], value: Any) -> dict[str, Any]:
    """What the slots of an object hold; those that are empty are left out."""
    content = {}
    for name, slot in slots.items():
        try:
            content[name] = slot.__get__(value)
        except AttributeError:
            continue
    return content


def attributes_and_slots(value: Any) -> dict[str, Any]:
    """The attributes of an object, as they lie in its dictionary and its slots."""
    attributes = attributes_of(value) or {}
    slots = slots_of(type(value))
    return {**attributes, **filled_slots(slots, value)} if slots else attributes


def set_attributes_and_slots(value: Any, attributes: dict[str, Any]) -> None:
    """Make attributes and slots of an object those that are given, without asking the object."""
    slots = slots_of(type(value))
    for name, slot in slots.items():
        if name in attributes:
            slot.__set__(value, attributes[name])
    own = attributes_of(value)
    if own is not None:
        own.clear()
        own.update((name, item) for name, item in attributes.items() if name not in slots)


def functions_in(descriptor: Any) -> list[Any]:
    """The functions behind a property, static method or class method."""
    if of_type(descriptor, property):
        return [part for part in (descriptor.fget, descriptor.fset, descriptor.fdel) if part is not None]
    return [descriptor.__func__]


def closure_of(function: types.FunctionType) -> Iterator[tuple[str, types.CellType]]:
    """The cells of a closure, with the names that the function knows them by; but for those of `notes_of`."""
    notes = notes_of(function)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return ((name, cell) for name, cell in cells if name not in notes)


def notes_of(function: types.FunctionType) -> frozenset[str]:
    """Variables and attributes of a function under which ``functools.singledispatch`` keeps what it found for each class.

    It would find the same again. The classes of a tracer are among them.
    """
    return _NOTES if function.__code__.co_filename == _FUNCTOOLS else frozenset()


def mapping_class(mapping: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class of Python's own that a dictionary is made of."""
    return OrderedDict if issubclass(type(mapping), OrderedDict) else dict


def items_of(mapping: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The entries of a dictionary."""
    if type(mapping) is dict:
        return iter(mapping.items())
    return iter(mapping_class(mapping).items(mapping))


def sequence_class(value: Any) -> Any:
    """Which of Python's own containers of items a value is; None for everything else."""
    for kind in (tuple, list, deque, set, frozenset):
        if issubclass(type(value), kind):
            return kind
    return None


def elements_of(value: Any) -> list[Any]:
    """The items of a tuple, list, deque or set."""
    return list(sequence_class(value).__iter__(value))
