"""Views in a graph under construction, and copies that stand for views at places only the device knows.

A row that is picked by a device value cannot be a view, so it is gathered: copied. A write to the copy is written back to
where it came from, and a write to where it came from makes the copy stale: the next reader gets a new one. Both hold
through any chain of views.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch.fx import GraphModule, Node

from passes.core.schema import is_mutable, returns_view, written_values

GATHERED = "gathered"
"""A key of a node's ``meta``: it is a copy that stands for the part of its first argument that it was gathered from."""
WRITTEN_BACK = "written_back"
"""A key of a node's ``meta``: it writes a copy to where that came from, so that the copy is still what it stands for."""


@dataclass(frozen=True)
class Gathered:
    """How a copy is made from its base, and written back."""

    base: Node
    gather: Callable[[Node], Node]
    scatter: Callable[[Node, Node], None]


def is_pure(node: Node) -> bool:
    """Whether a node is an operator of torch's own that depends on its arguments alone."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return not written(node) and not is_mutable(target) and torch.Tag.nondeterministic_seeded not in target.tags


def written(node: Node) -> list[Node]:
    """The arguments that a node writes."""
    if node.op != "call_function":
        return []
    values = written_values(node.target, node.args, node.kwargs)
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)]


def lasting_writes(module: GraphModule) -> tuple[list[int], list[str]]:
    """What a graph writes that outlives a run: positions of its arguments, and names of tensors that it holds."""
    places = {node: index for index, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder")}
    roots: dict[Node, None] = {}
    for node in module.graph.nodes:
        for tensor in written(node):
            while (parent := parent_of(tensor)) is not None:
                tensor = parent
            roots[tensor] = None
    return sorted(places[root] for root in roots if root in places), [str(root.target) for root in roots if root.op == "get_attr"]


class Builder(Protocol):
    """What builds a graph out of that of ``module``."""

    @property
    def module(self) -> GraphModule:
        """The traced graph."""
        ...

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, with its fake value."""
        ...


@dataclass
class _Finished:
    """A graph that nothing is added to."""

    module: GraphModule

    def call(self, target: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("nothing is added to a finished graph")


class Aliases:
    """Which nodes share memory, in the graph that ``builder`` makes."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._parents: dict[Node, Node] = {}
        self._gathered: dict[Node, Gathered] = {}
        self._stale: set[Node] = set()
        self._renewed: dict[Node, Node] = {}
        self._writing_back = 0
        module = builder.module
        old = module.graph.nodes
        self._old_parents = {n: parent for n in old if (parent := parent_of(n)) is not None}
        self._written_roots = {self._root_of(w, self._old_parents) for node in old for w in written(node)}

    @classmethod
    def of(cls, module: GraphModule) -> Aliases:
        """Those of a finished graph, up to its last node."""
        aliases = cls(_Finished(module))
        for node in module.graph.nodes:
            aliases.made(node)
        return aliases

    def made(self, node: Node) -> None:
        """Note a new node: whose view it is, and what it writes."""
        parent = parent_of(node)
        if parent is not None:
            self._parents[node] = parent
        for tensor in written(node):
            if self._writing_back:
                node.meta[WRITTEN_BACK] = True
            self.wrote(tensor)

    def gathered(self, node: Node, how: Gathered) -> Node:
        """Say that ``node`` is a copy of a part of another."""
        self._gathered[node] = how
        node.meta[GATHERED] = True
        return node

    def root(self, node: Node) -> Any:
        """What all nodes that share memory have in common; a copy shares its base's."""
        return self._root_of(node, self._parents)

    def _root_of(self, node: Node, parents: dict[Node, Any]) -> Any:
        while True:
            if node in parents:
                node = parents[node]
            elif node in self._gathered:
                node = self._gathered[node].base
            else:
                break
        if node.op == "get_attr":
            value: Any = self._builder.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return ("storage", value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else ("attribute", node.target)
        if node.op == "placeholder":
            storage = node.meta.get("storage")
            return node.name if storage is None else ("storage", storage)
        return node

    def is_written(self, node: Node) -> bool:
        """Whether memory of a node of the old graph is written anywhere in it, or may be: an input's may be any memory."""
        root = self._root_of(node, self._old_parents)
        return root in self._written_roots or (isinstance(root, str) and bool(self._written_roots))

    def is_gathered(self, node: Node) -> bool:
        """Whether ``node`` is a copy as a whole: not a view of one."""
        return node in self._gathered

    def overwrite(self, copy: Node, new: Node) -> None:
        """Write ``new`` to where ``copy`` came from, and have the copy made again for whoever reads it."""
        how = self._gathered[copy]
        how.scatter(self.fresh(how.base), new)

    def wrote(self, tensor: Node) -> None:
        """After a write to ``tensor``: write copies back, and make other copies of the same memory stale."""
        if not self._gathered:
            return
        chain = [tensor]
        while chain[-1] in self._parents:
            chain.append(self._parents[chain[-1]])
        copy = chain[-1]
        root = self.root(copy)
        self._stale |= {other for other in self._gathered if other is not copy and self.root(other) == root}
        if copy in self._gathered:
            how = self._gathered[copy]
            base = self.fresh(how.base)
            self._writing_back += 1
            how.scatter(base, copy)
            self._writing_back -= 1
            self._stale.discard(copy)

    def fresh(self, node: Node) -> Node:
        """``node``, or what it has to be read from now."""
        node = self._renewed.get(node, node)
        if not self._stale:
            return node
        if node in self._stale:
            how = self._gathered[node]
            made = how.gather(self.fresh(how.base))
            self._stale.discard(node)
        else:
            parent = self._parents.get(node)
            base = self.fresh(parent) if parent is not None else None
            if base is parent or base is None:
                return node
            if written(node):  # an in-place operator returns the tensor that it was given
                return base
            made = self._builder.call(node.target, base, *node.args[1:], **node.kwargs)
        made.meta.update({key: node.meta[key] for key in ("lengths",) if key in node.meta})
        self._renewed[node] = made
        return made


def parent_of(node: Node) -> Any:
    """The node whose memory the result of ``node`` shares; of several that it writes the first."""
    if node.op != "call_function":
        return None
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if first is not None and (node.target is operator.getitem or returns_view(node.target)):
        return first
    targets = written(node)
    return first if first in targets else next(iter(targets), None)
