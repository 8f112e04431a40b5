"""Pinned memory for small host arguments: the host writes their values there, and the first kernel of a replay reads them.

There are as many rows as the address table has turns, and a replay reads the row of its turn. So a row is free to be written
when the table's row of that turn is: a replay that waits on the device is never overtaken by the arguments of a later call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from graphs.contract.slots import Slot

Tensor = torch.Tensor
_ALIGNED = 16  # bytes; what the copying kernel moves in its largest units


class HostRing:
    """The rows, and what lies where in them.

    Args:
        slots: of the arguments that come from the host, each dense.
        turns: rows of the ring.
        pinned: whether the device reads it; False for a ring that only the host looks at.
    """

    def __init__(self, slots: Sequence[Slot], turns: int, *, pinned: bool = True) -> None:
        self._fields: list[tuple[int, int, int]] = []  # position of the argument, offset in a row, bytes
        width = 0
        for slot in slots:
            size = slot.dtype.itemsize * torch.Size(slot.distinct).numel()
            self._fields.append((slot.index, width, size))
            width += max(-(-size // _ALIGNED), 1) * _ALIGNED
        self._width, self._turns = width, turns
        with torch.inference_mode(False):
            self._memory = torch.zeros(turns * width, dtype=torch.uint8, pin_memory=pinned)
        self._rows: list[list[Tensor] | None] = [None] * turns

    def stage(self, tensors: Sequence[Tensor], turn: int) -> list[Tensor]:
        """``tensors`` with the bytes of host arguments in the row of ``turn``, which no replay reads any more.

        An argument that is on the device already stays what it is. A pinned one may be the target of a copy from the device
        that is still on its way, so the current stream is waited for.
        """
        staged, row = list(tensors), self._row(turn % self._turns)
        for (position, _, size), field in zip(self._fields, row, strict=True):
            source = tensors[position]
            if source.device.type != "cpu":
                continue
            if source.is_pinned():
                torch.cuda.current_stream().synchronize()
            ctypes.memmove(field.data_ptr(), source.data_ptr(), size)
            staged[position] = field
        return staged

    def _row(self, index: int) -> list[Tensor]:
        row = self._rows[index]
        if row is None:
            start = index * self._width
            parts = [(start + offset, size) for _, offset, size in self._fields]
            row = self._rows[index] = [self._memory[first : first + max(size, 1)] for first, size in parts]
        return row
