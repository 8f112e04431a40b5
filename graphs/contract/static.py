"""Static tensors: what a recording reads in place has to be where it was.

Each call checks that static arguments are the same memory, that the whole way from the model or an opaque argument to
every tensor is the same (``model.cache``, its ``layers``, their ``keys``), and that no storage was exchanged under a
tensor (``param.data = ...``; ``.to()`` does it to all). Two things keep that cheap for large models. A parameter or
submodule replaced by assignment announces itself through torch's registration hooks (`registrations`). And of more than
`WINDOW` tensors, each call looks at the storages of the next `WINDOW`: one exchanged alone, under the same tensor, is
noticed within ``tensors / WINDOW`` calls, all of them exchanged at the next call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch.nn.modules import module as _module

from graphs.contract.identity import identity_check
from graphs.contract.operators import storage_id
from graphs.contract.python_state import Link
from graphs.contract.slots import extent
from graphs.errors import MovedStaticTensor

Tensor = torch.Tensor
WINDOW = 16  # about 1 us per call
_REMEMBERED = 1024  # addresses of arguments known to lie apart from what the step writes


class _Registrations:
    """How often a parameter or submodule was registered in one of the modules that recordings were made of."""

    def __init__(self) -> None:
        self.count = 0
        self.watched: set[int] = set()
        for register in (
            _module.register_module_parameter_registration_hook,
            _module.register_module_module_registration_hook,
        ):
            register(self._registered)

    def _registered(self, module: torch.nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():  # a traced count would recompile at every slice of a ModuleList
            return
        if id(module._parameters) in self.watched or id(module._modules) in self.watched:
            self.count += 1


registrations = _Registrations()


_data_ptr = Tensor.data_ptr


class StaticTensors:
    """Where the static tensors of one recording were when it was made.

    Args:
        arguments: position, name and tensor of the static arguments.
        externals: tensors read in place that are not arguments.
        written: those of both that the step writes: another argument must not share their memory.
        owners: links to tensors, from `PythonState`; those of other tensors are ignored.
        longest: bytes that a copied argument extends over at most; None where that is not known.
        copied_back: positions of copied arguments that the step writes: no other tensor must share their memory.
        same: positions of arguments that are the very object at another position.
    """

    def __init__(
        self,
        arguments: Sequence[tuple[int, str, Tensor]],
        externals: Sequence[Tensor],
        written: Sequence[Tensor],
        owners: Sequence[Link],
        longest: int | None = None,
        copied_back: Sequence[int] = (),
        same: Sequence[int] = (),
    ) -> None:
        self._arguments = [(index, name, tensor.data_ptr()) for index, name, tensor in arguments]
        static = {index for index, _, _ in arguments}
        self._written = _Memory((w.data_ptr(), w.data_ptr() + extent(w)) for w in written if w.numel())
        self._in_place = _Memory(map(_storage_range, externals))
        self._copied_back, self._same = list(copied_back), {*same}
        self._longest = longest
        self._static = static
        self._apart: set[int] = set()
        used = {storage_id(tensor) for tensor in externals}
        hanging = [owner for owner in owners if storage_id(owner.value) in used]
        links = {(id(link.container), link.key): link for owner in hanging for link in _way(owner)}
        self._registered = [link for link in links.values() if link.registered]
        registrations.watched.update(id(link.container) for link in self._registered)
        self._attributes = [link for link in links.values() if not link.registered]
        self._attributes_hold = identity_check((link.container, link.key, link.value) for link in self._attributes)
        self._names = {id(owner.value): owner.path for owner in hanging}
        tensors = {id(t): t for t in [*externals, *(owner.value for owner in hanging)]}.values()
        self._tensors = list(tensors)
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._windows = cycle(
            (self._tensors[start : start + WINDOW], self._pointers[start : start + WINDOW])
            for start in range(0, max(len(self._tensors), 1), WINDOW)
        )
        self._registration = registrations.count

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether everything is where it was. ``tensors`` are the tensor leaves of this call."""
        for index, _, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                return False
        if self._written.starts and not self._lie_apart(tensors):
            return False
        if self._copied_back and self._shared_when_copied(tensors) is not None:
            return False
        if not self._attributes_hold():
            return False
        if registrations.count != self._registration:
            if not all(link.holds() for link in self._registered):
                return False
            self._registration = registrations.count
        looked_at, pointers = next(self._windows)
        return list(map(_data_ptr, looked_at)) == pointers

    def _lie_apart(self, tensors: Sequence[Tensor]) -> bool:
        """Whether no copied argument shares memory with what the step writes: its copy would be stale."""
        return self._apart.issuperset(map(_data_ptr, tensors)) or self._overlapping(tensors) is None

    def _overlapping(self, tensors: Sequence[Tensor]) -> int | None:
        """Position of a copied argument that shares memory with what the step writes.

        Addresses that are far enough from it for the longest argument are remembered, whichever argument was found there.
        """
        for index, tensor in enumerate(tensors):
            pointer = tensor.data_ptr()
            if self._longest is not None and not self._written.reached(pointer, self._longest):
                if len(self._apart) >= _REMEMBERED:
                    self._apart.clear()
                self._apart.add(pointer)
            elif index not in self._static and tensor.numel() and self._written.reached(pointer, extent(tensor)):
                return index
        return None

    def _shared_when_copied(self, tensors: Sequence[Tensor]) -> int | None:
        """Position of a copied argument that the step writes and that shares memory with what the step uses besides it."""
        for index in self._copied_back:
            start, end = tensors[index].data_ptr(), tensors[index].data_ptr() + extent(tensors[index])
            others = [t for i, t in enumerate(tensors) if i != index and i not in self._same]
            if any(t.data_ptr() < end and start < t.data_ptr() + extent(t) for t in others):
                return index
            if self._in_place.reached(start, end - start):
                return index
        return None

    def moved_arguments(self, tensors: Sequence[Tensor]) -> list[tuple[int, str]]:
        """Position and name of static arguments that are not where they were."""
        return [(index, name) for index, name, pointer in self._arguments if tensors[index].data_ptr() != pointer]

    def moved(self, tensors: Sequence[Tensor]) -> MovedStaticTensor:
        """The refusal for a call whose static tensors changed: names the first."""
        for index, name, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                text = f"the argument is at {tensors[index].data_ptr():#x}, recorded at {pointer:#x}"
                return MovedStaticTensor(text, operator=name)
        shared = self._overlapping(tensors)
        shared = self._shared_when_copied(tensors) if shared is None else shared
        if shared is not None:
            return MovedStaticTensor("it shares memory with a tensor that the step writes", operator=f"tensor argument {shared}")
        for link in [*self._attributes, *self._registered]:
            if not link.holds():
                return MovedStaticTensor("it is another object than the one recorded", operator=link.path)
        for tensor, recorded in zip(self._tensors, self._pointers, strict=True):
            if tensor.data_ptr() != recorded:
                name = self._names.get(id(tensor), f"tensor{tuple(tensor.shape)}")
                return MovedStaticTensor(f"its storage is at {tensor.data_ptr():#x}, recorded at {recorded:#x}", operator=name)
        return MovedStaticTensor("a static tensor moved and moved back during the check")


def alone(index: int, tensors: Sequence[Tensor], externals: Sequence[Tensor]) -> bool:
    """Whether an argument shares no memory with another one, nor with what the step reads in place."""
    tensor, others = tensors[index], [t for t in tensors if t is not tensors[index]]
    apart = not sharing([tensor], others)
    return apart and not _Memory(map(_storage_range, externals)).reached(tensor.data_ptr(), extent(tensor))


class _Memory:
    """Ranges of addresses."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        found = joined(ranges)
        self.starts = [start for start, _ in found]
        self._ends = [0, *(end for _, end in found)]  # of the range that begins before the one at this position

    def reached(self, pointer: int, size: int) -> bool:
        """Whether any of ``size`` bytes from an address on lies in one."""
        position = bisect_right(self.starts, pointer)
        following = self.starts[position] if position < len(self.starts) else pointer + size
        return pointer < self._ends[position] or following < pointer + size


def _storage_range(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that overlap made one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def sharing(tensors: Sequence[Tensor], written: Sequence[Tensor]) -> list[int]:
    """Positions of the tensors that share memory with those that are written, be it under another storage."""
    storages = {storage_id(tensor) for tensor in written}
    ranges = joined((tensor.data_ptr(), tensor.data_ptr() + extent(tensor)) for tensor in written if tensor.numel())
    return [
        index
        for index, tensor in enumerate(tensors)
        if storage_id(tensor) in storages
        or any(start < tensor.data_ptr() + extent(tensor) and tensor.data_ptr() < end for start, end in ranges)
    ]


def _way(owner: Link) -> list[Link]:
    """The links from a root to a tensor, last first."""
    way: list[Link] = []
    link: Link | None = owner
    while link is not None:
        way.append(link)
        link = link.parent
    return way
