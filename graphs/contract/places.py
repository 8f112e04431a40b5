"""Places: the memory that a recording reads and writes in place, and tensors as they lie in it.

A recording knows addresses. Where a tensor moved that it uses in place, the addresses can be exchanged, if everything about the
tensor but its address is what it was: this file says what that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from graphs.contract.slots import physical
from graphs.state.storage import storage_id

Tensor = torch.Tensor
Storage = torch.UntypedStorage


class Places:
    """Storages by number, in the order in which tensors show them.

    Attributes:
        storages: the storages. They are held, and so are their addresses.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.storages: list[Storage] = []
        self._numbers: dict[int, int] = {}
        for tensor in tensors:
            if storage_id(tensor) not in self._numbers:
                self._numbers[storage_id(tensor)] = len(self.storages)
                self.storages.append(tensor.untyped_storage())

    def number(self, tensor: Tensor) -> int | None:
        """The place of a tensor; None where it lies elsewhere."""
        return self._numbers.get(storage_id(tensor))


@dataclass(frozen=True)
class Spot:
    """A tensor by where it lies.

    Attributes:
        place: number of its storage.
        offset: of its first element, in elements.
    """

    place: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor, place: int) -> Spot:
        """The spot of a tensor."""
        memory = physical(tensor)
        layout = tuple(memory.shape), memory.stride(), memory.dtype, int(memory.storage_offset())
        return cls(place, *layout, tensor.is_conj(), tensor.is_neg())

    def on(self, storage: Storage) -> Tensor:
        """A tensor at the same spot of another storage."""
        with torch.inference_mode(False):  # which turns gradients on, and nothing here requires one
            tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
            tensor.set_(storage, self.offset, self.shape, self.strides)  # type: ignore[call-overload]
            tensor = torch._conj(tensor) if self.conj else tensor
            return torch._neg_view(tensor) if self.neg else tensor


def lie_apart(storages: Sequence[Storage]) -> bool:
    """Whether no two storages share memory."""
    ranges = sorted((storage.data_ptr(), storage.nbytes()) for storage in storages)
    return all(start + size <= following for (start, size), (following, _) in pairwise(ranges))
