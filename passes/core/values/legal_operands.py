"""Operators that refuse some values of a tensor: which values are legal, and what to put in the place of the others.

A graph may run on a way that the step does not take, where tensors hold anything: a row beyond the end, a probability above
one, a matrix of infinities. On a CPU the operator raises, and on a GPU it ends the process, before the graph gets to its flag.

Before::

    %y : multinomial.default(%p, 1)

After::

    %bad : logical_not.default(%legal)                   # rows that are no distribution
    %safe : masked_fill.Scalar(%p, %bad, 1)
    %y : multinomial.default(%safe, 1)
    %broken : logical_or.default(%broken, any(%bad))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from passes.core.values.fake_values import emit

aten = torch.ops.aten
Tensor = torch.Tensor
ALONG = (
    *(aten.index_select.default, aten.index_copy_.default, aten.index_add_.default, aten.gather.default),
    *(aten.scatter_add_.default, aten.scatter_add.default, aten.index_copy.default, aten.index_add.default),
    *(aten.scatter.src, aten.scatter.value, aten.scatter_.src, aten.scatter_.value, aten.index_fill_.int_Scalar),
    *(aten.index_fill_.int_Tensor, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor),
    *(aten.scatter_reduce.two, aten.scatter_reduce_.two, aten.index_reduce.default, aten.index_reduce_.default),
)
"""Operators whose third argument picks places along the dimension that is their second."""
BY_INDEX = (aten.index_put_.default, aten._index_put_impl_.default)
DIVIDING = (
    *(aten.floor_divide.default, aten.floor_divide_.Tensor, aten.remainder.Tensor, aten.remainder_.Tensor),
    *(aten.remainder.Scalar_Tensor,),
    *(aten.fmod.Tensor, aten.fmod_.Tensor, aten.div.Tensor_mode, aten.div_.Tensor_mode),
)
PICKING = (aten.index.Tensor, aten.index_put.default, aten._index_put_impl.default, *BY_INDEX)
PARTIAL = frozenset((*ALONG, *PICKING, *DIVIDING, aten.embedding.default))
"""Operators that refuse some values of a tensor: places that are not there, zeros to divide whole numbers by."""
Kept = Callable[[Graph, Node], tuple[Node, Node]]
"""Adds to a graph what makes a value legal. Returns that, and where the value was not."""


@dataclass(frozen=True)
class Operand:
    """An argument of which an operator refuses some values.

    Attributes:
        value: the argument.
        kept: makes it legal.
        least, size: for an index, the least that is legal and the number of places; ``size`` is 0 for others.
        limit: a 0-d tensor with the number of places that mean something, where there are fewer than ``size``.
    """

    value: Node
    kept: Kept
    least: int = 0
    size: int = 0
    limit: Node | None = None


def has_rule(target: Any) -> bool:
    """Whether it is known which values an operator refuses, and what to put in their place."""
    return target in _RULES


def operands(node: Node) -> list[Operand]:
    """The arguments of a node of which its operator refuses some values."""
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    if rule is None or not (dtype_of(node.args[0]) or node.target in _BESIDE_NUMBERS):
        return []
    return [operand for operand in rule(node) if isinstance(operand.value, Node)]


def strays(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator would refuse values of what it is given, which the host waits for."""
    if func not in _RULES:
        return False
    graph, given = Graph(), list[Tensor]()

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            given.append(value)
            node = graph.placeholder(f"given_{len(given)}")
            node.meta["val"] = value
            return node
        return type(value)(map(placed, value)) if isinstance(value, (list, tuple)) else value

    node = graph.call_function(func, tuple(map(placed, args)), kwargs)
    bad = [operand.kept(graph, operand.value)[1] for operand in operands(node)]
    graph.output([emit(graph, aten.any.default, (part,)) for part in bad])
    graph.erase_node(node)
    return any(map(bool, Interpreter(GraphModule({}, graph)).run(*given)))


def is_beyond_help(node: Node) -> bool:
    """Whether an operator refuses values of which it is not known what to put in their place."""
    name = str(node.target)
    return node.op == "call_function" and name.removeprefix("aten.").startswith(_UNKNOWN) and name.startswith("aten.")


def dtype_of(node: Any) -> Any:
    """The dtype of a node's tensor, or None."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _index(value: Any, size: int, least: int = 0, limit: Node | None = None) -> list[Operand]:
    """An index of ``size`` places; into none at all nothing is legal."""

    def kept(graph: Graph, index: Node) -> tuple[Node, Node]:
        safe = emit(graph, aten.clamp.default, (index, least, size - 1))
        strays = emit(graph, aten.ne.Tensor, (index, safe))
        if limit is not None:
            beyond = emit(graph, aten.ge.Tensor, (index, limit))
            strays = emit(graph, aten.logical_or.default, (strays, beyond))
        return safe, strays

    return [Operand(value, kept, least, size, limit)] if size else []


def _filled(value: Any, bad: Callable[[Graph, Node], Node], fill: float | bool) -> list[Operand]:
    """A value with ``fill`` where it is ``bad``."""

    def kept(graph: Graph, given: Node) -> tuple[Node, Node]:
        strays = bad(graph, given)
        return emit(graph, aten.masked_fill.Scalar, (given, strays, fill)), strays

    return [Operand(value, kept)]


def _not(graph: Graph, legal: Node) -> Node:
    return emit(graph, aten.logical_not.default, (legal,))


def _outside(low: float, high: float) -> Callable[[Graph, Node], Node]:
    """Where a value is not in ``[low, high]``; NaN is not."""

    def bad(graph: Graph, value: Node) -> Node:
        legal = emit(graph, aten.ge.Scalar, (value, low))
        below = emit(graph, aten.le.Scalar, (value, high))
        return _not(graph, emit(graph, aten.logical_and.default, (legal, below)))

    return bad


def _zero(graph: Graph, value: Node) -> Node:
    return emit(graph, aten.eq.Scalar, (value, 0))


def _nonzero(graph: Graph, value: Node) -> Node:
    return emit(graph, aten.ne.Scalar, (value, 0))


def _no_distribution(graph: Graph, value: Node) -> Node:
    """Rows that do not hold finite numbers from zero on, one of them above."""
    most = emit(graph, aten.amax.default, (value, [-1], True))
    least = emit(graph, aten.amin.default, (value, [-1], True))
    total = emit(graph, aten.sum.dim_IntList, (value, [-1], True))
    parts = [emit(graph, aten.ge.Scalar, (least, 0)), emit(graph, aten.lt.Scalar, (most, float("inf")))]
    parts += [emit(graph, aten.gt.Scalar, (total, 0)), emit(graph, aten.lt.Scalar, (total, float("inf")))]
    legal = parts[0]
    for part in parts[1:]:
        legal = emit(graph, aten.logical_and.default, (legal, part))
    return _not(graph, legal)


def _not_finite(graph: Graph, value: Node) -> Node:
    """Matrices with an entry that is infinite or NaN: their difference from themselves is not zero."""
    gap = emit(graph, aten.abs.default, (emit(graph, aten.sub.Tensor, (value, value)),))
    return _not(graph, emit(graph, aten.eq.Scalar, (emit(graph, aten.amax.default, (gap, [-2, -1], True)), 0)))


def _divided(node: Node) -> list[Operand]:
    """Whole numbers are not divided by zero."""
    divisor: Any = node.args[1]
    if not isinstance(divisor, Node) or _is_not_zero(divisor):
        return []
    given = node.args[0]
    dividend = dtype_of(given).is_floating_point if dtype_of(given) else isinstance(given, float)
    whole = not (dtype_of(divisor).is_floating_point or dividend)

    def kept(graph: Graph, value: Node) -> tuple[Node, Node]:
        zeros = _zero(graph, value)
        return emit(graph, aten.add.Tensor, (value, zeros)), zeros

    return [Operand(divisor, kept)] if whole else []


def _is_not_zero(divisor: Node) -> bool:
    """Whether the passes have put something in the place of zeros."""
    mask = divisor.args[1] if divisor.target is aten.masked_fill.Scalar and divisor.args[2] == 1 else None
    return isinstance(mask, Node) and mask.target is aten.eq.Scalar and mask.args == (divisor.args[0], 0)


def _along(node: Node) -> list[Operand]:
    shape, dim = node.args[0].meta["val"].shape, node.args[1]  # type: ignore[union-attr]
    if not shape:
        return _index(node.args[2], 1)
    return _index(node.args[2], int(shape[dim]), 0, node.meta.get("limits", {}).get(dim % len(shape)))  # type: ignore[index, operator]


def _picked(node: Node) -> list[Operand]:
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    indices = [(dim, index) for dim, index in enumerate(node.args[1]) if isinstance(index, Node)]  # type: ignore[arg-type]
    if any(dtype_of(index) in (torch.bool, torch.uint8) for _, index in indices):
        return []
    limits = node.meta.get("limits", {})
    return [operand for dim, i in indices for operand in _index(i, int(shape[dim]), -int(shape[dim]), limits.get(dim))]


def _rows(node: Node) -> list[Operand]:
    return _index(node.args[1], int(node.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]


def _flat(node: Node) -> list[Operand]:
    count = node.args[0].meta["val"].numel()  # type: ignore[union-attr]
    return _index(node.args[1], count, -count)


def _classes(node: Node) -> list[Operand]:
    """The target of a loss: a class, or what is ignored."""
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    count, ignored = int(shape[min(1, len(shape) - 1)]), node.args[4] if len(node.args) > 4 else -100

    def bad(graph: Graph, target: Node) -> Node:
        strays = _outside(0, count - 1)(graph, target)
        counts = emit(graph, aten.ne.Scalar, (target, ignored))
        return emit(graph, aten.logical_and.default, (strays, counts))

    return _filled(node.args[1], bad, 0) if count else []


def _repeated(node: Node) -> list[Operand]:
    """Repeats that make a size given by the caller: none below zero, and no other sum."""
    size = node.kwargs.get("output_size")

    def kept(graph: Graph, repeats: Node) -> tuple[Node, Node]:
        value = repeats.meta["val"]
        total = emit(graph, aten.sum.default, (repeats,))
        legal = emit(graph, aten.ge.Scalar, (emit(graph, aten.amin.default, (repeats,)), 0))
        legal = emit(graph, aten.logical_and.default, (legal, emit(graph, aten.eq.Scalar, (total, size))))
        bad = _not(graph, legal)
        places = emit(graph, aten.arange.default, (value.shape[0],), {"device": value.device})
        first = emit(graph, aten.mul.Scalar, (_zero(graph, places), size))
        first = emit(graph, aten._to_copy.default, (first,), {"dtype": value.dtype})
        return emit(graph, aten.where.self, (bad, first, repeats)), bad

    known = isinstance(size, int) and node.args[0].meta["val"].numel()  # type: ignore[union-attr]
    return [Operand(node.args[0], kept)] if known else []  # type: ignore[arg-type]


def _scattered(node: Node) -> list[Operand]:
    """A mask with no more true elements than the source has."""
    count = node.args[2].meta["val"].numel()  # type: ignore[union-attr]
    shape = list(node.args[0].meta["val"].shape)  # type: ignore[union-attr]

    def kept(graph: Graph, mask: Node) -> tuple[Node, Node]:
        wide = emit(graph, aten.expand.default, (mask, shape))
        flat = emit(graph, aten.reshape.default, (wide, [-1]))
        order = emit(graph, aten.reshape.default, (emit(graph, aten.cumsum.default, (flat, 0)), shape))
        fits = emit(graph, aten.le.Scalar, (order, count))
        safe = emit(graph, aten.logical_and.default, (wide, fits))
        return safe, emit(graph, aten.ne.Tensor, (safe, wide))

    return [Operand(node.args[1], kept)]  # type: ignore[arg-type]


def _argument(position: int, bad: Callable[[Graph, Node], Node], fill: float | bool) -> Callable[[Node], list[Operand]]:
    return lambda node: _filled(node.args[position], bad, fill) if len(node.args) > position else []


def _in_bins(node: Node) -> list[Operand]:
    """A histogram between limits that are given takes any value; one between those of the data takes finite ones."""
    low, high = (*node.args[2:], 0, 0)[:2]
    if isinstance(low, Node) or isinstance(high, Node) or low != high:
        return []

    def bad(graph: Graph, value: Node) -> Node:
        gap = emit(graph, aten.sub.Tensor, (value, value))
        return _nonzero(graph, gap)

    return _filled(node.args[0], bad, 0)


_FINITE = (aten._linalg_eigh.default, aten._linalg_svd.default, aten.linalg_eig.default, aten.linalg_eigvals.default)
_RULES: dict[Any, Callable[[Node], list[Operand]]] = {
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(PICKING, _picked),
    **dict.fromkeys(DIVIDING, _divided),
    **dict.fromkeys((aten.embedding.default, aten._embedding_bag.default, aten._embedding_bag_forward_only.default), _rows),
    **dict.fromkeys((aten.take.default, aten.put_.default, aten.put.default), _flat),
    **dict.fromkeys((aten.nll_loss_forward.default, aten.nll_loss2d_forward.default), _classes),
    **dict.fromkeys((aten.masked_scatter.default, aten.masked_scatter_.default), _scattered),
    aten.repeat_interleave.Tensor: _repeated,
    aten.histc.default: _in_bins,
    aten.multinomial.default: _argument(0, _no_distribution, 1),
    aten.bernoulli.default: _argument(0, _outside(0, 1), 0),
    aten.bernoulli.Tensor: _argument(1, _outside(0, 1), 0),
    aten.bernoulli_.Tensor: _argument(1, _outside(0, 1), 0),
    aten.binary_cross_entropy.default: _argument(0, _outside(0, 1), 0),
    aten.poisson.default: _argument(0, _outside(0, float("inf")), 0),
    aten.normal.float_Tensor: _argument(1, _outside(0, float("inf")), 0),
    aten.normal.Tensor_Tensor: _argument(1, _outside(0, float("inf")), 0),
    aten._linalg_check_errors.default: _argument(0, _nonzero, 0),
    **dict.fromkeys((aten._assert_async.default, aten._assert_async.msg), _argument(0, _zero, True)),
    **dict.fromkeys(_FINITE, _argument(0, _not_finite, 0)),
}
_BESIDE_NUMBERS = frozenset((*DIVIDING, aten.normal.float_Tensor))
"""Those whose first argument may be a number."""
_UNKNOWN = (
    *("cholesky", "inverse", "_ctc_loss", "ctc_loss", "max_unpool", "segment_reduce", "multi_margin", "multilabel_margin"),
    *("embedding_renorm", "binomial", "_sample_dirichlet", "linalg_lstsq", "_assert_tensor", "fractional_max_pool"),
)
"""What the names of operators begin with that refuse values in other ways."""
