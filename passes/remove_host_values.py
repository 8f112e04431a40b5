"""All host values out of one step: addressing, arithmetic, bounded lengths, and what has to be assumed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.core.aliasing import written
from passes.core.traced_step import TracedStep
from passes.core.values.legal_operands import BY_INDEX
from passes.core.verify import left_symbols, stale_reads, unguarded_indices, unpredicated_writes, verify, wrong_values
from passes.errors import Unremovable
from passes.host_values import rules as bounded
from passes.host_values.forced.forcing import ITEM, Marks, chosen, copied, unmark
from passes.host_values.lengths import NoRule, symbolic_sizes
from passes.host_values.rewriter import Rewriter, Rule
from passes.host_values.rules import addressing, arithmetic
from passes.host_values.rules.grouped_products import GROUPED, needs_offsets
from passes.optimize.cse import merge_duplicates
from passes.rewritten_graph import ForcedGraph, RewrittenGraph, count_results
from passes.speculation import speculate

_FILLS = (torch.ops.aten.masked_fill.Tensor, torch.ops.aten.masked_fill_.Tensor)
TABLES: dict[str, Mapping[Any, Rule]] = {
    "addressing": addressing.RULES,
    "arithmetic": arithmetic.RULES,
    "bounded": bounded.RULES,
}


def remove_host_values(
    traced: TracedStep,
    bounds: Mapping[str, int] | None = None,
    only: Sequence[str] = (*TABLES, "branches"),
    *,
    forced: bool = False,
) -> RewrittenGraph:
    """Rewrite the graph of a step in place, so that it runs without the host reading a value.

    Lengths for which some operator has no rule are taken at the value of the traced run, as an assumption.

    Args:
        bounds: largest values of lengths that nothing else bounds; see `passes.host_values.upper_bounds.Bounds`.
        only: the passes to apply, of ``addressing``, ``arithmetic``, ``bounded`` and ``branches``.
        forced: whether to make a second graph in which outcomes of host values can be forced, with what those are; see
            `passes.host_values.forced.forcing`.

    Raises:
        Unremovable: a value cannot be removed; it names the operator and the line, and what to pass or change.
    """
    facts, unchanged = traced.facts, RewrittenGraph.unchanged(traced)
    sized = any(_needs_host(node) or symbolic_sizes(node) for node in traced.module.graph.nodes)  # a length may have no hint
    if not (facts.hints or facts.assumptions or sized):
        return unchanged
    rewriter = _rewritten(traced, bounds, only, forced)
    marked = _forced(traced.module, rewriter, rewriter.marks, unchanged.results) if rewriter.marks is not None else None
    unmark(rewriter.graph)
    traced.module.graph = rewriter.graph
    verify(traced.module, "the rewriting", stale_reads, unpredicated_writes)
    return replace(_guarded(unchanged, rewriter.changes), forced=marked)


def _rewritten(traced: TracedStep, bounds: Mapping[str, int] | None, only: Sequence[str], forced: bool) -> Rewriter:
    """The rewriter that has built the new graph, with as few lengths taken at their hints as the rules allow."""
    facts, count = traced.facts, count_results(traced.module.graph)
    rules, default = _rules(only), bounded.default if "bounded" in only else _plain if "arithmetic" in only else _unpadded
    checked, exact, guarded = "branches" in only, frozenset[sympy.Symbol](), False
    finish = speculate.flag if checked else _certain
    before = len(facts.assumptions), dict(facts.replacements)
    while True:
        marks = Marks(facts) if forced else None
        rewriter = Rewriter(traced, rules, default, bounds, exact, finish, guarded, checked, marks)
        guarded = rewriter.guarded = guarded or any(map(rewriter.is_uncertain, facts.assumptions))  # else it would run twice
        try:
            graph = rewriter.run()
            if guarded or not rewriter.trusted or count_results(graph) == count:
                return rewriter
            guarded = True  # there is a flag, and a run must get as far as that
        except NoRule as missing:
            known = {s for s in missing.symbols if s in facts.hints}
            if not known - exact:
                raise Unremovable(missing.detail, missing.operator, missing.site) from missing
            exact |= known
        facts.forget(*before)


def _rules(only: Sequence[str]) -> dict[Any, Rule]:
    """The rules of the named passes, by operator."""
    rules: dict[Any, Rule] = {}
    for table in (TABLES[name] for name in TABLES if name in only):
        for target, rule in table.items():
            rules[target] = _either(rules[target], rule) if target in rules else rule
    return rules


def _guarded(graph: RewrittenGraph, changes: list[tuple[str, str]]) -> RewrittenGraph:
    """A graph that has been rebuilt, with its operands guarded and its writes saved where it assumes anything."""
    module, count = graph.module, graph.results
    needed = speculate.conditions(module)
    module.graph.eliminate_dead_code(lambda node: _has_effect(node) or node in needed)
    changes = [*changes, *speculate.guard(module, count)]
    guarded = functools.partial(unguarded_indices, results=count)
    verify(module, "the guard", guarded)
    module.graph.eliminate_dead_code(_has_effect)
    assumes, undo = count_results(module.graph) > count, tuple[speculate.Undo, ...]()
    if assumes:
        saved, undo = speculate.make_undoable(module)
        changes += saved
        verify(module, "the undo log", stale_reads, guarded)
    changes += merge_duplicates(module)
    left = next((node for node in module.graph.nodes if _needs_host(node) or symbolic_sizes(node)), None)
    if left is not None:
        raise Unremovable("no pass takes this value", str(left.target), left.meta.get("site", ("", 0)))
    verify(module, "remove_host_values", wrong_values, stale_reads, unpredicated_writes, guarded, left_symbols)
    return replace(graph.changed("remove_host_values", changes), assumes=assumes, undo=undo)


def _has_effect(node: Node) -> bool:
    """Whether a node matters though nobody uses its result."""
    return node.is_impure() or bool(written(node))


def _forced(module: GraphModule, rewriter: Rewriter, marks: Marks, count: int) -> ForcedGraph:
    """A copy of the graph with the tensors marked that host values are read from, and the outcomes to force."""
    made = GraphModule(module, copied(rewriter.graph))
    needed = speculate.conditions(made)
    made.graph.eliminate_dead_code(lambda node: _has_effect(node) or node in needed)
    speculate.guard(made, count)
    made.graph.eliminate_dead_code(_has_effect)
    made.recompile()
    return ForcedGraph(made, chosen(marks, rewriter.graph, rewriter.bounds.of))


def _plain(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operators without a rule of their own, where lengths are not bounded."""
    made = arithmetic.pointwise(rw, node, args, kwargs)
    return made if made is not None else _unpadded(rw, node, args, kwargs)


def _unpadded(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Operators that no pass touches must not meet padding."""
    if any(rw.lengths(value) for value in tree_leaves((args, kwargs))):
        rw.no_rule("a length that only the device knows, which the pass bounded is for", node)


def _certain(rw: Rewriter, results: list[Any]) -> list[Any]:
    """The results of a graph that may assume nothing."""
    for assumption in rw.facts.assumptions:
        condition = rw.facts.resolve(assumption.condition)
        if not rw.bounds.certain(condition):
            remedy = 'Add "branches" to the passes, which check this in every run'
            raise Unremovable(f"the graph would assume that {condition}", "branch", assumption.site, remedy)
    return results


def _needs_host(node: Node) -> bool:
    """Whether an operator has the host wait, be it without giving it a value: one that takes masks as indices does."""
    if node.target is GROUPED and needs_offsets(node):
        return True
    if node.target is ITEM or (node.target in _FILLS and isinstance(node.args[2], Node)):
        return True
    indices = node.args[1] if node.target in BY_INDEX else ()
    return any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices if isinstance(i, Node))  # type: ignore[union-attr]


def _either(first: Rule, second: Rule) -> Rule:
    """The rule that applies: tables may name the same operator for different reasons."""

    def rule(rw: Rewriter, node: Any, args: Any, kwargs: Any) -> Any:
        made = first(rw, node, args, kwargs)
        return made if made is not None else second(rw, node, args, kwargs)

    return rule
