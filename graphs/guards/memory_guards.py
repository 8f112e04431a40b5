"""Guards of what C code keeps of an object: memory that is no tensor, files in memory, queues and digests, objects of C++.

It is compared by value at each call where it is small enough for that; what is not, or hides behind an address, refuses the step.
"""

from __future__ import annotations

from typing import Any

import torch

from graphs.guards.traversal import Traversal
from graphs.objects.c_objects import Memory, elements_in, memory_of
from graphs.objects.kinds import Kind, kind_of
from graphs.state.c_state import IN_MEMORY, cell_inside, leads_to_memory

_PACKED = tuple(
    f"__torch__.torch.classes.{namespace}." for namespace in ("quantized", "rnn", "sparse", "xnnpack", "mkldnn", "mkl")
)
"""Names of the classes of torch's that hold packed weights."""


def guard_memory(into: Traversal, path: str, value: Any) -> None:
    """Guard the memory of an object, if it has any, and enter the objects in an array of them."""
    memory = memory_of(value)
    if memory is None:
        return
    if leads_to_memory(value):
        into.refuse(path, f"a {type(value).__name__} leads to memory that cannot be compared at each call")
    else:
        _compare(into, path, value, memory)
    into.pending += [(f"{path}[{index}]", item) for index, item in enumerate(elements_in(value))]


def guard_inside(into: Traversal, path: str, value: Any) -> None:
    """Guard what an object of any class holds that no attribute of it shows."""
    kind = type(value)
    if kind is torch.ScriptObject:
        if not value._type().qualified_name().startswith(_PACKED):  # packed weights are made anew, never written
            into.refuse(path, f"what a {value._type().qualified_name()} of C++ holds cannot be compared at each call")
        return
    if issubclass(kind, (bytes, BaseException)):  # cannot change; the arguments of an exception are attributes to it
        return
    if not issubclass(kind, IN_MEMORY) and memory_of(value) is not None:
        guard_memory(into, path, value)
        return
    cell = cell_inside(path, value)
    if cell is not None:
        content = cell.content if issubclass(kind, IN_MEMORY) else None
        _compare(into, path, value, Memory(len(content[0]) if content else 0, cell.read))


def keeps_memory(value: Any) -> bool:
    """Whether what compares an object at each call holds the object."""
    return kind_of(value) is Kind.NUMPY or issubclass(type(value), IN_MEMORY) or memory_of(value) is not None


def _compare(into: Traversal, path: str, value: Any, memory: Memory) -> None:
    if memory.is_small:
        into.add_value(path, memory.read, by_value=True)
        return
    size = f"{memory.size / 1e6:.0f} MB in a {type(value).__name__}"
    into.refuse(path, f"memory that is no tensor ({size}) is too large to be compared at each call; pass a tensor")
