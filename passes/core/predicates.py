"""Loops over the rows of a list whose length is data: unrolled to the bound, each iteration under its own predicate.

Before, with the three rows of an eager run::

    for row in mask.nonzero():                      # u0 rows
        out.index_add_(0, where(row), values(row))

After, with the bound for the number of iterations, of which number ``i`` takes place if ``i < u0``::

    %runs_3 : gt.Scalar(%u0, 3)
    %kept_3 : masked_fill.Scalar(%values_3, %not_runs_3, 0)
    %_ : index_add_.default(%out, 0, %rows_3, %kept_3)

That is the loop only if an iteration has no effect but its writes to tensors from outside, which are the ones that are
predicated. So a loop is unrolled if no value made inside an iteration is read outside of it, and if what the step does
outside of its loops does not depend on how many iterations Python saw. Other loops are recorded with the iterations of the
eager run, as an assumption.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from passes.core.aliasing import written
from passes.core.source_location import Branch

Tensor = torch.Tensor
CERTAIN = "certain"
"""A key of a node's ``meta``: it writes in an iteration or a branch arm that takes place in every run."""
LIMIT = 64
"""Rows above which a loop is not unrolled."""


@dataclass(frozen=True)
class Iteration:
    """One run of the body of a loop: it takes place if ``index < count``."""

    loop: int
    index: int
    count: sympy.Basic

    @property
    def predicate(self) -> sympy.Basic:
        """Whether it takes place."""
        return sympy.Lt(self.index, self.count)


@dataclass(frozen=True)
class BranchArm:
    """One side of a branch of which both sides are traced; see `passes.control_flow.branches`."""

    branch: int
    predicate: sympy.Basic
    site: Branch


class Loops:
    """The loops of a step that is being traced.

    Args:
        unroll: ``"bound"`` for as many iterations as there can be, ``"hint"`` for those of the eager run, or one less where
            that is as many; ``"no"`` to leave loops to Python.

    Attributes:
        trips: the iterations that are running now, the outermost first, and the arms of branches among them.
        left: whether a loop was left before its last iteration.
        drawn: whether an iteration draws random numbers, which one that does not take place would not.
    """

    def __init__(self, unroll: str = "no") -> None:
        self.unroll = unroll
        self.trips: tuple[Iteration | BranchArm, ...] = ()
        self.left = self.drawn = False
        self.found = 0

    def runs(self, target: Any) -> None:
        """Note what operator is come to."""
        if any(isinstance(trip, Iteration) for trip in self.trips) and torch.Tag.nondeterministic_seeded in getattr(
            target, "tags", ()
        ):
            self.drawn = True

    def rows(self, x: Tensor, count: sympy.Basic, limit: int, hint: int) -> Iterator[Tensor]:
        """The rows of ``x``, of which there are ``count``: ``limit`` at most, ``hint`` in the eager run."""
        self.found += 1
        outer, loop = self.trips, self.found
        try:
            for index in range(limit if self.unroll == "bound" else min(hint, limit - 1)):
                self.trips = (*outer, Iteration(loop, index, count))
                yield x.select(0, index)
        except GeneratorExit:
            self.left = True
            raise
        finally:
            self.trips = outer


def is_iteration() -> bool:
    """Whether the function mode, whose method calls this, was called by ``Tensor.__iter__``."""
    return sys._getframe(3).f_code.co_name == "__iter__"


def leaks(module: GraphModule) -> bool:
    """Whether a value made inside an iteration is read outside of it."""
    return any(
        loops_of(user)[: len(loops)] != loops
        for node in module.graph.nodes
        if (loops := loops_of(_lasting(node)))
        for user in node.users
    )


def _lasting(node: Node) -> Node:
    """The tensor that an in-place operator was given: its result is the same tensor."""
    while node.op == "call_function" and node.args and node.args[0] in written(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def trips_of(node: Node) -> tuple[Iteration | BranchArm, ...]:
    """The conditions that a node of a traced graph stands under, the outermost first."""
    return tuple(node.meta.get("trips", ()))


def loops_of(node: Node) -> tuple[Iteration, ...]:
    """Those of them that are iterations of loops."""
    return tuple(trip for trip in trips_of(node) if isinstance(trip, Iteration))


def outside(module: GraphModule) -> list[tuple[Any, ...]]:
    """What a graph does outside of its loops, to be compared."""
    nodes = [node for node in module.graph.nodes if not loops_of(node)]
    places = {node: index for index, node in enumerate(nodes)}

    def described(value: Any) -> Any:
        if isinstance(value, Node):
            return ("node", places.get(value if value in places else _lasting(value), -1))
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

    return [(n.op, str(n.target), torch.fx.node.map_aggregate((n.args, n.kwargs), described)) for n in nodes]
