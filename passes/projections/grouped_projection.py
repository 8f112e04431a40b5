"""Finding grouped projections ``y[m, g, n] = sum_k o[m, g, k] * w[g, n, k]`` in a graph, whatever they are spelled as.

One product (`contraction`) with a weight is a grouped projection if some digit of it is shared by activation, weight and
result. A loop over groups is one if its products read equidistant parts of one activation and their results are stacked or
concatenated. Both come out as one `GroupedProjection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.projections.contractions import Role, contraction, operation, part_of
from passes.projections.graph_views import GraphViews, Source, View
from passes.projections.layouts import Digit, Digits, Layout, aligned, compose, materialise, merged, progression

Tensor = torch.Tensor


@dataclass(frozen=True)
class GroupedProjection:
    """One grouped projection in a graph.

    Attributes:
        node: the node that computes it.
        root: the node that the activation ``o [M, G, K]`` is a permutation of, and ``activation``, its layout there.
        result: the value of ``node`` as a permutation of ``y [M, G, N]``.
        sizes: M, G and N.
        weight: computes ``w [G, N, K]``; ``key`` is equal for equal weights, ``parameters`` names what it is computed from.
        reads: nodes whose memory must not change until ``node``.
    """

    node: Node
    root: Node
    activation: Layout
    result: Layout
    sizes: tuple[int, int, int]
    weight: Callable[[], Tensor]
    key: tuple[Any, ...]
    parameters: tuple[str, ...]
    reads: tuple[Node, ...]


@dataclass(frozen=True)
class _Product:
    """A contraction with a weight, its activation seen as a view of ``root``."""

    node: Node
    root: Node
    result: tuple[tuple[Role, ...], ...]
    summed: tuple[Role, ...]
    offset: int
    weight: View
    dtype: torch.dtype
    reads: tuple[Node, ...]

    def part(self, name: str) -> list[Role]:
        """The digits of one part, outermost first in the operand that has them."""
        roles = [role for dim in (*self.result, self.summed) for role in dim if role.part == name]
        return sorted(roles, key=lambda role: role.weight if name == "n" else role.activation, reverse=True)


def grouped_projections(graph: GraphViews, node: Node) -> Iterator[GroupedProjection]:
    """The ways to see ``node`` as a grouped projection, the activation's farthest root first."""
    if operation(node) in ("stack", "cat"):
        yield from _loops(graph, node)
    else:
        found = (_single(graph, product) for product in _products(graph, node) if product.part("g"))
        yield from (one for one in found if one is not None)


def _products(graph: GraphViews, node: Node) -> Iterator[_Product]:
    def rank(source: Source) -> int | None:
        shape = graph.shape(source)
        return None if shape is None else len(shape)

    product = contraction(node, rank, graph.module)
    if product is None:
        return
    for place in (0, 1):
        activation, weight = product.operands[place], product.operands[1 - place]
        constant = next((view for view in reversed(graph.views(weight)) if graph.constant(view.root)), None)
        dtype = _common_dtype(graph, (activation, weight, node))
        if constant is None or graph.constant(activation) or dtype is None:
            continue
        repeated = False
        for view in reversed(graph.views(activation)):
            repeats = any(digit.stride == 0 for digit in view.layout.digits)
            if repeated and not repeats:
                return  # the same elements again are told from others only as seen from farther away
            repeated = repeats
            assigned = _roles(view.layout, constant.layout, product.labels[place], product.labels[1 - place], product.result)
            if assigned is None:
                return
            reads = tuple(graph.lineage(activation, view.root))
            if isinstance(view.root, Node) and not graph.disturbed(reads, view.root, node):
                yield _Product(node, view.root, *assigned, view.layout.offset, constant, dtype, reads)


def _common_dtype(graph: GraphViews, sources: Sequence[Source]) -> torch.dtype | None:
    dtypes = {graph.dtype(source) for source in sources}
    dtype = dtypes.pop()
    return dtype if not dtypes and dtype is not None and dtype.is_floating_point else None


def _roles(
    activation: Layout, weight: Layout, left: str, right: str, result: str
) -> tuple[tuple[tuple[Role, ...], ...], tuple[Role, ...]] | None:
    """The role of every digit: those of the result, by dimension, and those summed over. None if one has no role."""
    sizes = dict[str, int]()
    for labels, layout in ((left, activation), (right, weight)):
        for label, size in zip(labels, layout.shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    assigned = dict[str, tuple[Role, ...]]()
    for label, size in sizes.items():
        pairs = aligned(_digits(activation, left, label, size), _digits(weight, right, label, size))
        roles = [Role(part_of(a.stride, b.stride, label in result), a.size, a.stride, b.stride) for a, b in pairs or ()]
        if pairs is None or not all(role.part for role in roles):
            return None
        assigned[label] = tuple(roles)
    if not set(result) <= set(sizes):
        return None
    summed = [role for label, roles in assigned.items() if label not in result for role in roles]
    return tuple(assigned[label] for label in result), tuple(summed)


def _digits(layout: Layout, labels: str, label: str, size: int) -> Digits:
    """The digits of a label in one operand; one digit of stride 0 where the operand is repeated along it."""
    found = layout.dims[labels.index(label)] if label in labels else ()
    return found if found or size == 1 else (Digit(size, 0),)


def _single(graph: GraphViews, product: _Product) -> GroupedProjection | None:
    rows, groups, columns, summed = (product.part(name) for name in "mgnk")
    activation = Layout(tuple(merged([Digit(r.size, r.activation) for r in part]) for part in (rows, groups, summed)))
    activation = activation._replace(offset=product.offset)
    weight = Layout(tuple(tuple(Digit(r.size, r.weight) for r in part) for part in (groups, columns, summed)))
    places = _strides([*rows, *groups, *columns])
    result = Layout(tuple(merged([places[role] for role in dim]) for dim in product.result))
    view = View(product.weight.root, weight._replace(offset=product.weight.layout.offset))
    return _checked(graph, product.node, product, activation, result, [view], product.reads)


def _strides(roles: Sequence[Role]) -> dict[Role, Digit]:
    """The digits of a contiguous tensor whose dimensions are ``roles``."""
    found, stride = dict[Role, Digit](), 1
    for role in reversed(roles):
        found[role] = Digit(role.size, stride)
        stride *= role.size
    return found


def _loops(graph: GraphViews, node: Node) -> Iterator[GroupedProjection]:
    """A loop over groups, seen from every root that its activations have in common."""
    pieces, dim = _joined(graph, node)
    outputs = [next((v for v in graph.views(piece) if _is_product(graph, v.root)), None) for piece in pieces]
    layouts = {view.layout if view is not None else None for view in outputs}
    if len(pieces) < 2 or len(layouts) != 1 or None in layouts:
        return
    choices = [list(_products(graph, view.root)) for view in outputs if view is not None and isinstance(view.root, Node)]
    for first in choices[0]:
        same = [next((p for p in products if _alike(first, p)), None) for products in choices]
        products = [product for product in same if product is not None]
        step = progression([product.offset for product in products]) if len(products) == len(pieces) else None
        view = outputs[0]
        between = [n for piece, product in zip(pieces, products, strict=False) for n in graph.lineage(piece, product.node)]
        reads = (*between, *(n for product in products for n in product.reads))
        if step is not None and view is not None and not graph.disturbed(reads, first.root, node):
            found = _loop(graph, node, products, step, view.layout, dim, reads, stacked=operation(node) == "stack")
            if found is not None:
                yield found


def _joined(graph: GraphViews, node: Node) -> tuple[list[Node], int]:
    """What ``node`` stacks or concatenates, and along which of its dimensions."""
    named = dict(node.kwargs)
    pieces = node.args[0] if node.args else named.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else named.get("dim", named.get("axis", 0))
    shape = graph.shape(node)
    whole = isinstance(pieces, (tuple, list)) and all(isinstance(piece, Node) for piece in pieces)
    if not whole or shape is None or type(dim) is not int:
        return [], 0
    return list(pieces), dim % len(shape)  # type: ignore[arg-type]


def _is_product(graph: GraphViews, source: Source) -> bool:
    return isinstance(source, Node) and next(_products(graph, source), None) is not None


def _alike(first: _Product, other: _Product) -> bool:
    """Whether two products differ in their weight and in where their activation begins only."""
    parts = (first.root, first.result, first.summed, first.dtype)
    return not first.part("g") and parts == (other.root, other.result, other.summed, other.dtype)


def _loop(
    graph: GraphViews,
    node: Node,
    products: list[_Product],
    step: int,
    view: Layout,
    dim: int,
    reads: tuple[Node, ...],
    *,
    stacked: bool,
) -> GroupedProjection | None:
    first, count = products[0], len(products)
    rows, columns, summed = (first.part(name) for name in "mnk")
    parts = [merged([Digit(r.size, r.activation) for r in part]) for part in (rows, summed)]
    activation = Layout((parts[0], (Digit(count, step),), parts[1]), first.offset)
    group = Role("g", count, 0, 0)
    places = _strides([*rows, group, *columns])
    piece = compose(Layout(tuple(merged([places[role] for role in d]) for d in first.result)), view)
    if piece is None:
        return None
    dims = list(piece.dims)
    dims[dim : dim + (not stacked)] = [(places[group],)] if stacked else [merged((places[group], *dims[dim]))]
    weights = [
        View(p.weight.root, Layout(tuple(tuple(Digit(r.size, r.weight) for r in part) for part in (columns, summed)), offset))
        for p in products
        for offset in [p.weight.layout.offset]
    ]
    return _checked(graph, node, first, activation, Layout(tuple(dims), piece.offset), weights, reads)


def _checked(
    graph: GraphViews,
    node: Node,
    product: _Product,
    activation: Layout,
    result: Layout,
    weights: list[View],
    reads: tuple[Node, ...],
) -> GroupedProjection | None:
    """The projection, if its activation and result are permutations of whole tensors."""
    shape = graph.shape(product.root) or ()
    m, g, _ = activation.shape
    n = math.prod(role.size for role in product.part("n"))
    single = graph.untraced and 1 in shape  # is it a row of a batch, or a dimension?
    if single or not activation.covers(math.prod(shape)) or not result.covers(m * g * n) or result.shape != graph.shape(node):
        return None
    roots = [graph.constant(view.root) for view in weights]
    parameters = tuple(dict.fromkeys(p for view in weights for p in graph.parameters(view.root)))
    key = tuple((graph.identity(view.root), view.layout) for view in weights)

    def weight() -> Tensor:
        tensors = [materialise(root().detach(), view.layout) for root, view in zip(roots, weights, strict=True) if root]
        return tensors[0] if len(tensors) == 1 else _stacked(tensors)

    return GroupedProjection(node, product.root, activation, result, (m, g, n), weight, key, parameters, reads)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """``tensors`` along a new first dimension, without a copy where they follow each other in one storage."""
    first = tensors[0]
    step = progression([int(tensor.storage_offset()) for tensor in tensors])
    one = {(tensor.untyped_storage()._cdata, tensor.stride()) for tensor in tensors}
    if step is None or len(one) > 1:
        return torch.stack(tensors)
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()), first.storage_offset())
