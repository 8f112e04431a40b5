"""All host values out of one step: addressing, arithmetic, bounded lengths, and what has to be assumed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.core.traced_step import TracedStep
from passes.core.values.legal_operands import BY_INDEX
from passes.core.values.refusals import drop_unused
from passes.core.verify import left_symbols, stale_reads, unguarded_indices, unpredicated_writes, verify, wrong_values
from passes.errors import Unremovable
from passes.host_values import rules as bounded
from passes.host_values.forced.forcing import ITEM, Marks, chosen, copied, unmark
from passes.host_values.lengths import NoBound, NoRule, symbolic_sizes
from passes.host_values.rewriter import Rewriter, Rule, Rules
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

_NAMES = (*TABLES, "branches")


def remove_host_values(
    traced: TracedStep,
    bounds: Mapping[str, int] | None = None,
    only: Sequence[str] = _NAMES,
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
    with _told(rewriter):
        return _finished(traced, rewriter)


def _finished(traced: TracedStep, rewriter: Rewriter) -> RewrittenGraph:
    """The graph that a rewriter has built, made one that any run may take."""
    unchanged = RewrittenGraph.unchanged(traced)
    marked = _forced(traced.module, rewriter, rewriter.marks, unchanged.results) if rewriter.marks is not None else None
    unmark(rewriter.graph)
    traced.module.graph = rewriter.graph
    verify(traced.module, "the rewriting", stale_reads, unpredicated_writes)
    made = _guarded(unchanged, rewriter.changes)
    return replace(made, forced=marked, host_values=rewriter.uses.host_values())


@contextlib.contextmanager
def _told(rewriter: Rewriter) -> Iterator[None]:
    """Have a refusal tell what had become of the host values."""
    try:
        yield
    except Unremovable as reason:
        reason.host_values = rewriter.uses.host_values()
        raise


def _rewritten(traced: TracedStep, bounds: Mapping[str, int] | None, only: Sequence[str], forced: bool) -> Rewriter:
    """The rewriter that has built the new graph, with as few lengths taken at their hints as the rules allow."""
    facts, count = traced.facts, count_results(traced.module.graph)
    rules, default = _rules(only), _default(only)
    checked, exact, guarded = "branches" in only, frozenset[sympy.Symbol](), False
    finish = speculate.flag if checked else _certain
    before = len(facts.assumptions), dict(facts.replacements)
    while True:
        marks = Marks(facts) if forced else None
        rewriter = Rewriter(traced, rules, default, bounds, exact, finish, guarded, checked, marks)
        guarded = rewriter.guarded = guarded or any(map(rewriter.is_uncertain, facts.assumptions))  # else it would run twice
        try:
            with _told(rewriter):
                if traced.stopped is not None:
                    rewriter.uses.refuse_all(traced.stopped.symbols, traced.stopped)
                graph = rewriter.run()
            if guarded or not rewriter.trusted or count_results(graph) == count:
                return rewriter
            guarded = True  # there is a flag, and a run must get as far as that
        except NoRule as missing:
            known = {s for s in missing.symbols if s in facts.hints}
            if not known - exact:
                reason = NoBound(missing.detail, missing.operator, missing.site)
                reason.host_values = missing.host_values
                raise reason from missing
            exact |= known
        facts.forget(*before)


def _rules(only: Sequence[str]) -> Rules:
    """The rules of the named passes, by operator: tables may name the same one for different reasons."""
    rules: dict[Any, list[tuple[str, Rule]]] = {}
    for name in TABLES:
        for target, rule in TABLES[name].items() if name in only else ():
            rules.setdefault(target, []).append((name, rule))
    return rules


def _default(only: Sequence[str]) -> list[tuple[str, Rule]]:
    """The rules for operators that have none of their own."""
    if "bounded" in only:
        return [("bounded", bounded.default)]
    return [*([("arithmetic", arithmetic.pointwise)] if "arithmetic" in only else []), ("bounded", _unpadded)]


def _guarded(graph: RewrittenGraph, changes: list[tuple[str, str]]) -> RewrittenGraph:
    """A graph that has been rebuilt, with its operands guarded and its writes saved where it assumes anything."""
    module, count = graph.module, graph.results
    needed = speculate.conditions(module)
    drop_unused(module, needed)
    changes = [*changes, *speculate.guard(module, count)]
    guarded = functools.partial(unguarded_indices, results=count)
    verify(module, "the guard", guarded)
    assumes, undo = count_results(module.graph) > count, tuple[speculate.Undo, ...]()
    drop_unused(module, guarded=assumes)
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


def _forced(module: GraphModule, rewriter: Rewriter, marks: Marks, count: int) -> ForcedGraph:
    """A copy of the graph with the tensors marked that host values are read from, and the outcomes to force."""
    made = GraphModule(module, copied(rewriter.graph))
    needed = speculate.conditions(made)
    drop_unused(made, needed)
    speculate.guard(made, count)
    drop_unused(made, guarded=count_results(made.graph) > count)
    made.recompile()
    return ForcedGraph(made, chosen(marks, rewriter.graph, rewriter.bounds.of))


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
