"""Small host arguments in pinned memory: what lies where, and when a row may be written again."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so the table of addresses cannot be imported")

from graphs.contract.slots import Slot
from graphs.recording import copy_kernels
from graphs.recording.copy_kernels import HALF, RING, AddressTable
from graphs.recording.host_ring import HostRing


def slot(index: int, tensor: torch.Tensor) -> Slot:
    return Slot(
        f"t{index}", index, tuple(tensor.shape), tensor.dtype, torch.device("cpu"), strides=tensor.stride(), from_host=True
    )


def held(place: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What the device finds at the address of a place."""
    memory = (ctypes.c_char * like.nbytes).from_address(place.data_ptr())
    return torch.frombuffer(bytearray(memory.raw), dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.int32, torch.float64, torch.complex128])
@pytest.mark.parametrize("turn", [0, 1, 511, 512, 1300])
def test_a_row_holds_the_bytes_of_its_turn_and_leaves_the_others_alone(dtype: torch.dtype, turn: int) -> None:
    scalar, matrix = torch.tensor(1).to(dtype), torch.arange(15).reshape(3, 5).to(dtype).t()
    ring = HostRing([slot(0, scalar), slot(2, matrix)], RING, pinned=False)
    other = torch.ones(7)
    before = ring.stage([torch.zeros_like(scalar), other, torch.zeros_like(matrix)], turn + 1)
    staged = ring.stage([scalar, other, matrix], turn)
    assert staged[1] is other
    assert torch.equal(held(staged[0], scalar), scalar) and torch.equal(held(staged[2], matrix), matrix)
    assert not held(before[2], matrix).any(), "the row of another turn"
    assert staged[0].data_ptr() % 16 == staged[2].data_ptr() % 16 == ring._memory.data_ptr() % 16


def test_a_later_change_of_the_argument_does_not_reach_the_row() -> None:
    value = torch.tensor(2.5)
    ring = HostRing([slot(0, value)], RING, pinned=False)
    (place,) = ring.stage([value], 3)
    value.fill_(9)
    assert held(place, value) == 2.5
    assert ring.stage([value], 3 + RING)[0].data_ptr() == place.data_ptr(), "a ring"


def test_bits_and_attributes_do_not_change_what_is_copied() -> None:
    z = torch.randn(4, dtype=torch.complex64)
    ring = HostRing([slot(0, z)], RING, pinned=False)
    assert torch.equal(held(ring.stage([z.conj()], 0)[0], z), z), "memory as it is: the stand-in has the bit"


class Event:
    """Of a device that finishes nothing unless it is waited for."""

    waits: ClassVar[list[int]] = []
    made = 0

    def __init__(self) -> None:
        self.number = Event.made
        Event.made += 1

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.waits.append(self.number)


@pytest.mark.parametrize("staging", [False, True])
def test_a_row_is_written_only_when_no_replay_reads_it(monkeypatch: pytest.MonkeyPatch, staging: bool) -> None:
    monkeypatch.setattr(copy_kernels.torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "waits", [])
    monkeypatch.setattr(Event, "made", 0)
    table: Any = object.__new__(AddressTable)
    table.width, table.turn, table._paced, table._ends = 2, 0, 0, [None, None]
    table._words = (ctypes.c_int64 * (RING * 2))()
    for turn in range(3 * RING):
        if staging:  # ahead of the address, and only once per half
            assert table.make_room() == turn
            assert len(Event.waits) == max(turn // HALF - 1, 0)
        table.claim([1, turn])
        table.turn += 1
    assert list(table._words[2 * 7 : 2 * 8]) == [1, 2 * RING + 7]
    assert Event.waits == [0, 1, 2, 3], "each half waits for the end of the replays that read it before"
