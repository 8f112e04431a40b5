"""Arguments of a call: new values like those of the example, in other layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

Tensor = torch.Tensor
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def new_values(example: Tensor, draws: torch.Generator) -> Tensor:
    """Other values of the same shape, dtype and device, contiguous.

    Integers lie within those of the example, so that an index stays one; floats have its mean and spread; booleans are
    drawn anew.
    """
    size = tuple(example.shape)
    with torch.no_grad():
        if not example.numel():
            made = torch.empty(size)
        elif example.dtype is torch.bool:
            made = torch.rand(size, generator=draws) > 0.5
        elif example.dtype.is_floating_point or example.dtype.is_complex:
            wide = torch.complex128 if example.dtype.is_complex else torch.float64
            values = example.detach().cpu().to(wide)
            finite = values[torch.isfinite(values)]
            spread = finite.abs().pow(2).mean().sqrt() if finite.numel() else torch.tensor(1.0)
            made = torch.randn(size, dtype=wide, generator=draws) * spread
        else:
            low, high = int(example.min()), int(example.max())
            made = torch.randint(low, high + 1, size, generator=draws)
        return made.to(example.dtype).to(example.device)


def _transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.dim() > 1 else value


def _sliced(value: Tensor) -> Tensor:
    if not value.dim():
        return value
    larger = torch.cat([value, value], -1)
    return larger.narrow(-1, 0, value.shape[-1])


def _offset(value: Tensor) -> Tensor:
    larger = value.new_zeros(value.numel() + 3)
    part = larger[3:].view(value.shape)
    return part.copy_(value)


def _expanded(value: Tensor) -> Tensor:
    return value[:1].expand_as(value) if value.dim() and value.shape[0] else value


def _parameter(value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda value: value,
    "transposed": _transposed,
    "slice of a larger tensor": _sliced,
    "storage offset": _offset,
    "expanded": _expanded,
    "parameter": _parameter,
    "detached view": lambda value: value[...].detach(),
}
"""Layouts that hold the same values. An expanded tensor repeats its first row, so it is a value of its own."""
MIXED, TWICE = "layouts in turn", "same tensor twice"


def arguments(example: Arguments, seed: int, layout: str) -> Arguments:
    """New arguments of a call. Containers and everything that is no tensor are kept as they are.

    Args:
        layout: of `LAYOUTS`, or `MIXED` (the next one at each seed), or `TWICE` (one tensor wherever shapes and dtypes agree).
    """
    draws = torch.Generator().manual_seed(seed)
    laid_out = LAYOUTS[list(LAYOUTS)[seed % len(LAYOUTS)]] if layout == MIXED else LAYOUTS.get(layout, LAYOUTS["contiguous"])
    first: dict[Any, Tensor] = {}

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return leaf
        if leaf.requires_grad:
            return new_values(leaf, draws).requires_grad_()
        value = laid_out(new_values(leaf, draws))
        return first.setdefault((value.shape, value.dtype), value) if layout == TWICE else value

    return _pytree.tree_map(made, example)


def layouts_of(example: Arguments) -> Iterator[str]:
    """The layouts that make a difference for these arguments."""
    tensors = [leaf for leaf in _pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    if any(tensor.dim() for tensor in tensors):
        yield from (name for name in LAYOUTS if name != "contiguous")
        yield MIXED
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) < len(tensors):
        yield TWICE
