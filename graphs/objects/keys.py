"""Keys of constants: two values have equal keys only if no code could tell them apart.

Python's own equality is too coarse for that: 1, 1.0 and True are equal, 0.0 and -0.0 too, and a subclass may say of itself
that it equals anything, or print the same as another. Values are taken from below what a subclass can override.
"""

from __future__ import annotations

import enum
import functools
import struct
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from graphs.objects.raw_access import IMMUTABLE_TYPE, attributes_and_slots, attributes_of, class_attribute, filled_slots, slots_of

PLAIN = frozenset(
    (type(None), bool, int, str, bytes, type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
)
"""Types whose values are their own keys, once the type stands beside them."""
NOT_CONSTANT = object()
"""What `constant_key` gives for a value that is no constant."""
_OF_MEMBERS = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_", "_hashable_values_", "_inverted_"))
_DEEPEST = 8  # objects within one another that are keys by what they hold
_ATOMS = (int, float, complex, str, bytes)


class _Same:
    """One object, equal to nothing else."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def constant_key(value: Any) -> Any:
    """The key of a number, text, enum member, range, slice of these, or scalar of NumPy; else `NOT_CONSTANT`."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind in _ATOMS:
        return kind, _atom(value), ()
    if kind is slice:
        parts = [constant_key(part) for part in (value.start, value.stop, value.step)]
        return (slice, *parts) if NOT_CONSTANT not in parts else NOT_CONSTANT
    if kind is range:
        return range, *(constant_key(part) for part in (value.start, value.stop, value.step))
    numpy, is_member = sys.modules.get("numpy"), issubclass(kind, enum.Enum)
    if numpy is not None and issubclass(kind, numpy.generic) and not is_member:
        return kind, str(numpy.generic.dtype.__get__(value).descr), numpy.generic.tobytes(value)
    if is_member or issubclass(kind, _ATOMS):
        return _subclass_key(value, attributes_of(value) or {})
    return NOT_CONSTANT


def _subclass_key(value: Any, attributes: dict[str, Any]) -> Any:
    """The key of a member of an enumeration, or of a number or text of a subclass; `NOT_CONSTANT` where more hangs on it than
    a key can hold.
    """
    kind = type(value)
    if issubclass(kind, enum.Enum):  # members are made once; only their name and a value that cannot change may hang on them
        is_bare = attributes.keys() <= _OF_MEMBERS and constant_key(attributes.get("_value_")) is not NOT_CONSTANT
        return _Same(value) if is_bare else NOT_CONSTANT
    if any(type.__getattribute__(base, "__dict__").get("__slots__") for base in type.__getattribute__(kind, "__mro__")):
        return NOT_CONSTANT
    key = nested_key(attributes)
    return (kind, _atom(value), key) if key is not NOT_CONSTANT else NOT_CONSTANT


def _atom(value: Any) -> Any:
    """What a number or text holds, whatever its class overrides."""
    kind = type(value)
    if issubclass(kind, float):
        return struct.pack("d", value)
    if issubclass(kind, complex):
        return struct.pack("dd", complex.real.__get__(value), complex.imag.__get__(value))
    if issubclass(kind, int):
        return int.__add__(value, 0)
    return str.__str__(value) if issubclass(kind, str) else bytes.__getitem__(value, slice(None))


def nested_key(value: Any) -> Any:
    """The key of a constant, or of tuples, lists, sets and dicts of constants; else `NOT_CONSTANT`."""
    kind = type(value)
    if kind in (tuple, list):
        items: Any = tuple(nested_key(item) for item in value)
    elif kind is dict:
        items = tuple((nested_key(key), nested_key(item)) for key, item in value.items())
    elif kind in (set, frozenset):
        items = frozenset(nested_key(item) for item in value)
    else:
        return constant_key(value)
    flat = [part for pair in items for part in pair] if kind is dict else items
    return (kind, items) if NOT_CONSTANT not in flat else NOT_CONSTANT


def names_key(names: Any) -> tuple[Any, ...]:
    """The key of the keys of a dict, in their order."""
    return tuple([name if type(name) is str else context_key(name) for name in names])


def context_key(
    context: Any, objects: list[Any] | None = None, child_keys: Mapping[int, Any] | None = None, depth: int = 0
) -> Any:
    """The key of what a container of a registered kind holds beside its children.

    Constants, and lists and the like of them, as `nested_key` takes them; objects by the attributes that they have now, whatever
    they themselves call equal; all else by identity.

    Args:
        objects: what the key knows by identity alone is added here, for its changes to be watched.
        child_keys: keys of the children, which are part of the call elsewhere, by identity.
    """
    kind = type(context)
    if child_keys and id(context) in child_keys:
        return child_keys[id(context)]
    if depth <= _DEEPEST:
        inner = functools.partial(context_key, objects=objects, child_keys=child_keys, depth=depth + 1)
        if kind in (tuple, list):
            return kind, tuple(map(inner, context))
        if kind is dict:
            return kind, tuple((inner(key), inner(item)) for key, item in context.items())
        key = nested_key(context)
        if key is not NOT_CONSTANT:
            return key
        if issubclass(kind, tuple) and class_attribute(kind, "_fields") is not None:
            return kind, tuple(map(inner, tuple.__iter__(context)))
        made_in_python = class_attribute(kind, "__new__") is object.__new__  # else it may hold what cannot be seen
        if made_in_python and not issubclass(kind, (type, ModuleType)):
            return kind, inner({**(attributes_of(context) or {}), **filled_slots(slots_of(kind), context)})
    if objects is not None and not (issubclass(kind, type) and context.__flags__ & IMMUTABLE_TYPE):
        objects.append(context)
    return _Same(context)


def attributes_key(value: Any, children: list[Any], objects: list[Any]) -> Any:
    """The key of the attributes of a container of a registered kind, which the step can read whatever the kind's children are.

    An attribute that is a child, or a list of them, is known by their positions. ``objects`` as in `context_key`.
    """
    attributes = attributes_and_slots(value)
    if not attributes:
        return ()
    child_keys = {id(child): ("child", index) for index, child in enumerate(children)}
    return tuple([(name, context_key(item, objects, child_keys)) for name, item in attributes.items()])


def objects_on(tensor: torch.Tensor) -> list[str]:
    """Names of attributes of a tensor that are no constants."""
    return [name for name, value in tensor.__dict__.items() if nested_key(value) is NOT_CONSTANT]
