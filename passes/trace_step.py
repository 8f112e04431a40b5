"""A step traced in rounds: as it goes, then with both sides of the branches it met, then with those met inside of them.

A round that fails names a branch, which stays an assumption of the graph; the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from passes.control_flow.branches import Snapshot, Unmergeable
from passes.control_flow.code_patching import Plan, Starts, Written, branch_in, functions_of, written
from passes.control_flow.legality import check_predicable
from passes.core.host_reads import Read
from passes.core.predicates import leaks, outside
from passes.core.source_location import Branch
from passes.errors import Unremovable
from passes.tracing.trace import trace_once

aten = torch.ops.aten
_NUMBERS = frozenset((bool, int, float, complex, str, bytes, slice, torch.Size))


def trace_step(
    *arguments: Any,
    snapshot: Snapshot | None = None,
    restore: Callable[[], None] = lambda: None,
    unmerged: dict[Branch, str] | None = None,
    **settings: Any,
) -> GraphModule:
    """The graph of a step, with its branches merged and its loops over data unrolled where they can be; see `trace_once`.

    The step runs several times: once to find its branches, then with both sides of them, until no other branches are found.

    Args:
        snapshot: takes snapshots of Python objects, which tell whether a side changes any; without it no branch is merged.
        restore: puts Python back to what it was before the step ran.
        unmerged: branches that are not tried, and why: those that could not be merged for another way through the step.
            What turns out not to be mergeable is added.

    Returns:
        The graph, with ``meta["merged"]`` telling whether both sides of any branch are in it.

    Raises:
        Unremovable: as `trace_once`, of the step as it goes: what only merged branches do leaves them unmerged.
    """
    merger = _Merger(arguments, settings, restore, {} if unmerged is None else unmerged)
    plain = merger.trace({}, None)
    module = merger.merge(plain, snapshot) if snapshot is not None else plain
    module.meta["facts"].unmerged = merger.unmerged
    module.meta["merged"] = module is not plain
    return module


class _Merger:
    """The traces of one step.

    Attributes:
        unmerged: why branches cannot be merged.
    """

    def __init__(
        self, arguments: Sequence[Any], settings: Mapping[str, Any], restore: Callable[[], None], unmerged: dict[Branch, str]
    ) -> None:
        self._arguments, self._settings, self._restore = arguments, settings, restore
        self._functions: dict[Written, list[FunctionType]] = {}
        self.unmerged = unmerged

    def trace(self, plan: Plan, snapshot: Snapshot | None) -> GraphModule:
        """The graph with the branches of ``plan`` merged."""
        settings = {**self._settings, "plan": plan, "snapshot": snapshot, "functions": self._functions}
        return _unrolled(*self._arguments, **settings, restore=self._restore)

    def merge(self, module: GraphModule, snapshot: Snapshot) -> GraphModule:
        """The graph with all branches merged that can be."""
        plan: dict[Written, Starts] = {}
        tried = set(self.unmerged)
        while True:
            found = self._branches(module, tried)
            if not found:
                return module
            tried |= set(found)
            plan, module = self._wider(plan, module, found, snapshot)

    def _branches(self, module: GraphModule, tried: set[Branch]) -> dict[Branch, Written]:
        """Branches that a graph assumes one side of, and that may be merged: the functions they stand in."""
        found: dict[Branch, Written] = {}
        for asked, code in module.meta["facts"].branches.items():
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
        self, plan: dict[Written, Starts], module: GraphModule, found: dict[Branch, Written], snapshot: Snapshot
    ) -> tuple[dict[Written, Starts], GraphModule]:
        """The graph with as many more branches merged as can be, and which are then."""
        while found:
            wider = dict(plan)
            for (_, *start), place in found.items():
                wider[place] = wider.get(place, frozenset()) | {(start[0], start[1])}
            try:
                made = self.trace(wider, snapshot)
                check_predicable(made)
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
                    plan, module = self._wider(plan, module, {site: place}, snapshot)
                break
        return plan, module


def _unrolled(*arguments: Any, **settings: Any) -> GraphModule:
    """The graph of a step, with its loops over data unrolled where they can be."""
    if not any(str(aten.nonzero.default) == read.operator for read in _reads_of(*arguments, **settings)):
        return trace_once(*arguments, **settings)
    try:
        unrolled = trace_once(*arguments, **{**settings, "unroll": "bound"})
        loops = unrolled.meta["facts"].loops
        if not loops.found:
            return unrolled
        if not loops.left and not loops.drawn and not leaks(unrolled):
            seen = trace_once(*arguments, **{**settings, "unroll": "hint"})
            if outside(seen) == outside(unrolled) and _is_same(*(one.meta.get("structure") for one in (seen, unrolled))):
                return unrolled
    except Unremovable:
        pass
    return trace_once(*arguments, **settings)


def _is_same(first: Any, second: Any) -> bool:
    """Whether two traces of a step return the same numbers of Python in the same containers: none that counts trips."""
    (leaves, spec), (others, other) = tree_flatten(first), tree_flatten(second)
    return spec == other and all(
        a is b or (type(a) is type(b) and type(a) in _NUMBERS and repr(a) == repr(b)) for a, b in zip(leaves, others, strict=True)
    )


def _reads_of(step: Any, tensors: Any, reads: Sequence[Read] = (), *_: Any, **__: Any) -> Sequence[Read]:
    return reads
