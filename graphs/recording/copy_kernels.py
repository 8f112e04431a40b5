"""Inputs in and outputs out as part of the recorded graph: no launch of their own, no work on the host but addresses.

The first kernel of a recording copies the caller's tensors into the slots, the last copies the static outputs into
tensors that the caller owns. Both find the addresses in a table in pinned host memory, which the host fills before each
replay:

    table[turn % RING] = [real rows, address of input 0, .., address of output 0, ..]

Every warp that reads a row from host memory waits 0.94 us for it on an H200, one warp after the other. So where the inputs
take more than `FEW` programs, a kernel of one warp fetches the row ahead of them; where they take fewer, those have one warp.

``turn`` is counted on the device by the last kernel and on the host by the caller, so a row of the table is not written
again until the replay that read it is known to be over: see `AddressTable.claim`. Padding and the slicing-off of padding
are part of the two kernels, so a captured call launches one graph and nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs.contract.padding import Padding
from graphs.errors import MissingDependency

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingDependency("triton", "recording a step on a GPU", "pip install triton") from error

Tensor = torch.Tensor
RING = 512
HALF = RING // 2
_HEADER = 3  # ring, width, first address column
_FIELDS = 7  # static address, outer, rows, bytes of a row, padding kind, fill bits, has a batch dimension
_CONSTANTS = {"HEADER": _HEADER, "FIELDS": _FIELDS}
_KINDS = {"repeat": 0, "zero": 1, "sentinel": 1, "keep": 2}
_WARPS = 4
_BLOCK = 1024  # units that a program of four warps copies at a time
FEW = 2
"""Programs up to which each reads its row from host memory itself: another node of the graph costs 1.3 us and its read 0.94."""


@triton.jit
def _move_units(
    target, source, outer, target_rows, source_rows, inner, real, kind, fill, start, stride,
    BLOCK: tl.constexpr, HOST: tl.constexpr,
):  # fmt: skip
    """Copy ``outer x rows x inner`` units between tensors that differ in their rows; rows from ``real`` on are padding."""
    total = outer * target_rows * inner
    for first in range(start * BLOCK, total, stride * BLOCK):
        unit = first + tl.arange(0, BLOCK)
        column = unit % inner
        row = (unit // inner) % target_rows
        plane = unit // (inner * target_rows)
        inside = unit < total
        from_source = (row < real) | (kind == 0)
        value = tl.load(
            source + (plane * source_rows + tl.minimum(row, real - 1)) * inner + column,
            mask=inside & from_source,
            other=0,
            volatile=HOST,
        )
        value = tl.where(from_source, value, fill.to(value.dtype))
        tl.store(target + unit, value, mask=inside & (from_source | (kind != 2)))


@triton.jit
def _row_of_this_turn(table, cursor, fields, columns):
    """This turn's row, read past the caches: the host writes it anew."""
    ring = tl.load(fields)
    width = tl.load(fields + 1)
    return tl.load(table + (tl.load(cursor) % ring) * width + columns, mask=columns < width, other=0, volatile=True)


@triton.jit
def fetch_row(table, cursor, current, fields, WIDTH: tl.constexpr):
    """Bring this turn's row to the device, for the programs of `move_rows`; the arguments are described there."""
    columns = tl.arange(0, WIDTH)
    tl.store(current + columns, _row_of_this_turn(table, cursor, fields, columns))


@triton.jit
def move_rows(
    table, cursor, current, fields,
    INBOUND: tl.constexpr, FETCH: tl.constexpr, WIDTH: tl.constexpr, HEADER: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr, HOST: tl.constexpr,
):  # fmt: skip
    """Copy every input into its slot (INBOUND) or every static output into the caller's tensor.

    Args:
        table: int64 ``[ring, width]`` in pinned host memory, ``width <= WIDTH``; cursor: int64 ``[1]``, the turn;
            current: int64 ``[WIDTH]``, this turn's row on the device; fields: int64, the header and a line per tensor.
        FETCH: the row is not on the device yet: read it from the table and leave it there.
        HOST: some inputs lie in pinned memory that the host writes anew: sources are read past the caches.
    """
    entry = tl.program_id(0)
    column = tl.load(fields + 2) + entry
    columns = tl.arange(0, WIDTH)
    first = (entry == 0) & (tl.program_id(1) == 0)
    if FETCH:
        row = _row_of_this_turn(table, cursor, fields, columns)
        if first:
            tl.store(current + columns, row)
    else:
        row = tl.load(current + columns)
    if not INBOUND:  # noqa: SIM102 (known to the compiler, and known on the device)
        if first:
            tl.store(cursor, tl.load(cursor) + 1)
    real = tl.sum(tl.where(columns == 0, row, 0)).to(tl.int32)
    caller = tl.sum(tl.where(columns == column, row, 0))
    line = fields + HEADER + entry * FIELDS
    static = tl.load(line)
    outer = tl.load(line + 1).to(tl.int32)
    rows = tl.load(line + 2).to(tl.int32)
    inner = tl.load(line + 3)
    kind = tl.load(line + 4).to(tl.int32)
    fill = tl.load(line + 5)
    if tl.load(line + 6) == 0:
        real = rows
    if INBOUND:
        target, source, target_rows, source_rows = static, caller, rows, real
    else:
        target, source, target_rows, source_rows = caller, static, real, rows
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    ragged = inner | caller | static  # a row or an address that is no multiple of eight bytes is copied in smaller units
    if (ragged & 7) == 0:
        t8 = target.to(tl.pointer_type(tl.int64))
        s8 = source.to(tl.pointer_type(tl.int64))
        _move_units(
            t8, s8, outer, target_rows, source_rows, (inner // 8).to(tl.int32), real, kind, fill, block, blocks, BLOCK, HOST
        )
    elif (ragged & 3) == 0:
        t4 = target.to(tl.pointer_type(tl.int32))
        s4 = source.to(tl.pointer_type(tl.int32))
        _move_units(
            t4, s4, outer, target_rows, source_rows, (inner // 4).to(tl.int32), real, kind, fill, block, blocks, BLOCK, HOST
        )
    elif (ragged & 1) == 0:
        t2 = target.to(tl.pointer_type(tl.int16))
        s2 = source.to(tl.pointer_type(tl.int16))
        _move_units(
            t2, s2, outer, target_rows, source_rows, (inner // 2).to(tl.int32), real, kind, fill, block, blocks, BLOCK, HOST
        )
    else:
        t1 = target.to(tl.pointer_type(tl.int8))
        s1 = source.to(tl.pointer_type(tl.int8))
        _move_units(t1, s1, outer, target_rows, source_rows, inner.to(tl.int32), real, kind, fill, block, blocks, BLOCK, HOST)


@dataclass(frozen=True)
class Move:
    """One static tensor (a slot's buffer or a static output, dense) and how rows of it are copied."""

    static: Tensor
    batch_dim: int | None
    padding: Padding

    def fields(self) -> list[int]:
        """The line of the table of fields that `move_rows` reads."""
        tensor, size = self.static, self.static.element_size()
        if self.batch_dim is None:
            outer, rows, inner = 1, 1, tensor.numel() * size
        else:
            outer = _product(tensor.shape[: self.batch_dim])
            rows = tensor.shape[self.batch_dim]
            inner = _product(tensor.shape[self.batch_dim + 1 :]) * size
        kind, fill = _KINDS[self.padding.kind], self.padding.fill_bits(tensor.dtype)
        return [tensor.data_ptr(), outer, rows, inner, kind, fill, int(self.batch_dim is not None)]


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


class AddressTable:
    """The pinned table of addresses, with the host's side of the turn counter."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.width = 1 + columns
        self.padded_width = max(32, triton.next_power_of_2(self.width))
        self.turn = 0
        self._paced = 0  # the turn that was waited for last
        with torch.inference_mode(False):
            self.pinned = torch.zeros(RING * self.width, dtype=torch.int64, pin_memory=True)
            self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
            self.current = torch.zeros(self.padded_width, dtype=torch.int64, device=device)
        self._words = (ctypes.c_int64 * (RING * self.width)).from_address(self.pinned.data_ptr())
        self._ends: list[torch.cuda.Event | None] = [None, None]

    def claim(self, row: list[int]) -> None:
        """Write the next turn's row; waits only when the device is more than half a ring behind."""
        turn = self.turn % RING
        if turn % HALF == 0 and self.turn != self._paced:
            self.make_room()
        start = turn * self.width
        self._words[start : start + self.width] = row  # type: ignore[assignment]

    def make_room(self) -> int:
        """The next turn, once no replay reads what belongs to its row any more; waits as `claim` does, and once only."""
        turn = self.turn % RING
        if turn % HALF == 0 and self.turn != self._paced:
            self._paced = self.turn
            self._pace(turn // HALF)
        return self.turn

    def _pace(self, half: int) -> None:
        """Mark the end of the half just used up, and wait for the replays that last read the half about to be used."""
        ended = torch.cuda.Event()
        ended.record()
        self._ends[1 - half] = ended
        before = self._ends[half]
        if before is not None:
            before.synchronize()


class Copier:
    """The inbound or the outbound copies of a recording.

    The line of fields per tensor is uploaded outside the capture, since a capture cannot copy from the host; the static
    outputs are known only inside it. So: `bind` (anywhere), `launch` (inside the capture), `upload` (outside).
    """

    def __init__(self, count: int, table: AddressTable, first_column: int, *, inbound: bool, host: bool = False) -> None:
        self._table, self._inbound, self._host = table, inbound, host
        self._fields = [RING, table.width, first_column, *[0] * (_FIELDS * max(count, 1))]
        self._grid = (max(count, 1), 1)
        with torch.inference_mode(False):
            self._on_device = torch.zeros(len(self._fields), dtype=torch.int64, device=table.cursor.device)

    def bind(self, moves: Sequence[Move], programs: int = 1) -> None:
        """Set the tensors that are copied, each by at least ``programs`` programs.

        They must stay where they are; this object does not hold them.
        """
        units = 1
        for index, move in enumerate(moves):
            line = move.fields()
            units = max(units, line[1] * line[2] * line[3] // 8)
            self._fields[_HEADER + index * _FIELDS : _HEADER + (index + 1) * _FIELDS] = line
        if not moves:  # nothing to copy; the kernel still carries the turn
            self._fields[_HEADER:] = [0, 0, 1, 8, 0, 0, 0]
        self._grid = (self._grid[0], max(min(-(-units // _BLOCK), 264), programs))

    def upload(self) -> None:
        """Bring the fields to the device."""
        self._on_device.copy_(torch.tensor(self._fields, dtype=torch.int64))

    def launch(self) -> None:
        """Launch on the current stream; inside a capture this becomes one node of the graph, or two."""
        programs = self._grid[0] * self._grid[1]
        fetch = self._inbound and programs <= FEW
        if self._inbound and not fetch:
            self._run(fetch_row, (1,), 1)
        warps = 1 if fetch else _WARPS
        block = _BLOCK * warps // _WARPS
        self._run(move_rows, self._grid, warps, INBOUND=self._inbound, FETCH=fetch, HOST=self._host, **_CONSTANTS, BLOCK=block)

    def _run(self, kernel: Any, grid: tuple[int, ...], warps: int, **constants: Any) -> None:
        table = self._table
        arguments = (table.pinned, table.cursor, table.current, self._on_device)
        kernel[grid](*arguments, WIDTH=table.padded_width, **constants, num_warps=warps)


def load_kernels(table: AddressTable, *, host: bool = False) -> None:
    """Launch everything that a recording with such a table may launch once, copying nothing. Counts turns of ``table``.

    Args:
        host: for recordings that read arguments from host memory.
    """
    for inbound, programs in ((True, 1), (True, FEW + 1), (False, 1)):
        copier = Copier(0, table, 1, inbound=inbound, host=host and inbound)
        copier.bind((), programs)
        copier.upload()
        copier.launch()
