"""Outputs that share memory: with an argument, with a tensor of the step's own, or with each other.

Whoever writes to one of two such tensors changes the other, so a replay has to hand out tensors that share memory too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphs.contract.slots import extent, is_dense, physical
from graphs.errors import UnsupportedOutput
from graphs.state.storage import storage_id

Tensor = torch.Tensor


@dataclass(frozen=True)
class Bits:
    """What is set on a tensor beside its memory.

    Attributes:
        conj, neg: its memory is to be read conjugated, or negated.
        parameter: whether it is a ``torch.nn.Parameter``.
    """

    conj: bool = False
    neg: bool = False
    requires_grad: bool = False
    parameter: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Bits:
        """Those of one tensor."""
        parameter = type(tensor) is torch.nn.Parameter
        return cls(tensor.is_conj(), tensor.is_neg(), tensor.requires_grad and tensor.is_leaf, parameter)

    def set_on(self, tensor: Tensor) -> Tensor:
        """A physical tensor with these."""
        if self.conj:
            tensor = torch._conj(tensor)
        if self.neg:
            tensor = torch._neg_view(tensor)
        if self.parameter:
            return torch.nn.Parameter(tensor.detach(), self.requires_grad)
        return tensor.requires_grad_() if self.requires_grad and not tensor.requires_grad else tensor


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies in the memory of another, its base.

    Attributes:
        offset: bytes from the first element of the base to its own.
        tracked: whether autograd knows it: a view of a parameter, unless it was detached.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    bits: Bits
    tracked: bool

    @classmethod
    def of(cls, tensor: Tensor, start: int) -> Layout:
        """The layout of ``tensor``, whose base begins at the address ``start``."""
        offset = tensor.data_ptr() - start
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, offset, Bits.of(tensor), tensor.requires_grad)

    def within(self, base: Tensor) -> Tensor:
        """This part of ``base``, as a view."""
        with torch.no_grad():
            return self.bits.set_on(self.memory_within(base))

    def memory_within(self, base: Tensor) -> Tensor:
        """The same without its bits."""
        base = physical(base.detach() if base.requires_grad and not self.tracked else base)
        offset = base.storage_offset() * base.element_size() + self.offset
        size = self.dtype.itemsize
        if offset % size:
            raise UnsupportedOutput(
                f"an output is memory of another tensor, seen as {self.dtype} and unaligned", operator="output"
            )
        if self.dtype is base.dtype:
            return base.as_strided(self.shape, self.strides, offset // size)
        seen = torch.empty(0, dtype=self.dtype, device=base.device)
        return seen.set_(base.untyped_storage(), offset // size, self.shape, self.strides)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Shared:
    """Memory that holds several outputs: one flat tensor, and where its first element is seen from one of them.

    Attributes:
        length: its elements.
    """

    length: int

    def behind(self, tensor: Tensor, layout: Layout) -> Tensor:
        """The flat tensor, of an output that lies in it at ``layout``."""
        memory = physical(tensor)
        return memory.as_strided((self.length,), (1,), memory.storage_offset() - layout.offset // memory.element_size())


def shared_memory(outputs: Sequence[Tensor]) -> list[tuple[Shared, dict[int, Layout]]]:
    """Groups of outputs that overlap in memory, with where each lies by its identity.

    So is the memory of a single output that has few holes or is expanded, so that its strides stay what they are. Other outputs
    that stand alone are left out.

    Raises:
        UnsupportedOutput: two outputs are one memory as two dtypes.
    """
    groups = []
    ranges = sorted((storage_id(t), t.data_ptr(), t.data_ptr() + extent(t), i) for i, t in enumerate(outputs) if t.numel())
    position = 0
    while position < len(ranges):
        storage, start, end, first = ranges[position]
        members = [outputs[first]]
        position += 1
        while position < len(ranges) and ranges[position][0] == storage and ranges[position][1] < end:
            members.append(outputs[ranges[position][3]])
            end = max(end, ranges[position][2])
            position += 1
        if len({id(member) for member in members}) > 1 or _is_spread(members[0]):
            if len({member.dtype for member in members}) > 1:
                raise UnsupportedOutput("two outputs share memory and see it as two dtypes", operator="output")
            length = (end - start) // members[0].element_size()
            groups.append((Shared(length), {id(member): Layout.of(member, start) for member in members}))
    return groups


def _is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is not dense, yet takes hardly more memory than its elements."""
    return not is_dense(tensor.shape, tensor.stride()) and extent(tensor) <= 2 * tensor.numel() * tensor.element_size()
