"""Whether the sides of branches may run whichever of them is taken: what their operators do, in a traced graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.control_flow.branches import Unmergeable
from passes.core.aliasing import parent_of, written
from passes.core.node_calls import attribute
from passes.core.predicates import BranchArm, trips_of
from passes.core.schema import is_mutable
from passes.core.values.refusals import refuses_unknown

aten = torch.ops.aten
LIMIT = 64
"""Operators above which a side is not cheap enough to be computed for nothing."""


def check_predicable(module: GraphModule) -> None:
    """That the sides of a traced graph may run whichever of them is taken.

    Raises:
        Unmergeable: a side draws random numbers, may raise, writes in a way that has no condition, is long, or makes what is
            read elsewhere; or what the sides leave is written, or is a copy of what is.
    """
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    memory = {node: _memory(module, node) for node in order}
    sizes: Counter[BranchArm] = Counter()
    for node in order:
        arms = [trip for trip in trips_of(node) if isinstance(trip, BranchArm)]
        value = node.meta.get("val")
        if arms and node.op == "call_function":
            reason = _unconditional(node)
            if reason:
                raise Unmergeable(reason, arms[-1].site)
            sizes.update(arms if isinstance(value, torch.Tensor) else ())
        if arms and isinstance(value, torch.Tensor) and any(_is_elsewhere(node, user) for user in node.users):
            raise Unmergeable("what a side makes is read elsewhere", arms[-1].site)
        if node.meta.get("joins") and _is_overtaken(node, order, memory):
            raise Unmergeable("what the sides leave is written, or what it was made of", node.meta["joins"].site)
    for arm, size in sizes.items():
        if size > LIMIT:
            raise Unmergeable(f"a side has {size} operators", arm.site)


def _unconditional(node: Node) -> str:
    """Why an operator cannot run in a side that is not taken, or an empty string."""
    target: Any = node.target
    if getattr(target, "_schema", None) is None:  # a number of Python, or one of several results
        return ""
    name = str(target)
    if not name.startswith(("aten.", "prims.")):
        return f"a side calls {name}, which may depend on what it is given"
    if torch.Tag.nondeterministic_seeded in target.tags:
        return "a side draws random numbers"
    if refuses_unknown(node):
        return f"a side calls {name}, which may raise"
    if torch.Tag.inplace_view in target.tags or name.startswith(("aten.resize", "aten.set_")):
        return f"a side calls {name}, which changes a tensor's shape"
    if (is_mutable(target) or written(node)) and written(node) != list(node.args[:1]):
        return f"a side calls {name}, which writes more than its first argument"
    return ""


def _is_elsewhere(node: Node, user: Node) -> bool:
    """Whether ``user`` reads outside of the side that made ``node``, other than to join it."""
    own = trips_of(_origin(node))
    if trips_of(user)[: len(own)] == own:
        return False
    joins: BranchArm | None = user.meta.get("joins")
    branch = own[-1].branch if isinstance(own[-1], BranchArm) else None
    return joins is None or joins.branch != branch or trips_of(user)[: len(own) - 1] != own[:-1]


def _is_overtaken(node: Node, order: Mapping[Node, int], memory: Mapping[Node, Any]) -> bool:
    """Whether a tensor left by two sides is written, or read after one that it is a copy of was."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or parent_of(node) is not None:
        return False
    mine = memory[node]
    last = max((order[user] for view in order if memory[view] == mine for user in view.users), default=0)
    sources = {memory[source] for source in _sources(node)} - {mine}
    for other, index in order.items():
        found = {memory[target] for target in written(other)}
        if mine in found or (order[node] < index < last and found & sources):
            return True
    return False


def _sources(node: Node) -> set[Node]:
    """What eager's one object may be where ``node`` is a copy: what the sides left, and what those were choices of."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                if _origin(source).meta.get("joins"):
                    pending.append(_origin(source))
    return found


def _origin(node: Node) -> Node:
    """The node that the memory of ``node`` comes from."""
    while (parent := parent_of(node)) is not None:
        node = parent
    return node


def _memory(module: GraphModule, node: Node) -> Any:
    """What all nodes of one memory have in common."""
    node = _origin(node)
    if node.op != "get_attr":
        return node
    value = attribute(module, str(node.target))
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node.target
