"""Slots: the fixed storage that a recording reads its copied inputs from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from graphs.contract.arguments import repeats
from graphs.contract.buckets import resized
from graphs.contract.padding import Padding, pad_rows

Tensor = torch.Tensor
SPREAD = 1 << 26
"""Bytes of holes up to which a copy has the strides of its argument. A column of a huge table is copied without the table."""


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory without holes or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if not tensor.numel():
        return 0
    return _reach(tensor.shape, tensor.stride()) * tensor.element_size()


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def physical(tensor: Tensor) -> Tensor:
    """The tensor as its memory holds it: without the bits that say it is to be read conjugated or negated."""
    if tensor.is_conj():
        tensor = torch._conj(tensor)
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


@dataclass(frozen=True)
class Traits:
    """What the step may see of an argument beyond shape, strides, dtype and device.

    Attributes:
        conj, neg: whether its memory is to be read conjugated, or negated.
        inference: whether it was made in inference mode.
        attributes: what hangs on it: constants, which are part of the signature.
    """

    conj: bool = False
    neg: bool = False
    requires_grad: bool = False
    inference: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tensor: Tensor) -> Traits:
        """Those of one tensor."""
        return cls(tensor.is_conj(), tensor.is_neg(), tensor.requires_grad, tensor.is_inference(), dict(tensor.__dict__))

    def given_to(self, tensor: Tensor) -> Tensor:
        """``tensor``, or a view of it, with these."""
        with torch.inference_mode(self.inference):
            if self.conj:
                tensor = torch._conj(tensor)
            if self.neg:
                tensor = torch._neg_view(tensor)
            if self.requires_grad:
                tensor = tensor.detach().requires_grad_()
        tensor.__dict__.update(self.attributes)
        return tensor


@dataclass(frozen=True)
class Slot:
    """One copied tensor argument.

    Its memory, the buffer, is dense, so that one kernel can fill it. The step gets a stand-in for the argument: the buffer
    itself, a view of it, or (where the argument's memory has holes) a tensor that the recording copies the buffer to.

    Attributes:
        name: the argument, for example ``input_ids``.
        index: position among the tensor leaves of a call.
        shape: shape at the recorded (bucket) size.
        batch_dim: dimension that buckets pad, or None.
        padding: what rows beyond the real batch hold.
        strides: of the argument and of its stand-in; None where they are not known, and the stand-in is contiguous.
        traits: what else the stand-in has in common with the argument.
        written: whether the step writes the argument, so that the buffer is copied back.
        from_host: whether the argument is a host tensor, though the buffer is on a device.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batch_dim: int | None = None
    padding: Padding = field(default_factory=Padding)
    strides: tuple[int, ...] | None = None
    traits: Traits = field(default_factory=Traits)
    written: bool = False
    from_host: bool = False

    @property
    def rows(self) -> int:
        """Rows at the recorded size; 1 where nothing is padded."""
        return 1 if self.batch_dim is None else self.shape[self.batch_dim]

    @cached_property
    def distinct(self) -> tuple[int, ...]:
        """The shape without repeated elements: expanded dimensions have size 1."""
        if self.strides is None:
            return self.shape
        return tuple(min(size, 1) if stride == 0 else size for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return prod(self.distinct) * self.dtype.itemsize

    @cached_property
    def like_its_source(self) -> bool:
        """Whether the buffer's bytes are those from the argument's first to its last, in the same order."""
        return self.strides is not None and is_dense(self.distinct, self.strides)

    def allocate(self) -> Tensor:
        """Fixed storage for the slot, zeroed so that no run sees another program's memory."""
        with torch.inference_mode(self.traits.inference):
            if self.strides is not None and self.like_its_source:
                return torch.empty_strided(self.distinct, self.strides, dtype=self.dtype, device=self.device).zero_()
            return torch.zeros(self.distinct, dtype=self.dtype, device=self.device)

    def of_source(self, source: Tensor) -> Tensor:
        """The elements of an argument that the buffer holds, as its memory holds them."""
        if self.traits.conj or self.traits.neg:
            source = physical(source)
        if self.distinct == self.shape:
            return source
        return source.as_strided(self.distinct, source.stride())

    def fill(self, buffer: Tensor, source: Tensor) -> Tensor:
        """Copy ``source`` into ``buffer`` and pad it."""
        source = self.of_source(source)
        with torch.inference_mode() if self.traits.inference else torch.no_grad():
            if self.batch_dim is None:
                return buffer.copy_(source)
            return pad_rows(source, self.batch_dim, self.rows, self.padding, buffer)

    def copy_back(self, buffer: Tensor, source: Tensor) -> None:
        """Copy what the step left in ``buffer`` to the argument."""
        with torch.inference_mode() if self.traits.inference else torch.no_grad():
            self.of_source(source).copy_(buffer)

    def stand_in(self, buffer: Tensor) -> Tensor:
        """What the step is given in the argument's place; inside a recording, a copy is part of it."""
        with torch.inference_mode() if self.traits.inference else torch.no_grad():
            if self.strides is not None:
                if not self.like_its_source:
                    with torch.inference_mode(self.traits.inference):
                        spread = torch.empty_strided(self.distinct, self.strides, dtype=self.dtype, device=self.device)
                    buffer = spread.copy_(buffer)
                if self.distinct != self.shape:
                    buffer = buffer.as_strided(self.shape, self.strides)
            return self.traits.given_to(buffer)


@dataclass(frozen=True)
class Contract:
    """What a recording expects of a call.

    Attributes:
        slots: the copied arguments.
        static: positions of tensor arguments that are read (or written) in place.
        rows: batch rows at the recorded size, or None without buckets.
        output_dims: batch dimension of each produced output, None where it has none.
        same: positions of copied arguments that are the very object of a slot, each with the position of that.
        longest: bytes that an argument extends over at most; None where padded arguments may be of any layout.
    """

    slots: tuple[Slot, ...]
    static: tuple[int, ...]
    rows: int | None = None
    output_dims: tuple[int | None, ...] = ()
    same: tuple[tuple[int, int], ...] = ()
    longest: int | None = None

    def filled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """New storage for every slot, filled and padded from the tensor leaves of a call."""
        return [slot.fill(slot.allocate(), tensors[slot.index]) for slot in self.slots]

    def arrange(self, buffers: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensor leaves of the recorded call: stand-ins for those that are copied, and the static tensors themselves."""
        arranged = list(tensors)
        for slot, buffer in zip(self.slots, buffers, strict=True):
            arranged[slot.index] = slot.stand_in(buffer)
        for index, first in self.same:
            arranged[index] = arranged[first]
        return arranged

    @property
    def nbytes(self) -> int:
        """Bytes that the copies of arguments take."""
        return sum(slot.nbytes for slot in self.slots)

    @property
    def written(self) -> list[int]:
        """Positions of copied arguments that the step writes."""
        return [slot.index for slot in self.slots if slot.written]

    def settle(self, buffers: Sequence[Tensor], arranged: Sequence[Tensor]) -> None:
        """Bring what the step wrote to stand-ins to the buffers, where these are not the same memory."""
        for slot, buffer in zip(self.slots, buffers, strict=True):
            if slot.written and not slot.like_its_source:
                slot.fill(buffer, arranged[slot.index])

    def write_back(self, stand_ins: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Copy the stand-ins that were written to the arguments."""
        with torch.inference_mode():
            for index in self.written:
                tensors[index].copy_(stand_ins[index])

    def refill(self, stand_ins: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Make the stand-ins that a step writes hold again what the arguments hold."""
        self.write_back(tensors, stand_ins)

    @property
    def keeps_strides(self) -> bool:
        """Whether each stand-in has the strides of its argument."""
        return all(slot.strides is not None for slot in self.slots)

    def scattered(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of copied arguments between whose elements lies other memory, or whose stand-in has other strides."""
        return [slot.index for slot in self.slots if not slot.like_its_source and not tensors[slot.index].is_contiguous()]


def make_contract(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    static: Sequence[int],
    padding: dict[str, Padding],
    batch_dims: Sequence[int | None],
    rows: int | None,
    written: Sequence[int] = (),
    host: Sequence[int] = (),
) -> Contract:
    """The contract of a call recorded at ``rows`` rows (None: at its exact sizes).

    Args:
        static, written: positions of arguments used in place, and of copied ones that the step writes.
        host: positions of device copies of host arguments.
    """
    slots, same = [], []
    firsts = repeats(tensors) or range(len(tensors))
    for index, (name, tensor, first) in enumerate(zip(names, tensors, firsts, strict=True)):
        if index in static:
            continue
        if first != index:
            same.append((index, first))
            continue
        dim = batch_dims[index] if rows is not None else None
        shape = resized(tuple(tensor.shape), dim, rows or 0)
        slots.append(
            Slot(
                *(name, index, shape, tensor.dtype, tensor.device, dim, padding.get(name, Padding())),
                strides=kept_strides(tensor) if rows is None else None,
                traits=Traits.of(tensor) if rows is None else replace(Traits.of(tensor), inference=False),
                written=index in written,
                from_host=index in host,
            )
        )
    longest: int | None = max(map(extent, tensors), default=0)
    if rows is not None:
        sizes = [slot.dtype.itemsize * prod(slot.shape) for slot in slots]
        longest = max([longest or 0, *sizes]) if all(tensor.is_contiguous() for tensor in tensors) else None
    return Contract(tuple(slots), tuple(static), rows, same=tuple(same), longest=longest)


def kept_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides for a stand-in; None where its holes would take more than `SPREAD`."""
    return tensor.stride() if extent(tensor) - tensor.numel() * tensor.element_size() <= SPREAD else None
