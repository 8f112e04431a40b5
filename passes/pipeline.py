"""Running passes in order over an FX graph of ATen operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule

from passes.core.values.refusals import drop_unused
from passes.core.verify import verify, wrong_values
from passes.optimize.hoist_constants import hoist_constants
from passes.optimize.operators.hyper_connections import hyper_connections
from passes.rewritten_graph import Change

Pass = Callable[[GraphModule], Sequence[tuple[str, str]]]
"""Rewrites a graph in place and returns (before, after) for each change, as printed nodes."""

DEFAULT: tuple[Pass, ...] = (hoist_constants,)
"""The passes of `run`, in the order they run."""

EARLY: tuple[Callable[..., Any], ...] = (hyper_connections,)
"""Passes that have to see a graph before a compiler leaves out what it rounds in between."""


def run(
    module: GraphModule, passes: Sequence[Pass] = DEFAULT, *, failed: Callable[[str, Exception], None] | None = None
) -> list[Change]:
    """Apply ``passes`` to ``module`` in place and return what they changed.

    The graph is linted after each pass that changed something. A graph that no pass applies to is left as it is: not
    recompiled, no node touched.

    Args:
        failed: told of a pass that raises, by name; the graph is then as it was before that pass. Without it the exception gets
            out.

    Raises:
        RuntimeError: a pass left an ill-formed graph (from ``Graph.lint``).
        BrokenInvariant: see `verify`.
    """
    changes: list[Change] = []
    for one in passes:
        kept = _copied(module.graph, Graph()) if failed is not None else None
        try:
            made = one(module)
            if made:
                finish(module)
        except Exception as error:
            if failed is None or kept is None:
                raise
            for node in reversed(list(module.graph.nodes)):
                module.graph.erase_node(node)
            _copied(kept, module.graph)
            module.recompile()
            failed(_name(one), error)
            continue
        if made:
            verify(module, _name(one), wrong_values)
        changes += [Change(_name(one), before, after) for before, after in made]
    return changes


def _copied(graph: Graph, to: Graph) -> Graph:
    """The nodes of a graph, with what they give, in another one that is empty."""
    result: Any = to.graph_copy(graph, {}, return_output_node=True)
    if result is not None:
        value, node = result
        to.output(value).meta = dict(node.meta)
    return to


def is_early(one: Pass) -> bool:
    """Whether a pass, or one whose settings were bound, is among `EARLY`."""
    return getattr(one, "func", one) in EARLY


def finish(module: GraphModule) -> None:
    """Take out of a changed graph what nobody uses, check its form and compile it; raises as `run` does."""
    drop_unused(module)
    module.graph.lint()
    module.recompile()


def _name(one: Pass) -> str:
    """The name of a pass, also of one whose settings were bound with `functools.partial`."""
    return str(getattr(getattr(one, "func", one), "__name__", repr(one)))
