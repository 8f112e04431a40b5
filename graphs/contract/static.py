"""Static tensors: what a recording reads in place has to be where it was, in the shape that it had.

Each call checks that static arguments are the same memory and that no storage was exchanged under a tensor that the
recording reads (``param.data = ...``; ``.to()`` does it to all), all of them in one call of C++ in builds for a GPU. That
the tensors still hang where the step finds them is a matter of guards (`graphs.contract.guards`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from graphs.contract.operators import storage_id
from graphs.contract.python_state import Link
from graphs.errors import MovedStaticTensor

Tensor = torch.Tensor
_REMEMBERED = 1024  # addresses of arguments known to lie apart from what the step writes
_equal_addresses = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)  # in builds for CUDA and HIP
_data_ptr = Tensor.data_ptr


class StaticTensors:
    """Where the static tensors of one recording were when it was made.

    Attributes:
        links: the ways from the model or an opaque argument to every tensor that the recording reads.

    Args:
        arguments: position, name and tensor of the static arguments.
        externals: tensors read in place that are not arguments.
        written: those of both that the step writes: another argument must not share their memory.
        owners: links to tensors, from `PythonState`; those of other tensors are ignored.
    """

    def __init__(
        self,
        arguments: Sequence[tuple[int, str, Tensor]],
        externals: Sequence[Tensor],
        written: Sequence[Tensor],
        owners: Sequence[Link],
    ) -> None:
        self._arguments = [(index, name, tensor.data_ptr()) for index, name, tensor in arguments]
        static = {index for index, _, _ in arguments}
        ranges = sorted((w.data_ptr(), w.data_ptr() + w.numel() * w.element_size()) for w in written if w.numel())
        self._starts = [start for start, _ in ranges]
        self._ends = [0, *accumulate((end for _, end in ranges), max)]  # of all ranges before the one at this position
        self._static = static
        self._apart: set[int] = set()
        used = {storage_id(tensor) for tensor in externals}
        hanging = [owner for owner in owners if storage_id(owner.value) in used]
        self.links = list({(id(link.container), link.key): link for owner in hanging for link in _way(owner)}.values())
        self._names = {id(owner.value): owner.path for owner in hanging}
        self._tensors = list({id(t): t for t in [*externals, *(owner.value for owner in hanging)]}.values())
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._indices = list(range(len(self._tensors)))
        self._layouts = [_layout(tensor) for tensor in self._tensors]
        self._guards = _tensor_guards(self._tensors)

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether everything is where it was. ``tensors`` are the tensor leaves of this call."""
        for index, _, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                return False
        if self._starts and not self._apart.issuperset(map(_data_ptr, tensors)) and self._overlapping(tensors) is not None:
            return False
        return self._in_place() and (self._guards is None or self._guards.check(*self._tensors))

    def _in_place(self) -> bool:
        if _equal_addresses is not None:
            return bool(_equal_addresses(self._tensors, self._pointers, self._indices))
        return list(map(_data_ptr, self._tensors)) == self._pointers

    def _overlapping(self, tensors: Sequence[Tensor]) -> int | None:
        """Position of a copied argument that shares memory with what the step writes: its copy would be stale."""
        for index, tensor in enumerate(tensors):
            pointer = tensor.data_ptr()
            if pointer >= self._ends[bisect_left(self._starts, pointer + _extent(tensor))]:
                if len(self._apart) >= _REMEMBERED:
                    self._apart.clear()
                self._apart.add(pointer)
            elif index not in self._static and tensor.numel():
                return index
        return None

    def moved(self, tensors: Sequence[Tensor]) -> MovedStaticTensor:
        """The refusal for a call whose static tensors changed: names the first."""
        for index, name, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                text = f"the argument is at {tensors[index].data_ptr():#x}, recorded at {pointer:#x}"
                return MovedStaticTensor(text, operator=name)
        shared = self._overlapping(tensors)
        if shared is not None:
            return MovedStaticTensor("it shares memory with a tensor that the step writes", operator=f"tensor argument {shared}")
        for tensor, recorded, layout in zip(self._tensors, self._pointers, self._layouts, strict=True):
            name = self._names.get(id(tensor), f"tensor{tuple(tensor.shape)}")
            if tensor.data_ptr() != recorded:
                return MovedStaticTensor(f"its storage is at {tensor.data_ptr():#x}, recorded at {recorded:#x}", operator=name)
            if _layout(tensor) != layout:
                return MovedStaticTensor(f"it has another layout, {_layout(tensor)}, than {layout} when recorded", operator=name)
        return MovedStaticTensor("a static tensor moved and moved back during the check")

    def moved_arguments(self, tensors: Sequence[Tensor]) -> bool:
        """Whether an argument is not what it has to be: a recording made anew would not serve the next call either."""
        elsewhere = any(tensors[index].data_ptr() != pointer for index, _, pointer in self._arguments)
        return elsewhere or self._overlapping(tensors) is not None


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last one."""
    if not tensor.numel():
        return 0
    return (
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    ) * tensor.element_size()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _tensor_guards(tensors: Sequence[Tensor]) -> Any:
    """Torch's guards of shapes, strides and dtypes; None where it has none."""
    kind = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    return kind(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None) if kind is not None and tensors else None


def _way(owner: Link) -> list[Link]:
    """The links from a root to a tensor, last first."""
    way: list[Link] = []
    link: Link | None = owner
    while link is not None:
        way.append(link)
        link = link.parent
    return way
