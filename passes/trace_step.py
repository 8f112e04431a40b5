"""A step traced in rounds: as it goes, then with both sides of the branches it met, then with those met inside of them.

A round that fails names a branch, which stays an assumption of the graph; the reason is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from passes.control_flow.branches import Unmergeable
from passes.control_flow.code_patching import Plan, Starts, Written, branch_in, functions_of, written
from passes.control_flow.legality import check_predicable
from passes.control_flow.python_changes import Snapshot
from passes.core.predicates import leaks, outside
from passes.core.source_location import Branch
from passes.core.traced_step import TracedStep
from passes.core.values.host_reads import Read
from passes.errors import Unremovable
from passes.tracing.trace import Number, TraceRequest, trace_once

aten = torch.ops.aten
Merged = dict[Written, Starts]
"""Where the branches begin that are merged, by the function they stand in."""
_NUMBERS = frozenset((bool, int, float, complex, str, bytes, slice, torch.Size))


def trace_step(
    step: Callable[[Sequence[Tensor], Sequence[Any]], list[Any]],
    tensors: Sequence[Tensor],
    reads: Sequence[Read] = (),
    modules: Iterable[str] = (),
    numbers: Sequence[Number] = (),
    advanced: Callable[[], Sequence[Any]] = tuple,
    *,
    unmerged: dict[Branch, str] | None = None,
    merged: Merged | None = None,
    **settings: Any,
) -> TracedStep:
    """The graph of a step, with its branches merged and its loops over data unrolled where they can be.

    The step runs several times: once to find its branches, then with both sides of them, until no other branches are found.
    Where an earlier trace of the step has found branches that can be merged, it begins with those.

    Args:
        step, tensors, reads, modules, numbers, advanced: as in `passes.tracing.trace.TraceRequest`.
        unmerged: branches that are not tried, and why: those that could not be merged for another way through the step.
            What turns out not to be mergeable is added.
        merged: branches that were merged for another way through the step; filled with those that are merged now.
        settings: ``structure``, ``restore``, ``snapshot``, ``forbidding`` and ``partial``, as in `TraceRequest`.

    Raises:
        Unremovable: as `trace_once`, of the step as it goes: what only merged branches do leaves them unmerged.
    """
    request = TraceRequest(step, tensors, reads, tuple(modules), numbers, advanced, **settings)
    unmerged = {} if unmerged is None else unmerged
    if request.snapshot is not None:
        traced = _Merger(request, request.snapshot, unmerged, {} if merged is None else merged).widest()
    else:
        traced = _unrolled(request)
    traced.facts.unmerged = unmerged
    return traced


class _Merger:
    """The traces of one step.

    Args:
        snapshot: takes snapshots of Python objects.
        unmerged, merged: why branches cannot be merged, and the functions that those stand in which can.
    """

    def __init__(self, request: TraceRequest, snapshot: Snapshot, unmerged: dict[Branch, str], merged: Merged) -> None:
        self._request, self._snapshot = request, snapshot
        self._functions: dict[Written, list[FunctionType]] = {}
        self._unmerged, self._merged = unmerged, merged

    def widest(self) -> TracedStep:
        """The graph with all branches merged that can be."""
        plan, traced = self._known()
        if traced is None:
            plain = dataclasses.replace(self._request, snapshot=None)
            first = _assumed(plain)
            plan, traced = self._merge(plan, first)
            if traced is first:  # nothing was merged: now it matters whether its loops may be unrolled
                proved = _proved(plain, first)
                plan, traced = (plan, proved) if proved is first else self._merge(plan, proved)
        else:
            plan, traced = self._merge(plan, traced)
        self._merged.update(plan)
        return dataclasses.replace(traced, merged=bool(plan))

    def _known(self) -> tuple[Merged, TracedStep | None]:
        """The branches that an earlier trace merged, and the graph with them merged; none where they cannot be this time."""
        while True:
            given = {
                (file, code): starts - {(line, column) for name, line, column in self._unmerged if name == file}
                for (file, code), starts in self._merged.items()
            }
            plan = {place: starts for place, starts in given.items() if starts}
            self._functions |= functions_of([*plan])
            if not plan or not all(self._functions[place] for place in plan):
                return {}, None
            try:
                return plan, self._trace(plan)
            except Unmergeable as reason:
                file, *start = reason.site
                if not any(place[0] == file and tuple(start) in starts for place, starts in plan.items()):
                    return {}, None
                self._unmerged[reason.site] = str(reason)
            except Unremovable:
                return {}, None

    def _trace(self, plan: Plan) -> TracedStep:
        """The graph with the branches of ``plan`` merged.

        Raises:
            Unmergeable: both sides of a branch cannot be in the graph.
        """
        request = dataclasses.replace(self._request, plan=plan, snapshot=self._snapshot, functions=self._functions)
        made = _unrolled(request)
        check_predicable(made.module)
        return made

    def _merge(self, plan: Merged, traced: TracedStep) -> tuple[Merged, TracedStep]:
        """The graph with all those branches merged too that ``traced`` assumes one side of."""
        tried = {*self._unmerged, *((file, *start) for (file, _), starts in plan.items() for start in starts)}
        while True:
            found = self._branches(traced, tried)
            if not found:
                return plan, traced
            tried |= set(found)
            plan, traced = self._wider(plan, traced, found)

    def _branches(self, traced: TracedStep, tried: set[Branch]) -> dict[Branch, Written]:
        """Branches that a graph assumes one side of, and that may be merged: the functions they stand in."""
        found: dict[Branch, Written] = {}
        for asked, code in traced.facts.branches.items():
            place = written(code)
            start = branch_in(place[1], asked)
            branch = (asked.file, start[0], start[1]) if start is not None else None
            if branch is not None and branch not in tried:
                found[branch] = place
        self._functions |= functions_of([place for place in dict.fromkeys(found.values()) if place not in self._functions])
        anew = [site for site, place in found.items() if not self._functions[place]]
        self._unmerged |= dict.fromkeys(anew, "each run makes the function anew that it stands in")
        return {site: place for site, place in found.items() if site not in anew}

    def _wider(self, plan: Merged, traced: TracedStep, found: dict[Branch, Written]) -> tuple[Merged, TracedStep]:
        """The graph with as many more branches merged as can be, and which are then."""
        while found:
            wider = dict(plan)
            for (_, *start), place in found.items():
                wider[place] = wider.get(place, frozenset()) | {(start[0], start[1])}
            try:
                return wider, self._trace(wider)
            except Unmergeable as reason:
                blamed, detail = reason.site, str(reason)
            except Unremovable as reason:
                blamed, detail = ("", 0, 0), f"with both sides, {reason}"
            if blamed in found:
                self._unmerged[blamed] = detail
                del found[blamed]
            elif len(found) == 1:
                self._unmerged[next(iter(found))] = detail
                break
            else:
                for site, place in found.items():  # one by one, so that only those that cannot be stay out
                    plan, traced = self._wider(plan, traced, {site: place})
                break
        return plan, traced


def _unrolled(request: TraceRequest) -> TracedStep:
    """The graph of a step, with its loops over data unrolled where they can be."""
    return _proved(request, _assumed(request))


def _assumed(request: TraceRequest) -> TracedStep:
    """The graph of a step, with its loops over data unrolled where nothing in the graph speaks against it."""
    if any(str(aten.nonzero.default) == read.operator for read in request.reads):
        try:
            unrolled = trace_once(dataclasses.replace(request, unroll="bound"))
        except Unremovable:
            return trace_once(request)
        loops = unrolled.facts.loops
        assert loops is not None
        if not loops.found or (not loops.left and not loops.drawn and not leaks(unrolled.module)):
            return unrolled
    return trace_once(request)


def _proved(request: TraceRequest, traced: TracedStep) -> TracedStep:
    """``traced``, if what it does outside of its loops is the same with as many rounds as the eager run made."""
    loops = traced.facts.loops
    if loops is None or loops.unroll == "no" or not loops.found:
        return traced
    try:
        seen = trace_once(dataclasses.replace(request, unroll="hint"))
        if outside(seen.module) == outside(traced.module) and _is_same(seen.structure, traced.structure):
            return traced
    except Unremovable:
        pass
    return trace_once(request)


def _is_same(first: Any, second: Any) -> bool:
    """Whether two traces of a step return the same numbers of Python in the same containers: none that counts iterations."""
    (leaves, spec), (others, other) = tree_flatten(first), tree_flatten(second)
    return spec == other and all(
        a is b or (type(a) is type(b) and type(a) in _NUMBERS and repr(a) == repr(b)) for a, b in zip(leaves, others, strict=True)
    )
