"""A traced step through all passes that it needs, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from passes.core.traced_step import TracedStep
from passes.core.verify import left_symbols, verify, wrong_values
from passes.optimize.hoist_constants import hoist
from passes.pipeline import finish
from passes.remove_host_values import TABLES, remove_host_values
from passes.rewritten_graph import RewrittenGraph

HOST_VALUES = (*TABLES, "branches")
"""The names of the parts of `remove_host_values`."""


def rewrite(
    traced: TracedStep,
    bounds: Mapping[str, int] | None = None,
    only: Sequence[str] = (*HOST_VALUES, "constants"),
    *,
    forced: bool = False,
) -> RewrittenGraph:
    """Take host values out of the graph of a step and upload its constants, in place; the module is compiled anew.

    Args:
        only: the passes to apply: ``"constants"`` for `passes.hoist_constants`, others as in `remove_host_values`. Names
            that are no passes of this package are left to whoever knows them.
        bounds, forced: as in `remove_host_values`.

    Raises:
        Unremovable: as `remove_host_values`.
        RuntimeError: a pass left an ill-formed graph.
    """
    names = [name for name in only if name in HOST_VALUES]
    graph = remove_host_values(traced, bounds, names, forced=forced)  # also without any: what the graph assumes is refused there
    if graph.changes:
        finish(graph.module)
    return upload_constants(graph) if "constants" in only else graph


def upload_constants(graph: RewrittenGraph) -> RewrittenGraph:
    """`passes.hoist_constants`, with the host tensors known whose content the graph holds from now on."""
    changes, uploaded = hoist(graph.module)
    if changes:
        finish(graph.module)
        verify(graph.module, "hoist_constants", wrong_values, left_symbols)
    return replace(graph.changed("hoist_constants", changes), uploaded=(*graph.uploaded, *uploaded))
