"""A step as a graph without host values: what the passes hand to whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule

from passes.core.facts import Facts
from passes.core.names import is_state
from passes.core.traced_step import TracedStep
from passes.host_values.forced.forcing import Forcing
from passes.host_values.uses import HostValue
from passes.speculation.speculate import Undo


@dataclass(frozen=True)
class Change:
    """One rewrite: the pass, the node as it was printed before, and what stands for it now."""

    by: str
    before: str
    after: str


class ForcedGraph(NamedTuple):
    """A graph of the same rules in which outcomes of host values can be forced, and what those are."""

    module: GraphModule
    forcings: list[Forcing]


@dataclass(frozen=True)
class RewrittenGraph:
    """The graph of a traced step, rewritten in place; made by `passes.remove_host_values` and `passes.rewrite`.

    Attributes:
        module: the graph. Its results are those of the step; if it assumes anything, a 0-d bool flag behind them that is true
            in runs where that was wrong, and what `passes.undo` needs to take back the writes of such a run.
        facts: what is known of the step's host values.
        results: how many results are the step's.
        assumes: whether there is a flag.
        undo: which of the results behind the flag belong to which write.
        forced: where asked for, the graph in which host values can be forced.
        uploaded: tensors of the step's own on the host that the graph holds copies of, as they were when it was made.
        changes: what was rewritten, in order.
        host_values: what became of each value that the host read.
    """

    module: GraphModule
    facts: Facts
    results: int
    assumes: bool = False
    undo: tuple[Undo, ...] = ()
    forced: ForcedGraph | None = None
    uploaded: tuple[Tensor, ...] = ()
    changes: tuple[Change, ...] = ()
    host_values: tuple[HostValue, ...] = ()

    @classmethod
    def unchanged(cls, traced: TracedStep) -> RewrittenGraph:
        """A traced step as it is."""
        return cls(traced.module, traced.facts, count_results(traced.module.graph))

    def changed(self, by: str, changes: list[tuple[str, str]]) -> RewrittenGraph:
        """The same graph, with more changes noted."""
        return replace(self, changes=(*self.changes, *(Change(by, before, after) for before, after in changes)))

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the step's own that the graph reads or writes, by the name it has for them."""
        names = dict.fromkeys(str(node.target) for node in self.module.graph.nodes if node.op == "get_attr")
        return {name: self.module.get_buffer(name) for name in names if is_state(name)}


def count_results(graph: Graph) -> int:
    """How many results a graph has."""
    return len(graph.output_node().args[0])  # type: ignore[arg-type]
