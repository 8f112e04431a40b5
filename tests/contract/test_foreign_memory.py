"""Tensors of two storages over one memory: parts of a buffer of NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from torch import nn

import graphs
from graphs.contract.static_tensors import StaticTensors

Tensor = torch.Tensor


def parts(first: slice, second: slice) -> tuple[numpy.ndarray, Tensor, Tensor]:
    buffer = numpy.arange(8, dtype=numpy.float32)
    return buffer, torch.from_numpy(buffer[first]), torch.from_numpy(buffer[second])


def write_first(x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    return y * 2


def write_both(x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    y.mul_(2)
    return x + y.sum()


PARTS = {
    "behind": (slice(0, 4), slice(2, 6)),
    "before": (slice(2, 6), slice(0, 4)),
    "within": (slice(0, 8), slice(3, 5)),
    "around": (slice(3, 5), slice(0, 8)),
    "the same": (slice(0, 4), slice(0, 4)),
    "apart": (slice(0, 3), slice(4, 8)),
    "every other": (slice(0, 8, 2), slice(1, 8, 2)),
}


@pytest.mark.parametrize("model", [write_first, write_both])
@pytest.mark.parametrize("name", PARTS)
def test_overlapping_parts_of_one_buffer_are_read_after_the_write(name: str, model: Callable[..., Tensor]) -> None:
    step = graphs.capture(model)
    (expected_buffer, *expected), (buffer, *given) = parts(*PARTS[name]), parts(*PARTS[name])
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(step(*given), model(*expected))
            assert (buffer == expected_buffer).all()


@pytest.mark.parametrize("name", PARTS)
def test_an_argument_that_comes_to_overlap_is_read_after_the_write(name: str) -> None:
    step = graphs.capture(write_first)
    buffer, written, overlapping = parts(*PARTS[name])
    with torch.no_grad():
        for other in (torch.ones(overlapping.shape), torch.ones(overlapping.shape), overlapping, torch.ones(overlapping.shape)):
            before = buffer.copy()
            got = step(written, other)
            after = numpy.copy(buffer)
            buffer[:] = before
            assert torch.equal(got, write_first(written, other)) and (buffer == after).all()


def test_an_argument_that_overlaps_the_steps_own_state_is_read_after_the_write() -> None:
    class Step(nn.Module):
        def __init__(self, state: Tensor) -> None:
            super().__init__()
            self.state = state

        def forward(self, x: Tensor) -> Tensor:
            self.state.add_(1)
            return x * 2

    buffer, state, x = parts(slice(2, 6), slice(0, 4))
    step = graphs.capture(Step(state))
    with torch.no_grad():
        for call in range(4):
            assert step(x).tolist() == [0, 2, 2 * (2 + call + 1), 2 * (3 + call + 1)]
    assert buffer.tolist() == [0, 1, 6, 7, 8, 9, 6, 7]


def test_what_is_far_enough_for_a_short_argument_need_not_be_for_a_long_one() -> None:
    buffer = torch.zeros(100)
    checked = StaticTensors([], [], [torch.from_numpy(buffer.numpy()[50:60])], [])
    assert checked.unchanged([buffer[40:45]]) and checked.unchanged([buffer[40:45]])
    assert not checked.unchanged([buffer[40:55]])
    assert checked.unchanged([buffer[60:]]) and not checked.unchanged([buffer[59:]])
    assert not checked.unchanged([buffer[:51:50]])


def test_a_remembered_address_is_far_enough_for_every_argument() -> None:
    buffer = torch.zeros(100)
    checked = StaticTensors([], [], [torch.from_numpy(buffer.numpy()[50:60])], [], longest=60)
    for _ in range(2):
        assert checked.unchanged([buffer[40:45], buffer[:15]])
        assert not checked.unchanged([buffer[:5], buffer[40:55]])
