"""Operators that compute what another one has computed already: once is enough.

Before::

    %a : masked_fill.Scalar(%rows, %beyond, 0)
    %b : masked_fill.Scalar(%rows, %beyond, 0)

After::

    %a : masked_fill.Scalar(%rows, %beyond, 0)

Two nodes are the same if operator and arguments are, and nothing was written to the arguments' memory between them.
What is written in place later, drawn at random or returned stays as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.core.aliasing import Aliases, is_pure, written
from passes.core.schema import returns_view


def merge_duplicates(module: GraphModule) -> list[tuple[str, str]]:
    """Rewrite ``module`` in place; returns the nodes that went, with those that stand for them."""
    aliases = Aliases.of(module)
    roots = {node: aliases.root(node) for node in module.graph.nodes}
    output = next(node for node in module.graph.nodes if node.op == "output")
    returned = set(tree_leaves(output.args))
    writes: Counter[Any] = Counter()
    seen: dict[Any, Node] = {}
    changes = []
    for node in list(module.graph.nodes):
        for target in written(node):
            writes[roots[target]] += 1
        if not is_pure(node) or (not returns_view(node.target) and aliases.is_written(node)):
            continue
        key = _key(node, writes, roots)
        first = seen.setdefault(key, node) if key is not None else node
        if first is not node and node not in returned:
            changes.append((str(node), str(first)))
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
    return changes


def _key(node: Node, writes: Counter[Any], roots: dict[Node, Any]) -> Any:
    """Equal for nodes that compute the same; None for arguments that cannot be compared."""
    leaves, structure = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    ages = tuple(writes[roots[leaf]] for leaf in leaves if isinstance(leaf, Node))
    values = tuple(leaf if isinstance(leaf, Node) else (type(leaf), repr(leaf)) for leaf in leaves)
    return node.target, values, str(structure), ages
