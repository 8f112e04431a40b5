"""Writing a rearrangement of a tensor into a graph: at most a reshape, a permute and a reshape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.core.node_calls import attribute, call
from passes.projections.layouts import Digit, Digits, Layout, compose, identity, size_of

Tensor = torch.Tensor
aten = torch.ops.aten


class SizeOf(NamedTuple):
    """The size of one dimension of the activation's root, which the graph does not know beforehand."""

    dim: int


class Step(NamedTuple):
    """``reshape`` to sizes, or ``permute`` by dimensions."""

    method: str
    arguments: tuple[int | SizeOf, ...]


class Rows:
    """Where the rows of a projection are in its activation's root, and whether their number may be written down.

    Args:
        root: the sizes of the activation's root.
        activation: the layout of ``o [M, G, K]`` there.
        free: the number of rows is not known to the graph.
    """

    def __init__(self, root: Sequence[int], activation: Layout, *, free: bool) -> None:
        self.free = free
        self._dims = identity(root).dims
        self._rows = activation.dims[0]

    def of_activation(self, digit: Digit) -> SizeOf | bool:
        """False for a digit that is none of rows; for one of rows the dimension that it is the size of, or True."""
        if digit not in self._rows:
            return False
        return SizeOf(self._dims.index((digit,))) if (digit,) in self._dims else True

    def of_result(self, digit: Digit, row: int) -> SizeOf | bool:
        """The same for ``y [M, G, N]``, whose rows are ``row`` elements each."""
        if digit.size * digit.stride <= row:
            return False
        there = compose(Layout((self._rows,)), Layout(((Digit(digit.size, digit.stride // row),),)))
        if digit.stride % row or there is None or there.dims[0] not in self._dims:
            return True
        return SizeOf(self._dims.index(there.dims[0]))


def activation_steps(root: Sequence[int], activation: Layout, rows: Rows) -> list[Step] | None:
    """How ``o [M, G, K]`` is made from its root; None where a size is not known."""
    return _arranged(identity(root).dims, activation, {d: rows.of_activation(d) for d in activation.digits}, rows.free)


def result_steps(sizes: tuple[int, int, int], result: Layout, rows: Rows) -> list[Step] | None:
    """How the layout ``result`` is made from ``y`` of ``sizes`` M, G and N; None where a size is not known."""
    row = sizes[1] * sizes[2]
    return _arranged(identity(sizes).dims, result, {d: rows.of_result(d, row) for d in result.digits}, rows.free)


def _arranged(whole: tuple[Digits, ...], layout: Layout, rows: Mapping[Digit, SizeOf | bool], free: bool) -> list[Step] | None:
    if layout.dims == whole:
        return []
    split = sorted(layout.digits, key=lambda digit: digit.stride, reverse=True)
    order = tuple(split.index(digit) for digit in layout.digits)
    plan: list[Step | None] = []
    if list(order) != sorted(order):
        apart = tuple((digit,) for digit in split)
        plan += [_reshape(apart, rows, free)] if apart != whole else []
        plan.append(Step("permute", order))
    if not plan or any(len(dim) != 1 for dim in layout.dims):
        plan.append(_reshape(layout.dims, rows, free))
    steps = [step for step in plan if step is not None]
    return steps if len(steps) == len(plan) else None


def _reshape(dims: Sequence[Digits], rows: Mapping[Digit, SizeOf | bool], free: bool) -> Step | None:
    unknown = [dim for dim in dims if free and any(rows[digit] is not False for digit in dim)]
    if len(unknown) == 1:
        return Step("reshape", tuple(-1 if dim is unknown[0] else size_of(dim) for dim in dims))
    found = tuple(rows[dim[0]] if dim in unknown and len(dim) == 1 else size_of(dim) for dim in dims)
    if any(size is True for size in found) or any(len(dim) > 1 for dim in unknown):
        return None
    return Step("reshape", found)


class Emitter:
    """Adds nodes in front of ``before``, in the style of ``like``: ATen operators, or methods and functions.

    Metadata is computed along where ``root`` has some.
    """

    def __init__(self, module: GraphModule, before: Node, like: Node, root: Node) -> None:
        self.module, self.before, self.root = module, before, root
        self._aten = isinstance(like.target, OpOverload)
        self._key = next((key for key in ("val", "example_value") if isinstance(root.meta.get(key), FakeTensor)), None)

    def attribute(self, name: str) -> Node:
        """A node that reads a buffer of the module."""
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.get_attr(name)
        if self._key is not None:
            node.meta[self._key] = self.root.meta[self._key].fake_mode.from_tensor(attribute(self.module, name))
        return node

    def operator(self, target: OpOverload, args: tuple[Any, ...]) -> Node:
        """A call of an operator."""
        return self._node("call_function", target, args)

    def steps(self, node: Node, steps: Sequence[Step]) -> Node:
        """``node`` rearranged."""
        for step in steps:
            arguments = [self._size(item.dim) if isinstance(item, SizeOf) else item for item in step.arguments]
            if self._aten:
                node = self._node("call_function", getattr(aten, step.method).default, (node, arguments))
            else:
                node = self._node("call_method", step.method, (node, *arguments))
        return node

    def _size(self, dim: int) -> Node:
        if self._aten:
            return self._node("call_function", aten.sym_size.int, (self.root, dim))
        return self._node("call_method", "size", (self.root, dim))

    def _node(self, op: str, target: Any, args: tuple[Any, ...]) -> Node:
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.create_node(op, target, args)
        key = self._key
        if key is not None:
            with self.root.meta[key].fake_mode, torch.no_grad():
                node.meta[key] = call(node, map_arg(args, lambda n: n.meta[key]), {})  # type: ignore[arg-type]
        return node
