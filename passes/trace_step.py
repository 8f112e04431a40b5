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
    **settings: Any,
) -> TracedStep:
    """The graph of a step, with its branches merged and its loops over data unrolled where they can be.

    The step runs several times: once to find its branches, then with both sides of them, until no other branches are found.

    Args:
        step, tensors, reads, modules, numbers, advanced: as in `passes.tracing.trace.TraceRequest`.
        unmerged: branches that are not tried, and why: those that could not be merged for another way through the step.
            What turns out not to be mergeable is added.
        settings: ``structure``, ``restore``, ``snapshot`` and ``forbidding``, as in `TraceRequest`.

    Raises:
        Unremovable: as `trace_once`, of the step as it goes: what only merged branches do leaves them unmerged.
    """
    request = TraceRequest(step, tensors, reads, tuple(modules), numbers, advanced, **settings)
    merger = _Merger(request, {} if unmerged is None else unmerged)
    plain = merger.trace({}, None)
    widest = merger.merge(plain, request.snapshot) if request.snapshot is not None else plain
    widest.facts.unmerged = merger.unmerged
    return dataclasses.replace(widest, merged=widest is not plain)


class _Merger:
    """The traces of one step.

    Attributes:
        unmerged: why branches cannot be merged.
    """

    def __init__(self, request: TraceRequest, unmerged: dict[Branch, str]) -> None:
        self._request = request
        self._functions: dict[Written, list[FunctionType]] = {}
        self.unmerged = unmerged

    def trace(self, plan: Plan, snapshot: Snapshot | None) -> TracedStep:
        """The graph with the branches of ``plan`` merged."""
        return _unrolled(dataclasses.replace(self._request, plan=plan, snapshot=snapshot, functions=self._functions))

    def merge(self, traced: TracedStep, snapshot: Snapshot) -> TracedStep:
        """The graph with all branches merged that can be."""
        plan: dict[Written, Starts] = {}
        tried = set(self.unmerged)
        while True:
            found = self._branches(traced, tried)
            if not found:
                return traced
            tried |= set(found)
            plan, traced = self._wider(plan, traced, found, snapshot)

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
        self.unmerged |= dict.fromkeys(anew, "each run makes the function anew that it stands in")
        return {site: place for site, place in found.items() if site not in anew}

    def _wider(
        self, plan: dict[Written, Starts], traced: TracedStep, found: dict[Branch, Written], snapshot: Snapshot
    ) -> tuple[dict[Written, Starts], TracedStep]:
        """The graph with as many more branches merged as can be, and which are then."""
        while found:
            wider = dict(plan)
            for (_, *start), place in found.items():
                wider[place] = wider.get(place, frozenset()) | {(start[0], start[1])}
            try:
                made = self.trace(wider, snapshot)
                check_predicable(made.module)
                return wider, made
            except Unmergeable as reason:
                blamed, detail = reason.site, str(reason)
            except Unremovable as reason:
                blamed, detail = ("", 0, 0), f"with both sides, {reason}"
            if blamed in found:
                self.unmerged[blamed] = detail
                del found[blamed]
            elif len(found) == 1:
                self.unmerged[next(iter(found))] = detail
                break
            else:
                for site, place in found.items():  # one by one, so that only those that cannot be stay out
                    plan, traced = self._wider(plan, traced, {site: place}, snapshot)
                break
        return plan, traced


def _unrolled(request: TraceRequest) -> TracedStep:
    """The graph of a step, with its loops over data unrolled where they can be."""
    if not any(str(aten.nonzero.default) == read.operator for read in request.reads):
        return trace_once(request)
    try:
        unrolled = trace_once(dataclasses.replace(request, unroll="bound"))
        loops = unrolled.facts.loops
        assert loops is not None
        if not loops.found:
            return unrolled
        if not loops.left and not loops.drawn and not leaks(unrolled.module):
            seen = trace_once(dataclasses.replace(request, unroll="hint"))
            if outside(seen.module) == outside(unrolled.module) and _is_same(seen.structure, unrolled.structure):
                return unrolled
    except Unremovable:
        pass
    return trace_once(request)


def _is_same(first: Any, second: Any) -> bool:
    """Whether two traces of a step return the same numbers of Python in the same containers: none that counts iterations."""
    (leaves, spec), (others, other) = tree_flatten(first), tree_flatten(second)
    return spec == other and all(
        a is b or (type(a) is type(b) and type(a) in _NUMBERS and repr(a) == repr(b)) for a, b in zip(leaves, others, strict=True)
    )
