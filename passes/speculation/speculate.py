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
results of the graph become ``(*results, flag, *undo)``, and the plan of `make_undoable` says how `undo` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from passes.core.aliasing import Aliases, written
from passes.core.values.fake_values import emit
from passes.core.values.legal_operands import BY_INDEX, Operand, dtype_of, is_beyond_help, operands
from passes.core.values.value_ranges import Ranges
from passes.errors import Unremovable
from passes.host_values.rewriter import Rewriter

aten = torch.ops.aten
Tensor = torch.Tensor
_BY_ROWS = (aten.index_copy_.default, aten.index_add_.default)


def flag(rw: Rewriter, results: list[Any]) -> list[Any]:
    """Results with the flag behind them, if the graph assumes anything."""
    broken: Any = None
    rw.facts.checked.clear()
    for assumption in rw.facts.assumptions:
        condition = rw.bounds.of_signs(rw.facts.resolve(assumption.condition))
        if rw.bounds.certain(condition):
            continue
        if rw.facts.hint(condition) == sympy.false:
            raise Unremovable(f"the step itself does not keep to {condition}", "bound", assumption.site, "Raise the bound")
        holds = rw.number(condition)
        if isinstance(holds, bool) and holds:
            continue
        rw.facts.checked.append(assumption.site)
        broken = holds if broken is None else rw.call(aten.logical_and.default, broken, holds)
    for check in rw.checks:  # those of the numbers that have just been computed, too
        broken = check if broken is None else rw.call(aten.logical_and.default, broken, check)
    return results if broken is None else [*results, rw.call(aten.logical_not.default, broken)]


def guard(module: GraphModule, position: int) -> list[tuple[str, str]]:
    """Keep every operand within what its operator takes, and raise the flag (result ``position``) if one is not.

    On a way that the step does not take they may be anything: an index beyond the end, a divisor of zero, a probability of
    infinity; a device that is asked for a row beyond the end ends the process. Where the graph has no flag only sides of
    branches and iterations of loops are ways that may not be taken; it gets a flag if they need one. Where it has one, an index
    that is the caller's is kept too: a size it goes into may be another at the next call.
    """
    output = module.graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    broken = results[position] if len(results) > position else None
    ranges, changes, assumes = Ranges(module), list[tuple[str, str]](), broken is not None
    everywhere = assumes or any(
        _is_open(operand, ranges)
        for node in module.graph.nodes
        if node.meta.get("predicate") is not None
        for operand in operands(node)
    )
    for node in list(module.graph.nodes):
        runs = node.meta.get("predicate")
        if assumes and is_beyond_help(node):
            detail = "it may refuse what it is given on a way that the step does not take"
            raise Unremovable(detail, str(node.target), node.meta.get("site", ("", 0)))
        for operand in operands(node) if everywhere or runs is not None else ():
            if not _is_open(operand, ranges):
                continue
            safe, stray = _keep(module, node, operand)
            with module.graph.inserting_before(output):
                if isinstance(runs, Node):
                    stray = emit(module.graph, aten.logical_and.default, (stray, runs))
                broken = stray if broken is None else emit(module.graph, aten.logical_or.default, (broken, stray))
            changes.append((str(operand.value), str(safe)))
    output.args = ([*results[:position], *([broken] if broken is not None else [])],)
    return changes


def _keep(module: GraphModule, node: Node, operand: Operand) -> tuple[Node, Node]:
    """Give an operator a legal value in the place of an operand; returns it, and a 0-d flag of whether any value was not."""
    with module.graph.inserting_before(node):
        safe, strays = operand.kept(module.graph, operand.value)
        stray = emit(module.graph, aten.any.default, (strays,))
    safe.meta.update({key: operand.value.meta[key] for key in ("site", "trips", "lengths") if key in operand.value.meta})
    node.args = torch.fx.node.map_aggregate(node.args, lambda a: safe if a is operand.value else a)  # type: ignore[assignment]
    return safe, stray


def _is_open(operand: Operand, ranges: Ranges) -> bool:
    """Whether the data may be such that an operand is not legal."""
    if not operand.size or operand.limit is not None:
        return True
    found = ranges(operand.value)
    return found is None or found[0] < operand.least or found[1] >= operand.size


def conditions(module: GraphModule) -> set[Node]:
    """The nodes that `guard` may need, besides those that the results do."""
    needed = {runs for node in module.graph.nodes if isinstance(runs := node.meta.get("predicate"), Node)}
    return needed | {limit for node in module.graph.nodes for limit in node.meta.get("limits", {}).values()}


@dataclass(frozen=True)
class Undo:
    """One write to take back: how many of the extra results belong to it, and what they are.

    ``dim`` is the dimension of an ``index_copy_``, or how many dimensions there are before those that index tensors pick
    from (``indexed``); None for a whole view.
    """

    parts: int
    dim: int | None
    indexed: bool = False


def make_undoable(module: GraphModule) -> tuple[list[tuple[str, str]], tuple[Undo, ...]]:
    """Save what each write to lasting memory replaces, and return it behind the flag.

    Returns:
        What changed, and how `undo` reads the results that are new.
    """
    saved: list[Any] = []
    plan: list[Undo] = []
    changes = []
    aliases = Aliases.of(module)
    for node in list(module.graph.nodes):
        for target in written(node):
            root = aliases.root(target)
            if isinstance(root, Node):
                continue
            with module.graph.inserting_before(node):
                parts, step = _saved(module.graph, node, target)
            saved += parts
            plan.append(step)
            changes.append((str(target), f"saved by {parts[-1]}"))
    output = module.graph.output_node()
    output.args = ([*output.args[0], *saved],)  # type: ignore[misc]
    return changes, tuple(plan)


def _saved(graph: Graph, node: Node, target: Node) -> tuple[list[Node], Undo]:
    if node.target in _BY_ROWS:
        dim, index = node.args[1], node.args[2]
        return [target, index, emit(graph, aten.index_select.default, (target, dim, index))], Undo(3, dim)  # type: ignore[list-item, arg-type]
    if node.target in BY_INDEX:
        given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        indices = [i for i in given if i is not None]
        first = len(given) - len(indices)
        if not any(given[:first]) and all(dtype_of(i) not in (torch.bool, torch.uint8) for i in indices):
            old = emit(graph, aten.index.Tensor, (target, given))
            return [target, *indices, old], Undo(2 + len(indices), first, indexed=True)
    return [target, emit(graph, aten.clone.default, (target,))], Undo(2, None)


def undo(plan: Sequence[Undo], tensors: Sequence[Tensor]) -> None:
    """Take back every write of a run, the last one first."""
    position = len(tensors)
    for step in reversed(plan):
        parts = tensors[position - step.parts : position]
        position -= step.parts
        if step.dim is None:
            parts[0].copy_(parts[1])
        elif step.indexed:
            aten.index_put_.default(parts[0], [*[None] * step.dim, *parts[1:-1]], parts[-1])
        else:
            parts[0].index_copy_(step.dim, parts[1], parts[2])
