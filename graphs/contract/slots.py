"""Slots: the fixed storage that a recording reads its copied inputs from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphs.contract.buckets import resized
from graphs.contract.padding import Padding, pad_rows

Tensor = torch.Tensor


@dataclass(frozen=True)
class Slot:
    """One copied tensor argument.

    Attributes:
        name: the argument, for example ``input_ids``.
        index: position among the tensor leaves of a call.
        shape: shape at the recorded (bucket) size; the storage is contiguous.
        batch_dim: dimension that buckets pad, or None.
        padding: what rows beyond the real batch hold.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batch_dim: int | None = None
    padding: Padding = field(default_factory=Padding)

    @property
    def rows(self) -> int:
        """Rows at the recorded size; 1 where nothing is padded."""
        return 1 if self.batch_dim is None else self.shape[self.batch_dim]

    def allocate(self) -> Tensor:
        """Fixed storage for the slot, zeroed so that no run sees another program's memory."""
        with torch.inference_mode(False):
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def fill(self, buffer: Tensor, source: Tensor) -> Tensor:
        """Copy ``source`` into ``buffer`` and pad it."""
        if self.batch_dim is None:
            return buffer.copy_(source)
        return pad_rows(source, self.batch_dim, self.rows, self.padding, buffer)


@dataclass(frozen=True)
class Contract:
    """What a recording expects of a call.

    Attributes:
        slots: the copied arguments.
        static: positions of tensor arguments that are read (or written) in place.
        rows: batch rows at the recorded size, or None without buckets.
        output_dims: batch dimension of each produced output, None where it has none.
    """

    slots: tuple[Slot, ...]
    static: tuple[int, ...]
    rows: int | None = None
    output_dims: tuple[int | None, ...] = ()

    def filled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """New storage for every slot, filled and padded from the tensor leaves of a call."""
        return [slot.fill(slot.allocate(), tensors[slot.index]) for slot in self.slots]

    def arrange(self, buffers: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensor leaves of the recorded call: slots' buffers, and the static tensors themselves."""
        arranged = list(tensors)
        for slot, buffer in zip(self.slots, buffers, strict=True):
            arranged[slot.index] = buffer
        return arranged


def make_contract(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    static: Sequence[int],
    padding: dict[str, Padding],
    batch_dims: Sequence[int | None],
    rows: int | None,
) -> Contract:
    """The contract of a call recorded at ``rows`` rows (None: at its exact sizes)."""
    slots = []
    for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        if index in static:
            continue
        dim = batch_dims[index] if rows is not None else None
        shape = resized(tuple(tensor.shape), dim, rows or 0)
        slots.append(Slot(name, index, shape, tensor.dtype, tensor.device, dim, padding.get(name, Padding())))
    return Contract(tuple(slots), tuple(static), rows)
