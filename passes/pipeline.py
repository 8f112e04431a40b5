"""Running passes in order over an FX graph of ATen operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from passes.optimize.hoist_constants import hoist_constants


@dataclass(frozen=True)
class Change:
    """One rewrite: the pass, the node as it was printed before, and what stands for it now."""

    by: str
    before: str
    after: str


Pass = Callable[[GraphModule], Sequence[tuple[str, str]]]
"""Rewrites a graph in place and returns (before, after) for each change, as printed nodes."""

DEFAULT: tuple[Pass, ...] = (hoist_constants,)
"""The passes of `run`, in the order they run."""


def run(module: GraphModule, passes: Sequence[Pass] = DEFAULT) -> list[Change]:
    """Apply ``passes`` to ``module`` in place and return what they changed.

    The graph is linted after each pass that changed something. A graph that no pass applies to is left as it is: not
    recompiled, no node touched.

    Raises:
        RuntimeError: a pass left an ill-formed graph (from ``Graph.lint``).
    """
    changes: list[Change] = []
    for one in passes:
        made = one(module)
        if made:
            module.graph.eliminate_dead_code()
            module.graph.lint()
            module.recompile()
        changes += [Change(_name(one), before, after) for before, after in made]
    return changes


def _name(one: Pass) -> str:
    """The name of a pass, also of one whose settings were bound with `functools.partial`."""
    return str(getattr(getattr(one, "func", one), "__name__", repr(one)))
