"""Which operators may refuse the data that they are given, or do more than return a result: no pass drops these.

Eager raises where an operator refuses its data, whether or not anybody uses what it returns: an index beyond the end, a check
without a result, a division of whole numbers by zero. This is the one place that tells them from operators that only compute.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.core.aliasing import written
from passes.core.node_calls import name_of
from passes.core.symbols import SYMBOLS
from passes.core.values.legal_operands import Operand, has_rule, is_beyond_help, operands
from passes.core.values.value_ranges import Ranges

_OWN = ("aten", "prims")
"""Namespaces whose operators are known. One of another library may do anything."""
_NAMES = (
    *("linalg_", "_linalg", "cholesky", "lu_", "inverse", "ormqr", "geqrf", "triangular", "histc", "_assert", "nll_loss"),
    *("ctc_loss", "masked_scatter", "max_unpool", "embedding_bag", "_embedding_bag", "repeat_interleave", "take", "put"),
    *("bincount", "histogram", "_histogram", "multilabel_margin", "multi_margin", "sparse_", "_sparse", "_validate_"),
    *("quantize_per", "fake_quantize", "_fake_quantize", "segment_reduce"),
)
"""What the names of operators begin with that may refuse values, besides those of which `legal_operands` knows which."""
_PICKING = ("index", "gather", "scatter", "embedding", "cross_entropy", "one_hot", "binary_cross_entropy", *_NAMES)
_DIVIDING = ("floor_divide", "floordiv", "remainder", "fmod", "mod", "divide", "div")


class Refusals:
    """Which operators of one graph may refuse what they are given, or act."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._ranges: Ranges | None = None

    def may_refuse(self, node: Node) -> bool:
        """Whether the data may be such that an operator raises, or ends the process."""
        if node.op not in ("call_function", "call_method") or _is_number(node):
            return False
        if not isinstance(node.target, OpOverload):
            return _refuses_by_name(node)
        if node.target.namespace not in _OWN:
            return True
        if has_rule(node.target) and "val" in node.meta:
            return any(not self._is_legal(operand) for operand in operands(node))
        return has_rule(node.target) or refuses_unknown(node)

    def _is_legal(self, operand: Operand) -> bool:
        """Whether a value is a legal one whatever the data."""
        if not operand.size or operand.limit is not None:
            return False
        if self._ranges is None:
            self._ranges = Ranges(self._module)
        found = self._ranges(operand.value)
        return found is not None and operand.least <= found[0] and found[1] < operand.size


def refuses_unknown(node: Node) -> bool:
    """Whether an operator of torch's own refuses values of which it is not known what to put in their place."""
    sorter = node.kwargs.get("sorter") is not None  # of `searchsorted`, which looks whether that is an order
    return sorter or is_beyond_help(node) or name_of(node).startswith(_NAMES)


def acts(node: Node) -> bool:
    """Whether a node does more than return a result: it writes, draws random numbers, or is not known."""
    if node.is_impure() or written(node):
        return True
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target.namespace not in _OWN or torch.Tag.nondeterministic_seeded in target.tags
    return isinstance(target, HigherOrderOperator)


def drop_unused(module: GraphModule, needed: Collection[Node] = (), *, guarded: bool = False) -> None:
    """Take out of a graph what nobody uses: in place of ``Graph.eliminate_dead_code``, which drops what may raise.

    Args:
        needed: nodes to keep, besides what acts and what may refuse its data.
        guarded: whether operands have been made legal wherever it is known how, and a flag tells where they were not.
    """
    refusals, order = Refusals(module), list(module.graph.nodes)
    places = {node: index for index, node in enumerate(order)}

    def is_kept(node: Node) -> bool:
        if node in needed or acts(node):
            return True
        if node.users or not refusals.may_refuse(node):  # torch asks of nodes that are used, too
            return False
        return not (guarded and has_rule(node.target)) and not _is_asked_again(node, order[places[node] + 1 :])

    module.graph.eliminate_dead_code(is_kept)


def _is_asked_again(node: Node, behind: Sequence[Node]) -> bool:
    """Whether the next operator that acts refuses the same values: a row that is written at a place is not read first."""
    own = {(operand.value, operand.least, operand.size) for operand in operands(node)}
    if not own or not all(size for _, _, size in own):
        return False
    for other in behind:
        if not other._erased and own <= {(operand.value, operand.least, operand.size) for operand in operands(other)}:
            return bool(other.users) or acts(other)
        if acts(other):
            return False
    return False


def _is_number(node: Node) -> bool:
    """Whether a node computes a number: what Python refuses of those was asked where the step was traced."""
    return isinstance(node.meta.get("val"), (*SYMBOLS, bool, int, float))


def _refuses_by_name(node: Node) -> bool:
    """The same of a function or method of torch's, of which there is no schema."""
    name = name_of(node)
    if name == "getitem":
        return any(isinstance(leaf, Node) for leaf in tree_leaves(node.args[1:]))
    if name.rstrip("_") in _DIVIDING:
        return len(node.args) > 1 and isinstance(node.args[1], Node)
    return name.startswith(_PICKING)
