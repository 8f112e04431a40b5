"""Operators that launch several kernels, written as one that launches a single one or that `fuse_exact` can take in.

Before::

    %a : masked_fill.Scalar(%rows, %beyond, 0)                # a copy, then the fill
    %b : nonzero_static.default(%mask, size=64, fill_value=0) # five kernels, for 64 elements

After::

    %a : where.self(%beyond, %zero, %rows)
    %seen : sum.dim_IntList(logical_and(%mask, %lower), [1])  # how many are true up to here
    %b : sum.dim_IntList(le(%seen, %iota), [1])               # how many places there are before the k-th
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.core.names import LAUNCH_CONSTANT, fresh_name
from passes.core.symbols import has_static_shape
from passes.core.values.fake_values import emit

aten = torch.ops.aten
Tensor = torch.Tensor
FEW = 256
"""Elements of a mask up to which all pairs of them are compared."""


def fewer_launches(module: GraphModule) -> list[tuple[str, str]]:
    """Rewrite ``module`` in place; returns the nodes before and after."""
    changes = []
    constants = _Constants(module)
    for node in list(module.graph.nodes):
        rule = _RULES.get(node.target)
        with module.graph.inserting_before(node):
            made = rule(constants, node) if rule is not None else None
        if made is not None:
            changes.append((str(node), str(made)))
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)
    return changes


class _Constants:
    """Small tensors that every run of a graph reads, each made once."""

    def __init__(self, module: GraphModule) -> None:
        self.graph = module.graph
        self._module = module
        self._names: dict[Any, str] = {}

    def get(self, key: Any, make: Callable[[], Tensor]) -> Node:
        """A node that reads the constant known as ``key``."""
        if key not in self._names:
            self._names[key] = fresh_name(self._module, LAUNCH_CONSTANT)
            self._module.register_buffer(self._names[key], make(), persistent=False)
        node = self.graph.get_attr(self._names[key])
        node.meta["val"] = self._module.get_buffer(self._names[key])
        return node


def _fill(constants: _Constants, node: Node) -> Node | None:
    """``x.masked_fill(mask, number)``, of a tensor whose layout both operators keep."""
    x, mask, number = node.args
    value = _value(x)
    if value is None or not value.is_contiguous() or not isinstance(number, (bool, int, float)):
        return None
    key = ("number", repr(number), value.dtype, value.device)
    filled = constants.get(key, lambda: torch.tensor(number, dtype=value.dtype, device=value.device))
    return emit(constants.graph, aten.where.self, (mask, filled, x))


def _places(constants: _Constants, node: Node) -> Node | None:
    """``torch.nonzero_static(mask, size=size)`` of a short mask with one dimension."""
    mask = _value(node.args[0])
    size: Any = node.kwargs["size"]
    fill: Any = node.kwargs.get("fill_value", -1)
    if mask is None or mask.dtype != torch.bool or mask.dim() != 1 or not 0 < mask.numel() <= FEW or not 0 < size <= FEW:
        return None
    count, device, call = mask.numel(), mask.device, functools.partial(emit, constants.graph)
    lower = constants.get(("lower", count, device), lambda: torch.ones(count, count, dtype=torch.bool, device=device).tril())
    order = constants.get(("iota", size, device), lambda: torch.arange(size, device=device))
    filled = constants.get(("number", fill, device), lambda: torch.tensor(fill, device=device))
    pairs = call(aten.logical_and.default, (lower, call(aten.unsqueeze.default, (node.args[0], 0))))
    seen = call(aten.sum.dim_IntList, (pairs, [1]))
    before = call(aten.le.Tensor, (call(aten.unsqueeze.default, (seen, 0)), call(aten.unsqueeze.default, (order, 1))))
    places = call(aten.sum.dim_IntList, (before, [1]))
    there = call(aten.lt.Tensor, (order, call(aten.select.int, (seen, 0, count - 1))))
    return call(aten.unsqueeze.default, (call(aten.where.self, (there, places, filled)), 1))


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if has_static_shape(value) else None


_RULES = {aten.masked_fill.Scalar: _fill, aten.nonzero_static.default: _places}
