"""The parts of an output's structure: holes for tensors and for what is handed through, containers, instances of dataclasses."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from graphs.contract.arguments import pytree_children
from graphs.contract.outputs.views import Bits, Layout, Shared
from graphs.objects.raw_access import attributes_of, class_attribute, filled_slots, of_type, slots_of

Tensor = torch.Tensor


class Leaf:
    """A tensor that the replay produces, by position, what is set on it, and its attributes."""

    __slots__ = ("bits", "hung", "index")

    def __init__(self, index: int, bits: Bits, hung: dict[str, Any]) -> None:
        self.index, self.bits, self.hung = index, bits, hung


class Part:
    """A part of a flat tensor that the replay produces: the memory of several outputs."""

    __slots__ = ("hung", "index", "layout", "shared")

    def __init__(self, index: int, shared: Shared, layout: Layout, hung: dict[str, Any]) -> None:
        self.index, self.shared, self.layout, self.hung = index, shared, layout, hung


class Argument:
    """A leaf handed through from the caller: ``opaque`` argument, or tensor argument, by position."""

    __slots__ = ("index", "opaque")

    def __init__(self, index: int, opaque: bool) -> None:
        self.index, self.opaque = index, opaque


class View:
    """A view of an argument of this call, by position, or of a tensor of the step's own."""

    __slots__ = ("hung", "layout", "source")

    def __init__(self, source: int | Tensor, layout: Layout, hung: dict[str, Any]) -> None:
        self.source, self.layout, self.hung = source, layout, hung


class Held:
    """An object that hangs on the model or on an opaque argument, and is returned as it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


HOLES = (Leaf, Part, Argument, View, Held)


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass: an output that is nothing but its attributes."""
    return class_attribute(type(value), "__dataclass_fields__") is not None and not of_type(value, (type, OrderedDict))


def record_parts(value: Any) -> dict[str, Any]:
    """The attributes of a dataclass's instance, those in slots and those that are no fields included."""
    attributes = attributes_of(value) or {}
    return {**filled_slots(slots_of(type(value)), value), **attributes}


def made_record(kind: Any, parts: dict[str, Any]) -> Any:
    """An instance with these attributes; its constructor, which may compute, does not run."""
    made = object.__new__(kind)
    for name, part in parts.items():
        object.__setattr__(made, name, part)
    return made


def children_of(value: Any) -> list[Any] | None:
    """What a container or an instance of a dataclass holds, and what tells it from others; None for a leaf."""
    if type(value) is dict:
        return [list(value), *value.values()]
    if type(value) in (tuple, list):
        return list(value)
    children = pytree_children(value)[0]
    return [type(value), *record_parts(value).values()] if children is None and is_record(value) else children
