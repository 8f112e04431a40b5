"""Static tensors: what a recording reads in place has to be where it was, in the shape that it had.

Each call checks that static arguments are the same memory and that no storage was exchanged under a tensor that the
recording reads (``param.data = ...``; ``.to()`` does it to all), all of them in one call of C++ in builds for a GPU. That
the tensors still hang where the step finds them is a matter of guards (`graphs.guards.python_guards`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import torch

from graphs.contract.slots import extent
from graphs.errors import MovedStaticTensor
from graphs.objects.torch_fast_paths import equal_addresses, tensor_guards
from graphs.state.python_state import Link
from graphs.state.storage import storage_id

Tensor = torch.Tensor
_REMEMBERED = 1024  # addresses of arguments known to lie apart from what the step writes
_data_ptr = Tensor.data_ptr
WINDOW = 16  # tensors whose layout is looked at by one call; a tensor transposed in place is seen within as many windows


class StaticTensors:
    """Where the static tensors of one recording were when it was made.

    Attributes:
        links: those from the model or an opaque argument to every tensor that the recording reads.
        hanging: path and tensor of all those tensors.
        named: position and name of the static arguments.
        own: identities of the tensors that hang on the model or an opaque argument, read or not.
        own_arguments: those that were arguments of the recorded call.

    Args:
        arguments: position, name and tensor of the static arguments.
        externals: tensors read in place that are not arguments.
        written: those of both that the step writes: another argument must not share their memory.
        owners: links to tensors, from `PythonState`; those of other tensors are ignored.
        longest: bytes that a copied argument extends over at most; None where that is not known.
        copied_back: positions of copied arguments that the step writes: no other tensor must share their memory.
        same: positions of arguments that are the very object at another position.
        given: the arguments of the recorded call.
        own: identities of all tensors that ``owners`` link to, where not all of these are given.
        beside: further tensors read in place, which are checked there.
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
        given: Sequence[Tensor] = (),
        own: frozenset[int] | None = None,
        beside: StaticTensors | None = None,
    ) -> None:
        self._beside = beside
        self.named = [(index, name) for index, name, _ in arguments]
        self.longest, self.copied_back, self.same = longest, list(copied_back), list(same)
        self._arguments = [(index, name, tensor.data_ptr()) for index, name, tensor in arguments]
        static = {index for index, _, _ in arguments}
        self._written = _Memory((w.data_ptr(), w.data_ptr() + extent(w)) for w in written if w.numel())
        self._in_place = _Memory(map(_storage_range, externals))
        self._copied_back, self._same = self.copied_back, {*same}
        self._longest = longest
        self._static = static
        self._apart: set[int] = set()
        used = {storage_id(tensor) for tensor in externals}
        hanging = [owner for owner in owners if storage_id(owner.value) in used]
        self.links = list({(id(link.container), link.key): link for owner in hanging for link in _chain(owner)}.values())
        self.hanging = [(owner.path, owner.value) for owner in hanging]
        self._names = {id(owner.value): owner.path for owner in hanging}
        self._tensors = list({id(t): t for t in [*externals, *(owner.value for owner in hanging)]}.values())
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._indices = list(range(len(self._tensors)))
        self._layouts = [_layout(tensor) for tensor in self._tensors]
        windows = [self._tensors[start : start + WINDOW] for start in range(0, len(self._tensors), WINDOW)]
        self._guards = cycle([(_tensor_guards(window), window) for window in windows] or [(None, [])])
        self.own = self._own = frozenset(id(owner.value) for owner in owners) if own is None else own
        self.own_arguments = self._own_among(given)

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether everything is where it was. ``tensors`` are the tensor leaves of this call."""
        for index, _, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                return False
        if not self._own.isdisjoint(map(id, tensors)) and self._own_among(tensors) != self.own_arguments:
            return False
        if self._written.starts and not self._lie_apart(tensors):
            return False
        if self._copied_back and self._shared_when_copied(tensors) is not None:
            return False
        beside = self._beside
        if beside is not None and not (beside._stayed() and beside._laid_out()):
            return False
        return self._stayed() and self._laid_out()

    def in_place(self) -> bool:
        """Whether the tensors that are no arguments are where they were, all in the layout that they had."""
        if not self._stayed():
            return False
        return all(self._laid_out() for _ in range(-(-len(self._tensors) // WINDOW)))

    def _laid_out(self) -> bool:
        """Whether the tensors of this call's window have the layout they had. Torch's guards also look at the modes that are
        active, so what they do not recognise is compared once more.
        """
        guards, looked_at = next(self._guards)
        if guards is None or guards.check(*looked_at):
            return True
        known = dict(zip(map(id, self._tensors), self._layouts, strict=True))
        return all(_layout(tensor) == known[id(tensor)] for tensor in looked_at)

    def _stayed(self) -> bool:
        if equal_addresses is not None:
            return bool(equal_addresses(self._tensors, self._pointers, self._indices))
        return list(map(_data_ptr, self._tensors)) == self._pointers

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
            parts = [self] if self._beside is None else [self, self._beside]
            if any(part._in_place.reached(start, end - start) for part in parts):
                return index
        return None

    def _own_among(self, tensors: Sequence[Tensor]) -> list[int]:
        """Which arguments are tensors of the step's own, which it may compare them with (``x is self.buffer``)."""
        return [id(tensor) for tensor in tensors if id(tensor) in self._own]

    def moved_arguments(self, tensors: Sequence[Tensor]) -> list[tuple[int, str]]:
        """Position and name of static arguments that are not where they were."""
        return [(index, name) for index, name, pointer in self._arguments if tensors[index].data_ptr() != pointer]

    @property
    def placed(self) -> set[int]:
        """Identities of the tensors whose place and layout are checked here."""
        beside = self._beside.placed if self._beside is not None else set[int]()
        return {id(tensor) for tensor in self._tensors} | beside

    def arguments_fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether nothing is wrong with the arguments of a call: what moved is the step's own, and stays where it is now."""
        moved = self.moved_arguments(tensors)
        return (
            not moved
            and self._own_among(tensors) == self.own_arguments
            and self._overlapping(tensors) is None
            and self._shared_when_copied(tensors) is None
        )

    def moved(self, tensors: Sequence[Tensor]) -> MovedStaticTensor:
        """The refusal for a call whose static tensors changed: names the first."""
        for index, name, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                text = f"the argument is at {tensors[index].data_ptr():#x}, recorded at {pointer:#x}"
                return MovedStaticTensor(text, operator=name)
        shared = self._overlapping(tensors)
        shared = self._shared_when_copied(tensors) if shared is None else shared
        if self._own_among(tensors) != self.own_arguments:
            return MovedStaticTensor("an argument is a tensor of the step's own, or no longer is", operator="arguments")
        if shared is not None:
            return MovedStaticTensor("it shares memory with a tensor that the step writes", operator=f"tensor argument {shared}")
        for tensor, recorded, layout in zip(self._tensors, self._pointers, self._layouts, strict=True):
            name = self._names.get(id(tensor), f"tensor{tuple(tensor.shape)}")
            if tensor.data_ptr() != recorded:
                return MovedStaticTensor(f"its storage is at {tensor.data_ptr():#x}, recorded at {recorded:#x}", operator=name)
            if _layout(tensor) != layout:
                return MovedStaticTensor(f"it has another layout, {_layout(tensor)}, than {layout} when recorded", operator=name)
        if self._beside is not None:
            return self._beside.moved(tensors)
        return MovedStaticTensor("a static tensor moved and moved back during the check")


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.is_conj(), tensor.is_neg()


def _tensor_guards(tensors: Sequence[Tensor]) -> Any:
    """Torch's guards of shapes, strides and dtypes; None where it has none."""
    kind = tensor_guards
    return kind(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None) if kind is not None and tensors else None


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


def _chain(owner: Link) -> list[Link]:
    """The links from a root to a tensor, last first."""
    chain: list[Link] = []
    link: Link | None = owner
    while link is not None:
        chain.append(link)
        link = link.parent
    return chain
