"""What an operator writes, as elements of a storage: the view that it was given, or the entries of it that its indices name.

A cache of gigabytes of which a step writes one row per layer is saved, compared and put back by these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from graphs.errors import WritesError
from graphs.state.op_registry import registered
from graphs.state.storage import has_storage, storage_id

Tensor = torch.Tensor
aten = torch.ops.aten
Indices = tuple[Tensor | None, ...]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # gathered for every dtype, and bit for bit
_ALONG = {"index_copy_", "index_add_", "index_fill_", "index_reduce_"}
_ENTRIES = {"index_put_", "_index_put_impl_", "_unsafe_index_put_"}
_LEGAL = (
    "a function of all arguments of a call, also of those that have defaults, that returns whole numbers [n] (a tensor or a list "
    "of int), a tuple of such for the first dimensions, or None"
)
_SCATTERED = {"scatter_", "scatter_add_", "scatter_reduce_"}


@dataclass(frozen=True, eq=False)
class Region:
    """Elements of one tensor's memory.

    Attributes:
        storage: identity of the storage.
        whole: the storage, in the shape of its base where that is dense, else flat; the tensor itself where it has none.
        tensor: the view that the operator was given.
        indices: which entries of it, as ``aten.index`` takes them; None for all of it.
    """

    storage: int
    whole: Tensor
    tensor: Tensor
    indices: Indices | None = None

    @property
    def is_whole(self) -> bool:
        """Whether these are all elements of the storage."""
        return self.indices is None and self.tensor is self.whole

    @property
    def live(self) -> Tensor:
        """The elements as they are: a view where they are one, else gathered."""
        if self.indices is None:
            return self.tensor
        with torch.inference_mode(False), torch.no_grad():
            return self.entries_of(_bits(self.tensor)).view(self.tensor.dtype)

    def entries_of(self, tensor: Tensor) -> Tensor:
        """These entries of another tensor of the same shape."""
        return tensor if self.indices is None else aten.index.Tensor(tensor, [*self.indices])

    def write(self, values: Tensor) -> None:
        """Give the elements other values."""
        if self.indices is None:
            self.tensor.copy_(values)
        else:
            bits = _bits(self.tensor)
            aten.index_put_.default(bits, [*self.indices], values.to(bits.device).view(bits.dtype))

    def is_same(self, other: Region) -> bool:
        """Whether both are the same elements in the same order."""
        return _geometry(self.tensor) == _geometry(other.tensor) and _same_indices(self.indices, other.indices)

    def in_row(self, row: int) -> Iterator[Tensor]:
        """For each dimension of the whole: a mask of the elements that lie at ``row`` of it."""
        shape = self.whole.shape
        if self.is_whole:
            yield from _rows_of(self.whole, row)
            return
        coordinates = torch.unravel_index(self._offsets(), shape) if shape else ()
        for coordinate, size in zip(coordinates, shape, strict=True):
            if -size <= row < size:
                yield coordinate == row % size

    def _offsets(self) -> Tensor:
        """Where each element lies in the storage."""
        tensor, device = self.tensor, self.tensor.device
        if not has_storage(tensor):
            return torch.arange(tensor.numel(), device=device).view(tensor.shape)
        found = torch.full((), int(tensor.storage_offset()), dtype=torch.int64, device=device)
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            line = torch.arange(size, device=device).view(-1, *[1] * (tensor.ndim - dim - 1)).expand(tensor.shape)
            found = found + self.entries_of(line) * stride
        return found


def whole_region(tensor: Tensor) -> Region:
    """All of a tensor's storage; the tensor itself where it has none."""
    whole = _whole(tensor) if has_storage(tensor) else tensor
    return Region(storage_id(tensor), whole, whole)


def written_region(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tensor: Tensor) -> Region:
    """What a call of ``func`` writes of ``tensor``: at least that, and the whole storage where nothing less is known.

    Raises:
        WritesError: the author of the operator says what is not legal.
    """
    if not has_storage(tensor) or overlaps(tensor):
        return whole_region(tensor)
    storage, whole, view = storage_id(tensor), _whole(tensor), _view(tensor)
    indices = _indices(func, args, kwargs, tensor)
    if indices is not None and _can_be_gathered(view, indices):
        return Region(storage, whole, view, indices)
    return Region(storage, whole, whole if view.numel() == whole.numel() else view)


def _indices(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tensor: Tensor) -> Indices | None:
    """The entries that an operator with indices writes, as copies of its own; None where it writes all of the tensor."""
    operator = registered(func)
    if operator is not None and operator.writes:
        return _declared(operator.writes, func, args, kwargs, tensor)
    name = func._schema.name.removeprefix("aten::")
    if func.namespace != "aten" or not args or args[0] is not tensor or not tensor.ndim:
        return None
    named = {**dict(zip([a.name for a in func._schema.arguments], args, strict=False)), **kwargs}
    if name in _ENTRIES:
        return _owned(named["indices"])
    if name in _ALONG:
        return _owned((*[None] * (named["dim"] % tensor.ndim), named["index"].reshape(-1)))
    if name in _SCATTERED:
        return _owned(_scattered(named["dim"] % tensor.ndim, named["index"]))
    return None


def _declared(
    writes: Mapping[str, Callable[..., Any]], func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tensor: Tensor
) -> Indices | None:
    """What the author of an operator says that it writes of an argument."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    name = next((name for name, value in given.items() if value is tensor), None)
    if name is None or name not in writes:
        return None
    called = f"writes[{name!r}] of {func._schema.name}"
    try:
        rows = writes[name](*args, **kwargs)
    except Exception as error:
        raise WritesError(called, error, _LEGAL) from error
    if rows is None:
        return None
    return _owned([_rows_given(called, each, tensor) for each in (rows if isinstance(rows, tuple) else (rows,))])


def _rows_given(called: str, rows: Any, tensor: Tensor) -> Tensor | None:
    """Whole numbers that an author gave, as a tensor.

    Raises:
        WritesError: they are none.
    """
    if isinstance(rows, list) and all(type(row) is int for row in rows):
        return torch.tensor(rows, dtype=torch.int64, device=tensor.device)
    if isinstance(rows, Tensor) and not (rows.is_floating_point() or rows.is_complex()):
        return rows
    if rows is not None:
        given = f"tensor of {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise WritesError(called, given, _LEGAL)
    return None


def _scattered(dim: int, index: Tensor) -> list[Tensor | None]:
    """The entries of ``scatter_``: its index along ``dim``, and every place of the index along the others."""
    sizes, device = index.shape, index.device
    return [
        index if d == dim else torch.arange(size, device=device).view(-1, *[1] * (index.ndim - d - 1))
        for d, size in enumerate(sizes)
    ]


def _owned(indices: Sequence[Tensor | None]) -> Indices:
    """Copies of indices, masks as the places at which they are set: the step may change its own."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None:
            found.append(None)
        elif index.dtype in (torch.bool, torch.uint8):
            found += index.nonzero().unbind(1)
        else:
            found.append(index.to(torch.int64, copy=True))
    return tuple(found)


def _can_be_gathered(tensor: Tensor, indices: Indices) -> bool:
    """Whether the entries exist, and are less than half of the tensor."""
    pairs = [(size, index) for size, index in zip(tensor.shape, indices, strict=False) if index is not None]
    if len(indices) > tensor.ndim or not pairs:
        return False
    try:
        shape = torch.broadcast_shapes(*(index.shape for _, index in pairs))
    except RuntimeError:  # the operator will say so itself
        return False
    indexed = math.prod(size for size, _ in pairs)
    if 2 * math.prod(shape) * (tensor.numel() // max(indexed, 1)) > tensor.numel():
        return False
    return tensor.device.type != "cpu" or all(  # else the operator raises; on a device it ends the process
        not index.numel() or (-size <= int(index.min()) and int(index.max()) < size) for size, index in pairs
    )


def _same_indices(first: Indices | None, second: Indices | None) -> bool:
    if first is None or second is None:
        return first is second
    return len(first) == len(second) and all(
        (a is b) or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def _rows_of(tensor: Tensor, row: int) -> Iterator[Tensor]:
    for dim, size in enumerate(tensor.shape):
        if -size <= row < size:
            mask = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
            mask.select(dim, row).fill_(True)
            yield mask


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    strides = (tensor.stride(), int(tensor.storage_offset())) if has_storage(tensor) else ()
    return (storage_id(tensor), tuple(tensor.shape), strides, tensor.dtype)


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may be one memory, as in an expanded tensor."""
    end = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride < end:
            return True
        end = stride * size
    return False


def _view(tensor: Tensor) -> Tensor:
    """A tensor of our own on the same elements: the step may exchange the memory of its own."""
    storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
    with torch.inference_mode(False):
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(storage, offset, tensor.shape, tensor.stride())  # type: ignore[call-overload, no-any-return]


def _whole(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor``, in the shape of its base where that is dense, else flat."""
    base = tensor if tensor._base is None else tensor._base
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    dense = base.is_contiguous() and base.dtype == tensor.dtype and base.numel() == count
    with torch.inference_mode(False):
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (count,), (1,))  # type: ignore[call-overload]
        return flat.view(base.shape) if dense else flat


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as whole numbers, of which nothing is lost when they are gathered; as it is where there are none of its size."""
    kind = _BITS.get(tensor.element_size())
    return tensor if kind is None else tensor.view(kind)
