"""Assume and check: the branch that was traced is taken, and the graph says whether it was right to.

Before::

    # traced with u0 = 3, where the step goes one way if u0 > 2 and another way if not
    return (%y,)

After::

    %holds : gt.Scalar(%position, 2)
    %broken : logical_not.default(%holds)
    return (%y, %broken, ...)

Everything that a graph assumes of host values goes into one flag: ways of branches, bounds of lengths, indices within
their range. A run that raises the flag has to be undone and repeated eagerly, so before each write to memory that
outlives the step the graph saves what the write replaces: the rows of an indexed write, the view of any other. The
results of the graph become ``(*results, flag, *undo)`` and ``module.meta["undo"]`` says how `undo` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from passes.aliases import Aliases, written
from passes.errors import Unremovable
from passes.rewriter import Rewriter

aten = torch.ops.aten
Tensor = torch.Tensor
_BY_ROWS = (aten.index_copy_.default, aten.index_add_.default)
_BY_INDEX = (aten.index_put_.default, aten._index_put_impl_.default)


def flag(rw: Rewriter, results: list[Any]) -> list[Any]:
    """Results with the flag behind them, if the graph assumes anything."""
    broken: Any = None
    for decision in rw.facts.decisions:
        condition = rw.facts.resolve(decision.holds)
        if rw.bounds.certain(condition):
            continue
        if rw.facts.hint(condition) == sympy.false:
            raise Unremovable(f"the step itself does not keep to {condition}", "bound", decision.site, "Raise the bound")
        holds = rw.number(condition)
        if isinstance(holds, bool) and holds:
            continue
        broken = holds if broken is None else rw.call(aten.logical_and.default, broken, holds)
    return results if broken is None else [*results, rw.call(aten.logical_not.default, broken)]


@dataclass(frozen=True)
class Undo:
    """One write to take back: how many of the extra results belong to it, and what they are.

    ``dim`` is the dimension of an ``index_copy_``, or how many dimensions there are before those that index tensors pick
    from (``indexed``); None for a whole view.
    """

    parts: int
    dim: int | None
    indexed: bool = False


def make_undoable(module: GraphModule) -> list[tuple[str, str]]:
    """Save what each write to lasting memory replaces, and return it behind the flag."""
    rewriter = Rewriter(module, {})
    saved: list[Any] = []
    plan: list[Undo] = []
    changes = []
    aliases = Aliases(rewriter)
    for node in list(module.graph.nodes):
        aliases.made(node)
        for target in written(node):
            root = aliases.root(target)
            if isinstance(root, Node):
                continue
            with module.graph.inserting_before(node):
                parts, undo = _saved(module, node, target)
            saved += parts
            plan.append(undo)
            changes.append((str(target), f"saved by {parts[-1]}"))
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = ([*output.args[0], *saved],)
    module.meta["undo"] = plan
    return changes


def _saved(module: GraphModule, node: Node, target: Node) -> tuple[list[Node], Undo]:
    graph = module.graph
    if node.target in _BY_ROWS:
        dim, index = node.args[1], node.args[2]
        return [target, index, graph.call_function(aten.index_select.default, (target, dim, index))], Undo(3, dim)  # type: ignore[list-item, arg-type]
    if node.target in _BY_INDEX:
        given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        indices = [i for i in given if i is not None]
        first = len(given) - len(indices)
        if not any(given[:first]) and all(_dtype(i) not in (torch.bool, torch.uint8) for i in indices):
            old = graph.call_function(aten.index.Tensor, (target, given))
            return [target, *indices, old], Undo(2 + len(indices), first, indexed=True)
    return [target, graph.call_function(aten.clone.default, (target,))], Undo(2, None)


def _dtype(node: Any) -> Any:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def undo(plan: Sequence[Undo], tensors: Sequence[Tensor]) -> None:
    """Take back every write of a run, the last one first."""
    position = len(tensors)
    for step in reversed(plan):
        parts = tensors[position - step.parts : position]
        position -= step.parts
        if step.dim is None:
            parts[0].copy_(parts[1])
        elif step.indexed:
            parts[0].index_put_((*[None] * step.dim, *parts[1:-1]), parts[-1])
        else:
            parts[0].index_copy_(step.dim, parts[1], parts[2])
