"""Bounded dynamism: a length that only the device knows becomes a static bound and a mask.

Before::

    %rows : nonzero.default(%mask)                       # [u0, 1]
    %taken : index.Tensor(%x, [%rows])                   # [u0, 4]
    %total : sum.dim_IntList(%taken, [0])

After, with eight rows at most::

    %rows : nonzero_static.default(%mask, size = 8, fill_value = 0)
    %taken : index.Tensor(%x, [%rows])                   # [8, 4], of which the first u0 rows mean something
    %within : lt.Tensor(%iota, %count)
    %kept : where.self(%within, %taken, %zero)
    %total : sum.dim_IntList(%kept, [0])

Padding costs nothing where rows do not mix. Where they do, it is replaced by the neutral element: 0 for sums and both
sides of a matrix product, -inf for maxima and softmax, row 0 for lookups; scattered rows are dropped. XLA calls this
bounded dynamism; here each bound is a condition that the graph checks (`passes.speculation.speculate`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.core.symbols import expression_of, is_symbol
from passes.host_values.rewriter import Rewriter, Rule
from passes.host_values.rules import grouped_products, indexing, products, reductions, scatters, shapes, sources
from passes.host_values.rules.arithmetic import pointwise as with_symbols
from passes.host_values.rules.arithmetic import takes_host_number

RULES: dict[Any, Rule] = {
    **{
        target: rule
        for part in (sources, shapes, reductions, products, indexing, scatters)
        for target, rule in part.RULES.items()
    },
    grouped_products.GROUPED: grouped_products.grouped_mm,
}


def default(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operators without a rule of their own: elementwise ones pass lengths on, the rest must not meet any."""
    if not hasattr(node.target, "tags"):  # arithmetic of numbers: done where a number is used
        return None
    numbers = sum(map(is_symbol, tree_leaves((args, kwargs))))
    args, kwargs = tree_map_only(Node, lambda a: _static(rw, a), (args, kwargs))
    leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Node)]
    padded, symbols = any(rw.lengths(a) for a in leaves), sum(map(is_symbol, leaves))
    draws = torch.Tag.nondeterministic_seeded in node.target.tags  # a longer tensor takes more random numbers
    if torch.Tag.pointwise in node.target.tags and not draws:
        if symbols or takes_host_number(node):
            made = with_symbols(rw, node, shapes.aligned(rw, args), kwargs)
            if made is not None or symbols:
                return made if made is not None else rw.no_rule("a number on the device", node)
        if padded:
            return shapes.elementwise(rw, node, args, kwargs)
    elif padded or symbols or rw.has_dynamic_result(node):
        rw.no_rule("no rule pads this operator", node)
    return rw.call(node.target, *args, **kwargs) if rw.sized_by_symbols(node) or symbols < numbers else None


def _static(rw: Rewriter, node: Node) -> Any:
    """A number that is taken at its hint as a number."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt) and rw.is_exact(expression_of(node)):
        return rw.bound(expression_of(node))
    if isinstance(value, torch.SymFloat) and rw.is_exact(expression_of(node)):
        hint = rw.facts.hint(expression_of(node))
        rw.assume_value(expression_of(node), hint)
        return float(hint)  # type: ignore[arg-type]
    return node
