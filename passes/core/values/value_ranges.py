"""What values an integer tensor can have at all, whatever the data: places that a sort gives lie in its tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.core.aliasing import Aliases, written
from passes.core.names import is_pass_constant

aten = torch.ops.aten
Range = tuple[int, int]


class Ranges:
    """The ranges of one graph. Nothing is known of memory that is written in place, nor of what is the caller's."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        aliases = Aliases.of(module)
        self._roots = {node: aliases.root(node) for node in module.graph.nodes}
        self._written = {self._roots[target] for node in module.graph.nodes for target in written(node)}

    def __call__(self, value: Any) -> Range | None:
        """The least and the largest value of a number or an integer tensor, where they follow from how it was made."""
        if not isinstance(value, Node):
            return (int(value), int(value)) if isinstance(value, int) else None
        if value.op == "get_attr" and is_pass_constant(value.target):
            held = getattr(self._module, str(value.target))
            return (int(held.min()), int(held.max())) if held.numel() and not held.dtype.is_floating_point else None
        made = value.meta.get("val")
        if value.op != "call_function" or not isinstance(made, torch.Tensor) or made.dtype.is_floating_point:
            return None
        if self._roots.get(value) in self._written:
            return None
        rule = _RULES.get(value.target)
        return rule(self, value) if rule is not None else None


def _first(of: Ranges, node: Node) -> Range | None:
    return of(node.args[0])


def _clamped(of: Ranges, node: Node) -> Range | None:
    low, high = node.args[1], node.args[2] if len(node.args) > 2 else None
    return (low, high) if isinstance(low, int) and isinstance(high, int) else None


def _remainder(of: Ranges, node: Node) -> Range | None:
    size = node.args[1]
    return (0, size - 1) if isinstance(size, int) and size > 0 else None


def _divided(of: Ranges, node: Node) -> Range | None:
    found, by = of(node.args[0]), node.args[1]
    return (found[0] // by, found[1] // by) if found is not None and isinstance(by, int) and by > 0 else None


def _filled(of: Ranges, node: Node) -> Range | None:
    return _either(of(node.args[0]), of(node.args[2]))


def _chosen(of: Ranges, node: Node) -> Range | None:
    return _either(of(node.args[1]), of(node.args[2]))


def _either(a: Range | None, b: Range | None) -> Range | None:
    return (min(a[0], b[0]), max(a[1], b[1])) if a is not None and b is not None else None


def _place(of: Ranges, node: Node) -> Range | None:
    """The second result of a sort or a top-k, and of a maximum."""
    source, index = node.args
    if index != 1 or not isinstance(source, Node) or source.target not in _PLACES:
        return None
    given = source.args[0].meta["val"]  # type: ignore[union-attr]
    return (0, max(int(size) for size in given.shape) - 1) if given.dim() else (0, 0)


def _rows(of: Ranges, node: Node) -> Range | None:
    """Rows of ``nonzero_static``, filled with one of them."""
    given = node.args[0].meta["val"]  # type: ignore[union-attr]
    fill = node.kwargs.get("fill_value", -1)
    return (0, max(int(size) for size in given.shape) - 1) if fill == 0 and given.numel() else None


_PLACES = (aten.sort.stable, aten.sort.default, aten.topk.default, aten.max.dim, aten.min.dim)
_THROUGH = (
    *(aten.view.default, aten.reshape.default, aten.select.int, aten.slice.Tensor, aten.expand.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.clone.default),
    *(aten.permute.default, aten.transpose.int, aten.alias.default),
)
_RULES: dict[Any, Callable[[Ranges, Node], Range | None]] = {
    **dict.fromkeys(_THROUGH, _first),
    operator.getitem: _place,
    aten.clamp.default: _clamped,
    aten.remainder.Scalar: _remainder,
    aten.floor_divide.default: _divided,
    aten.masked_fill.Scalar: _filled,
    aten.where.self: _chosen,
    aten.nonzero_static.default: _rows,
}
