"""Control flow of which both sides become part of the recording, and what keeps a side from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.corpus.case import case, choice, noise, number, phase, whole


@case(lambda i: (noise(i, 5), number(i)), merged=True)
def both_sides_assign(x: Tensor, value: Tensor) -> Tensor:
    if value > 0:
        y, scale = x * value, 2
    else:
        y, scale = x - 1, 5
    return y * scale


@case(lambda i: (noise(i, 4), whole(i, 0, 6), number(i)), merged=True)
class OneSideWritesARow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(6, 4))
        self.register_buffer("writes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, position: Tensor, value: Tensor) -> Tensor:
        row = int(position)
        if value > 0:
            self.cache[row] = x
            self.writes += 1
        return self.cache.sum(0) + self.writes


@case(lambda i: (noise(i, 4), whole(i, 0, 8)), merged=True)
class EachSideHasRowsOfItsOwn(nn.Module):
    """What is an index on one side is none on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(3, 4))
        self.register_buffer("high", torch.zeros(5, 4))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        place = int(position)
        if place < 3:
            self.low[place] += x
            row = self.low[place]
        else:
            self.high[place - 3] = x
            row = self.high[place - 3] * 2
        return row + self.low.sum(0)


@case(lambda i: (noise(i, 5), number(i), number(i * 3 + 1)), merged=True)
def returns_inside_of_branches(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a > 0:
        x = x + a
        if b > 0:
            return x * b
        return x - 1
    elif b < -0.5:
        return x.abs()
    return x.neg()


@case(lambda i: (noise(i, 5), number(i), number(i * 3 + 1), phase(i, 3)), merged=True)
def conditions_of_conditions(x: Tensor, a: Tensor, b: Tensor, kind: Tensor) -> Tensor:
    which = int(kind)
    if a > 0 and not (b > 0 or which == 1):
        x = x + 1
    if which and x.sum() > 0:
        x = x * which
    return x * (2.0 if b > 0 else -0.5)


@case(lambda i: (noise(i, 6, 3), choice(i, 4, 3)), merged=True)
class SequencesThatBringNothingAreSkipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(4, 3))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        lengths = counts.tolist()
        for sequence in range(4):
            if lengths[sequence] == 0:
                continue
            row = x[sequence] * lengths[sequence]
            self.sums[sequence] += row
        return self.sums.clone()


class Parts(NamedTuple):
    row: Tensor
    count: int


@case(lambda i: (noise(i, 5), number(i)), merged=True)
def tuples_with_names(x: Tensor, value: Tensor) -> Tensor:
    parts = Parts(x, 1)
    if value > 0:
        parts = Parts(x * 2, 3)
    return parts.row * parts.count


@case(
    lambda i: (noise(i, 8, 2), whole(i, 0, 6)),
    tolerance="a sum over a padded length adds its terms in another order",
    merged=True,
)
def a_branch_over_lengths(x: Tensor, count: Tensor) -> Tensor:
    n = int(count)
    keys = x[:2]
    if n > 0:
        keys = torch.cat([keys, x[2 : 2 + n] * 2])
    return torch.softmax(keys.sum(1), 0) @ keys


@case(lambda i: (noise(i, 3), whole(i, 0, 4)), merged=True)
def a_side_divides(x: Tensor, count: Tensor) -> Tensor:
    n = int(count)
    if n > 0:
        x = x * (12 // n)
    return x + 1


@case(lambda i: (noise(i, 3), number(i)))
def random_numbers_on_one_side(x: Tensor, value: Tensor) -> Tensor:
    if value > 0:
        x = x + torch.rand_like(x)
    return x * 2


def positive(value: Tensor, x: Tensor) -> Tensor:
    if value.item() < 0:
        raise AssertionError("below zero")
    return x * 2


@case(lambda i: (noise(i, 3), number(i)), eager_calls=8)
def a_side_that_raises(x: Tensor, value: Tensor) -> Tensor:
    if value < 1:
        x = positive(value, x)
    return x + 1


@case(lambda i: (noise(i, 3), number(i)))
def a_list_that_one_side_makes_longer(x: Tensor, value: Tensor) -> Tensor:
    parts = [x, x * 2]
    if value > 0:
        parts.append(x * 3)
    return torch.stack(parts).sum(0)


@case(lambda i: (noise(i, 3), number(i)))
def memory_that_a_side_shares(x: Tensor, value: Tensor) -> Tensor:
    y = x * 1
    z = y
    if value > 0:
        z = y * 2
    z += 1
    return y + z
