"""What holds of every graph between two passes, as functions that say where it does not; `INVARIANTS.md` says it in words.

Inside `after_each_pass` every pass is followed by the checks that apply to what it leaves. Outside nothing is checked, and
nothing is computed for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.core.aliasing import GATHERED, WRITTEN_BACK, Aliases, parent_of, written
from passes.core.predicates import CERTAIN, trips_of
from passes.core.schema import returns_view
from passes.core.values.fake_values import has_symbols, recomputed
from passes.core.values.legal_operands import operands
from passes.core.values.value_ranges import Ranges

Tensor = torch.Tensor
aten = torch.ops.aten
Check = Callable[[GraphModule], list[str]]
"""Returns a sentence for each place where a graph breaks an invariant."""
_GATHERS = (aten.index.Tensor, aten.index_select.default)
_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)  # results that only the data gives a size
_checking: ContextVar[bool] = ContextVar("checking", default=False)


class BrokenInvariant(AssertionError):
    """A pass left a graph of which an invariant does not hold: an error of this package."""


@contextlib.contextmanager
def after_each_pass() -> Iterator[None]:
    """Inside, every pass is followed by checks of the graph that it leaves."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def verify(module: GraphModule, by: str, *checks: Check) -> None:
    """Run checks on what a pass left, inside `after_each_pass`.

    Raises:
        BrokenInvariant: one of them found something; it names the pass and every place.
    """
    if not _checking.get():
        return
    found = [text for check in checks for text in check(module)]
    if found:
        raise BrokenInvariant(f"{by} left a graph in which " + "; ".join(found))


def wrong_values(module: GraphModule) -> list[str]:
    """``meta["val"]`` of each operator has shape, dtype and device of what the operator gives for its arguments.

    Graphs without such values, and results as large as their data says, are not looked at.
    """
    found = []
    values = {node for node in module.graph.nodes if "val" in node.meta}
    for node in module.graph.nodes if values else ():
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        given = [source.meta.get("val") for source in node.all_input_nodes]
        if any(map(has_symbols, given)) or has_symbols(node.meta.get("val")):
            continue
        if node not in values and node.target._schema.returns:
            found.append(f"{node} has no value")
        elif node in values and values.issuperset(node.all_input_nodes):
            found += _disagreement(node)
    return found


def _disagreement(node: Node) -> list[str]:
    try:
        made = recomputed(node)
    except (LookupError, *_UNKNOWN):  # a factory tells no mode
        return []
    except RuntimeError as error:
        return [f"{node} refuses what it is given: {error}"]
    forms = [[_form(leaf) for leaf in tree_leaves(value)] for value in (node.meta["val"], made)]
    return [f"{node} is taken for {forms[0]} and is {forms[1]}"] if forms[0] != forms[1] and not has_symbols(made) else []


def _form(value: Any) -> Any:
    return (list(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else type(value)


def stale_reads(module: GraphModule) -> list[str]:
    """No operator reads a copy that stands for a part of a tensor after the tensor was written in another way."""
    memory = _Memory(module)
    stale: dict[Node, Node] = {}
    found = []
    for node in module.graph.nodes:
        for source in node.all_input_nodes:
            copy = memory.owner(source)
            if copy in stale and not (parent_of(node) is source and returns_view(node.target)):
                found.append(f"{node} reads {copy}, which {stale[copy]} made stale")
        for target in written(node):
            stale |= dict.fromkeys(memory.overtaken(node, target), node)
        memory.add(node)
    return found


class _Memory:
    """Which nodes lie in memory of which copies, up to some node of a graph."""

    def __init__(self, module: GraphModule) -> None:
        self._aliases = Aliases.of(module)
        self._copies: list[Node] = []
        self._flows: dict[Node, frozenset[Node]] = {}

    def owner(self, node: Node) -> Node:
        """The node that the memory of ``node`` was made by."""
        while (parent := parent_of(node)) is not None:
            node = parent
        return node

    def add(self, node: Node) -> None:
        """Come to a node."""
        if node.meta.get(GATHERED) and node.target in _GATHERS:
            self._copies.append(node)
        self._flows[node] = frozenset({self.owner(node)}.union(*(self._flows[source] for source in node.all_input_nodes)))

    def overtaken(self, write: Node, target: Node) -> list[Node]:
        """The copies that a write makes stale: all of that memory but the one that is written, or written back by it."""
        owner, root = self.owner(target), self._root(target)
        kept = {owner}
        if write.meta.get(WRITTEN_BACK):
            kept.update(*(self._flows[source] for source in write.all_input_nodes))
            self._flows[owner] |= kept
        return [copy for copy in self._copies if copy not in kept and self._root(copy) == root]

    def _root(self, node: Node) -> Any:
        """What all nodes and copies of one memory have in common."""
        while (owner := self.owner(node)) in self._copies:
            node = owner.args[0]  # type: ignore[assignment]
        return self._aliases.root(node)


def unpredicated_writes(module: GraphModule) -> list[str]:
    """Every write of an iteration or a branch arm to memory from outside of it changes nothing unless that takes place."""
    aliases = Aliases.of(module)
    nodes = list(module.graph.nodes)
    found = []
    for index, node in enumerate(nodes):
        trips = trips_of(node)
        for target in written(node) if trips else ():
            root = aliases.root(target)
            if isinstance(root, Node) and trips_of(root)[: len(trips)] == trips:
                continue
            if not (_is_predicated(node) or _is_undone(node, target, nodes[index + 1 :], aliases)):
                found.append(f"{node} writes {target} whether or not its branch is taken")
    return found


def _is_predicated(write: Node) -> bool:
    """Whether a write leaves what is there where a 0-d flag says so."""
    if write.meta.get(CERTAIN):
        return True
    if write.target is aten.masked_fill_.Scalar:
        return _is_flag(write.args[1])
    return any(_is_choice(value) for value in write.args[1:])


def _is_choice(value: Any) -> bool:
    """Whether a value is another one, or nothing, where a 0-d flag says so."""
    if not isinstance(value, Node):
        return False
    if value.target is aten.where.self:
        return _is_flag(value.args[0])
    return value.target is aten.masked_fill.Scalar and bool(value.args[2] == 0) and _is_flag(value.args[1])


def _is_flag(value: Any) -> bool:
    held = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(held, Tensor) and held.dtype == torch.bool and held.dim() == 0


def _is_undone(write: Node, target: Node, behind: list[Node], aliases: Aliases) -> bool:
    """Whether the next write to a tensor puts back what was there, where a 0-d flag says so."""
    root = aliases.root(target)
    for node in behind:
        if any(aliases.root(other) == root for other in written(node)):
            source = node.args[1] if node.target is aten.copy_.default else None
            kept = source.args[2] if isinstance(source, Node) and _is_choice(source) else None
            return isinstance(kept, Node) and kept.target is aten.clone.default and kept.args[0] is target
    return False


def unguarded_indices(module: GraphModule, results: int) -> list[str]:
    """In a graph with a flag behind its ``results``, every index lies in its tensor, whatever the data.

    Where there is no flag that holds of operators in iterations and branch arms alone.
    """
    everywhere = len(module.graph.output_node().args[0]) > results  # type: ignore[arg-type]
    ranges, found = Ranges(module), []
    for node in module.graph.nodes:
        if not (everywhere or node.meta.get("predicate") is not None):
            continue
        for operand in operands(node):
            held = ranges(operand.value) if operand.size else (operand.least, operand.size - 1)
            if held is None or held[0] < operand.least or held[1] >= operand.size:
                found.append(f"{node} may be given an index of {operand.value} outside of {operand.size} places")
    return found


def left_symbols(module: GraphModule) -> list[str]:
    """No number is left that only the device knows, and no size that is one."""
    return [f"{node} is a symbol, or as long as one" for node in module.graph.nodes if has_symbols(node.meta.get("val"))]
