"""Views as layouts: which element of a source each element of a view is.

A layout gives every dimension of a view as digits, pairs of a size and a stride over the row-major index of its source,
outermost first. So a transpose, a slice, a split or merged dimension and a repeated one are all the same kind of value:
two spellings of a view have one layout, and the layout of a view of a view is a composition. Dimensions of size 1 have no
digits, repeated ones a stride of 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Digit(NamedTuple):
    """``size`` steps of ``stride`` elements."""

    size: int
    stride: int


Digits = tuple[Digit, ...]


class Layout(NamedTuple):
    """Element ``i`` of a view is element ``offset + sum(digits of i * strides)`` of its source, both row-major."""

    dims: tuple[Digits, ...]
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the view."""
        return tuple(size_of(dim) for dim in self.dims)

    @property
    def digits(self) -> Digits:
        """The digits of all dimensions, outermost first."""
        return tuple(digit for dim in self.dims for digit in dim)

    def covers(self, elements: int) -> bool:
        """Whether the view holds each of the source's ``elements`` once: a permutation of it."""
        return not self.offset and tiles(self.digits, elements)


def size_of(digits: Sequence[Digit]) -> int:
    """The size of a dimension."""
    return math.prod(digit.size for digit in digits)


def identity(shape: Sequence[int]) -> Layout:
    """A tensor as a view of itself."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Layout(tuple(_one(size, stride) for size, stride in zip(shape, strides, strict=True)))


def layout_of(view: Tensor) -> Layout:
    """The layout of a view of a contiguous tensor, from its strides."""
    dims = tuple(_one(size, stride) for size, stride in zip(view.shape, view.stride(), strict=True))
    return Layout(dims, int(view.storage_offset()))


def _one(size: int, stride: int) -> Digits:
    return () if size == 1 else (Digit(size, stride),)


def tiles(digits: Sequence[Digit], elements: int) -> bool:
    """Whether the digits, in some order, count from 0 to ``elements - 1`` without a gap."""
    expected = 1
    for size, stride in sorted(digits, key=lambda digit: digit.stride):
        if stride != expected:
            return False
        expected *= size
    return expected == elements


def merged(digits: Sequence[Digit]) -> Digits:
    """The same dimension in as few digits as possible."""
    found: list[Digit] = []
    for digit in digits:
        if found and found[-1].stride == digit.size * digit.stride:
            digit = Digit(found.pop().size * digit.size, digit.stride)
        found.append(digit)
    return tuple(found)


def compose(outer: Layout, inner: Layout) -> Layout | None:
    """The layout, over the source of ``outer``, of the view ``inner`` of ``outer``; None where no layout describes it."""
    walk = _Walk(outer.digits)
    dims = []
    for dim in inner.dims:
        parts = [walk.through(digit) for digit in dim]
        if any(part is None for part in parts):
            return None
        dims.append(merged([digit for part in parts if part is not None for digit in part]))
    offset = walk.start(inner.offset)
    return None if offset is None else Layout(tuple(dims), outer.offset + offset)


class _Walk:
    """Follows digits over the row-major index of a view down to the digits of the view."""

    def __init__(self, digits: Digits) -> None:
        self.digits = digits
        self.places = [math.prod(digit.size for digit in digits[i + 1 :]) for i in range(len(digits))]
        self.reach = [0] * len(digits)  # the largest index that is taken in each digit

    def through(self, digit: Digit) -> list[Digit] | None:
        """``digit`` in terms of the view's digits, outermost first; None where it crosses one unevenly."""
        steps, at = digit
        if at == 0:
            return [digit]
        found: list[Digit] = []
        for index in reversed(range(len(self.digits))):
            (size, stride), place = self.digits[index], self.places[index]
            if steps == 1 or at >= place * size:
                continue
            jump, uneven = divmod(at, place)
            if uneven:
                return None
            taken = steps if (steps - 1) * jump < size else size // jump
            if taken < steps and (size % jump or steps % taken):
                return None
            found.append(Digit(taken, stride * jump))
            self.reach[index] += (taken - 1) * jump
            steps, at = steps // taken, place * size
        return found[::-1] if steps == 1 else None

    def start(self, offset: int) -> int | None:
        """Where the view's element ``offset`` lies, if nothing that was followed runs over the end of a digit from there."""
        found = 0
        for (size, stride), place, reach in zip(self.digits, self.places, self.reach, strict=True):
            index, offset = divmod(offset, place)
            if index + reach >= size:
                return None
            found += index * stride
        return found if offset == 0 else None


def aligned(first: Sequence[Digit], second: Sequence[Digit]) -> list[tuple[Digit, Digit]] | None:
    """Two descriptions of one dimension, split until their sizes agree; None where they cannot."""
    left, right = list(first), list(second)
    pairs: list[tuple[Digit, Digit]] = []
    while left and right:
        a, b = left.pop(), right.pop()
        size = min(a.size, b.size)
        if a.size % size or b.size % size:
            return None
        if a.size > size:
            left.append(Digit(a.size // size, a.stride * size))
        if b.size > size:
            right.append(Digit(b.size // size, b.stride * size))
        pairs.append((Digit(size, a.stride), Digit(size, b.stride)))
    return None if left or right else pairs[::-1]


def progression(offsets: Sequence[int]) -> int | None:
    """The positive step between equidistant ``offsets``, or None."""
    step = offsets[1] - offsets[0]
    return step if step > 0 and all(b - a == step for a, b in itertools.pairwise(offsets)) else None


def materialise(source: Tensor, layout: Layout) -> Tensor:
    """The view ``layout`` of ``source``, sharing its memory where that is laid out so."""
    digits = layout.digits
    flat = source.contiguous().view(-1)
    start = int(flat.storage_offset()) + layout.offset
    view = flat.as_strided([digit.size for digit in digits], [digit.stride for digit in digits], start)
    return view.reshape(layout.shape)
