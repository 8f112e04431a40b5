"""Layouts: random chains of view operators on numbered elements, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.projections.layouts import Digit, Layout, aligned, compose, identity, layout_of, materialise, progression, tiles

Tensor = torch.Tensor
SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def view_of(draw: st.DataObject, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A view operator that applies to tensors of ``x``'s shape."""
    dim = draw.draw(st.integers(0, x.dim() - 1))
    size = x.shape[dim]
    start = draw.draw(st.integers(0, size - 1))
    length = draw.draw(st.integers(1, size - start))
    order = draw.draw(st.permutations(range(x.dim())))
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.permute(order),
        lambda t: t.narrow(dim, start, length),
        lambda t: t[(slice(None),) * dim + (slice(start, None, 2),)],
        lambda t: t.unsqueeze(dim).expand(*t.shape[:dim], 2, *t.shape[dim:]),
        lambda t: t.flatten(),
        lambda t: t.reshape(-1, t.shape[-1]),
    ]
    if x.dim() > 1:
        ways.append(lambda t: t.select(dim, start))
    if size % 2 == 0:
        ways.append(lambda t: t.unflatten(dim, (2, -1)))
    return draw.draw(st.sampled_from(ways))


@given(SIZES, st.data())
def test_a_layout_follows_any_chain_of_views(sizes: list[int], draw: st.DataObject) -> None:
    source = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    layout, value = identity(sizes), source
    for _ in range(draw.draw(st.integers(1, 5))):
        view = view_of(draw, value)
        composed = compose(layout, layout_of(view(torch.empty(value.shape, device="meta"))))
        if composed is None:
            return  # a step that counts unevenly through merged dimensions has no layout
        layout, value = composed, view(value)
        assert layout.shape == tuple(value.shape)
        assert torch.equal(materialise(source, layout), value)
        assert layout.covers(source.numel()) == (sorted(value.flatten().tolist()) == list(range(source.numel())))


def test_two_spellings_have_one_layout() -> None:
    x = torch.empty(6, 4, 5, device="meta")
    merged = layout_of(x.permute(2, 0, 1))
    assert compose(identity((6, 4, 5)), merged) == compose(identity((6, 4, 5)), layout_of(x.movedim(-1, 0)))
    apart = compose(identity((24, 5)), layout_of(torch.empty(24, 5, device="meta").view(6, 4, 5)))
    assert apart is not None and compose(apart, Layout(((Digit(24, 5),), (Digit(5, 1),)))) == identity((24, 5))


def test_what_no_layout_describes_is_told() -> None:
    half = compose(identity((4, 6)), layout_of(torch.empty(4, 6, device="meta")[:, :3]))
    assert half is not None
    assert compose(half, layout_of(torch.empty(12, device="meta")[2:4])) is None  # runs over the end of a row
    assert compose(half, layout_of(torch.empty(12, device="meta")[::2])) is None  # counts unevenly through rows of three


def test_dimensions_are_split_until_they_agree() -> None:
    pairs = aligned([Digit(6, 4)], [Digit(2, 30), Digit(3, 5)])
    assert pairs == [(Digit(2, 12), Digit(2, 30)), (Digit(3, 4), Digit(3, 5))]
    assert aligned([Digit(6, 1)], [Digit(4, 1)]) is None and aligned([Digit(2, 1)], [Digit(3, 1), Digit(2, 1)]) is None


def test_progressions_and_tilings() -> None:
    assert progression([3, 7, 11]) == 4
    assert progression([3, 3]) is None and progression([7, 3]) is None and progression([0, 4, 9]) is None
    assert tiles([Digit(2, 3), Digit(3, 1)], 6) and not tiles([Digit(2, 3), Digit(2, 1)], 6) and not tiles([Digit(2, 0)], 2)
