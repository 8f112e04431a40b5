"""What a graph for a device computes on the host: a recording of the device holds none of it.

A graph with these nodes is refused, since a replay would pick the recorded row for ever::

    %n : randint(4, [], device=cpu)
    %row : index(%x, [%n])

What is computed from constants alone is the same in every run, and may stay.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node

from passes.core.aliasing import is_pure
from passes.core.names import is_state
from passes.errors import Unremovable

_REMEDY = "Compute it on the device, or pass the result as a device tensor"


def refuse_host_results(graph: Graph) -> None:
    """Check that nothing in a graph depends on what only the host computes, or holds.

    Raises:
        Unremovable: an operator does; it names the first one.
    """
    changing: set[Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        on_host = isinstance(value, Tensor) and value.device.type == "cpu"
        if on_host and (node.op == "placeholder" or (node.op == "get_attr" and is_state(node.target))):
            changing.add(node)
        elif node.op == "call_function" and (not changing.isdisjoint(node.all_input_nodes) or (on_host and not is_pure(node))):
            detail = "it works on the host, where a replay would leave the recorded value"
            raise Unremovable(detail, str(node.target), node.meta.get("site", ("", 0)), _REMEDY)
