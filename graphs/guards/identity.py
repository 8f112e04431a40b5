"""By what a step can know one object from another that is like it: what leads to it, and numbers made of it.

A recording may be pointed at other objects only where the step cannot ask which ones they are. It can ask where the object
also stands elsewhere among what the step looks up (an attribute, a list, a key of a dictionary, also of a weak one), or where a
number stands there that is the object's ``id()``, its default hash, or the address of a tensor.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from graphs.guards.container_guards import MappingGuard, NamesGuard, SequenceGuard, SetGuard
from graphs.guards.guard import Guard
from graphs.guards.value_guards import CellGuard, ValueGuard
from graphs.state.storage import has_storage

Tensor = torch.Tensor
_LEAST = 1 << 16  # smaller numbers are no addresses
_BITS = sys.hash_info.width


def values_held(guards: Iterable[Guard]) -> Iterator[Any]:
    """What stands where guards look, with the items of tuples and frozen sets."""
    for guard in guards:
        if isinstance(guard, (MappingGuard, NamesGuard)):
            for entry in guard.entries:
                yield from _flat(entry)
        elif isinstance(guard, (SequenceGuard, SetGuard)):
            yield from _flat(tuple(guard.items))
        elif isinstance(guard, (ValueGuard, CellGuard)):
            yield from _flat((guard.value,))


def _flat(value: tuple[Any, ...] | frozenset[Any]) -> Iterator[Any]:
    for item in value:
        if type(item) in (tuple, frozenset):
            yield from _flat(item)
        else:
            yield item


def numbers_held(guards: Iterable[Guard]) -> frozenset[int]:
    """The whole numbers among what stands where guards look that may be made of objects."""
    return frozenset(value for value in values_held(guards) if type(value) is int and abs(value) >= _LEAST)


def times_held(guards: Iterable[Guard], wanted: Iterable[int]) -> Counter[int]:
    """How often objects, by identity, stand where guards look."""
    sought = frozenset(wanted)
    return Counter(identity for value in values_held(guards) if (identity := id(value)) in sought)


def numbers_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    """The numbers by which tensors can be known: those of any object, and where they and their storages lie."""
    found: set[int] = set()
    for tensor in tensors:
        found |= numbers_of_identity(id(tensor))
        if has_storage(tensor) and tensor.device.type != "meta":
            found |= {tensor.data_ptr(), tensor.untyped_storage().data_ptr()}
    return frozenset(found)


def numbers_of_identity(identity: int) -> frozenset[int]:
    """The numbers by which any object can be known: its ``id()`` and the default hash."""
    return frozenset((identity, _hash_of(identity)))


def _hash_of(identity: int) -> int:
    """What ``object.__hash__`` makes of an address: its bits rotated by four, as a signed number."""
    rotated = (identity >> 4) | ((identity & 15) << (_BITS - 4))
    return rotated - (1 << _BITS) if rotated >> (_BITS - 1) else rotated
