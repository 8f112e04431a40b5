"""What is done with a product's result becomes a part of the product: an activation, a gate, or the sum with a residual.

Before::

    %skinny_linear : skinny_linear(args = (%rows, [%gate, %up]))
    %getitem : getitem(args = (%skinny_linear, 0))
    %getitem_1 : getitem(args = (%skinny_linear, 1))
    ...                                                      # silu
    %mul : mul(args = (%silu, %getitem_1))

After::

    %skinny_linear : skinny_linear(args = (%rows, [%gate, %up]), kwargs = {activation: silu})
    %mul : getitem(args = (%skinny_linear, 0))

An activation is found by what it means: a function of torch, or as models write it out, traced for the product, has to have the
terms of the graph (`passes.optimize.operators.terms`). Only where nothing else wants the product.
"""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from passes.core.values.fake_values import emit
from passes.optimize.operators.terms import Term, Terms, is_function

aten = torch.ops.aten
Spelling = Callable[[Tensor], Tensor]


def _gelu_written_out(y: Tensor) -> Tensor:
    return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))


def _gelu_fast(y: Tensor) -> Tensor:
    return 0.5 * y * (1.0 + torch.tanh(y * 0.7978845608 * (1.0 + 0.044715 * y * y)))


SPELLINGS: tuple[tuple[str, Spelling], ...] = (
    ("silu", functional.silu),
    ("silu", lambda y: y * torch.sigmoid(y)),
    ("gelu", functional.gelu),
    ("gelu", lambda y: y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))),
    ("gelu_tanh", lambda y: functional.gelu(y, approximate="tanh")),
    ("gelu_tanh", _gelu_written_out),
    ("gelu_tanh", _gelu_fast),
    ("quick_gelu", lambda y: y * torch.sigmoid(1.702 * y)),
    ("relu", functional.relu),
)
"""Names of activations that an operator knows, with what means them."""


Table = Callable[[], Mapping[Any, Callable[..., Any]]]


def product_epilogues(module: GraphModule, *, operator: Any, decompositions: Table = dict) -> list[tuple[str, str]]:
    """Let ``operator``, which `skinny_products` put into the graph, do what is done with its results.

    Args:
        operator: takes ``activation=`` and ``residual=``, see `graphs.ops.skinny.operator`.
        decompositions: of the compiler that made the graph; operators that it leaves whole are known as well.
    """
    calls = [node for node in module.graph.nodes if node.target is operator and not {"activation", "residual"} & set(node.kwargs)]
    calls = [call for call in calls if len(call.args) <= 3 and len(call.args[1]) <= 2]
    if not calls:
        return []
    finder, changes, made = _Finder(module, decompositions), [], dict[Node, Node]()
    for call in calls:
        found = finder.activation(call) or finder.residual(call)
        if found is not None:
            before = f"{call.format_node()}; {found.node.format_node()}"
            changes.append((before, _put(module, call, found, made)))
    return changes


class _Behind(NamedTuple):
    """What is done with a call's results.

    Attributes:
        node: all that comes out of it.
        inside: the call, and what is done with it before.
        swapped: whether the activation is that of the second product.
    """

    node: Node
    inside: list[Node]
    activation: str | None = None
    swapped: bool = False
    residual: Node | None = None


class _Finder:
    """Looks for what is done with products."""

    def __init__(self, module: GraphModule, decompositions: Table) -> None:
        self._terms, self._decompositions = Terms(module), decompositions
        self._order = {node: place for place, node in enumerate(module.graph.nodes)}
        self._traced: dict[Any, GraphModule] = {}

    def activation(self, call: Node) -> _Behind | None:
        """An activation that is all that is done with one product, or with two of one size that are multiplied."""
        products = self._products(call)
        if not products or len({term.shape for term in products}) > 1:
            return None
        for swapped in (False, True)[: len(products)]:
            for seen in zip(*map(self._views, products[::-1] if swapped else products), strict=False):
                for name, active in self._active(seen[0]):
                    gated = (aten.mul.Tensor, (active, *seen[1:]), active.shape, active.dtype)
                    made = self._terms.symmetric(*gated) if len(seen) > 1 else active
                    for node in self._terms.nodes.get(made, ()):
                        inside = self._everything(call, node)
                        if inside:
                            return _Behind(node, inside, name, swapped)
        return None

    def residual(self, call: Node) -> _Behind | None:
        """The sum with something else, where that is all that is done with a product."""
        products = self._products(call)
        if len(products) != 1:
            return None
        for total in [user for seen in self._views(products[0]) for user in self._terms.users[seen]]:
            others = [one for one in total.terms if _source(one) is not products[0]]
            if total.op is not aten.add.Tensor or len(total.terms) != 2 or total.numbers or len(others) != 1:
                continue
            if {one.shape for one in total.terms} != {total.shape} or others[0].dtype != products[0].dtype:
                continue
            for node in self._terms.nodes.get(total, ()):
                given, inside = self._node_before(others[0], node), self._everything(call, node)
                if given is not None and inside and given not in inside:
                    return _Behind(node, inside, residual=given)
        return None

    def _products(self, call: Node) -> list[Term]:
        """The terms of a call's results, each of which has one node; none where what the call is given may change behind it."""
        if any(self._terms.is_written(given) for given in call.all_input_nodes):
            return []
        parts = {user.args[1]: user for user in call.users if user.target is python.getitem}
        terms = [self._terms.term_of(parts[index]) for index in sorted(parts)]  # type: ignore[type-var]
        complete = len(parts) == len(call.users) == len(call.args[1])  # type: ignore[arg-type]
        return [term for term in terms if term is not None] if complete else []

    def _views(self, term: Term) -> Iterator[Term]:
        """A product, and its elements in the shapes that they are used in."""
        yield term
        yield from (user for user in self._terms.users[term] if user.op == "reshape")

    def _active(self, given: Term) -> Iterator[tuple[str, Term]]:
        """The activations of a product, by name."""
        for table in (dict, self._decompositions):
            for name, spelling in SPELLINGS:
                key = (table, spelling, given.shape, given.dtype)
                if key not in self._traced:
                    sample = torch.empty(given.shape, dtype=given.dtype, device="meta")
                    self._traced[key] = _traced(spelling, sample, table())
                yield name, self._terms.of(self._traced[key], [given])[0]

    def _node_before(self, term: Term, node: Node) -> Node | None:
        """What gives a term before a node, if nothing writes it."""
        there = [one for one in self._terms.nodes.get(term, ()) if self._order[one] < self._order[node]]
        return there[0] if there else None

    def _everything(self, call: Node, node: Node) -> list[Node]:
        """All that is done with a call's results, if nothing of it gets out but by a node that is no matter of strides."""
        seen, pending = {call}, [call]
        while pending:
            for user in pending.pop().users:
                if user is not node and not is_function(user):
                    return []
                if user is not node and user not in seen:
                    seen.add(user)
                    pending.append(user)
        return sorted(seen, key=self._order.__getitem__) if node.meta["val"].is_contiguous() else []


def _traced(spelling: Spelling, sample: Tensor, table: Mapping[Any, Callable[..., Any]]) -> GraphModule:
    """The graph of an activation; functions of torch that are written in C have no signature to trace."""
    with torch.no_grad():
        return make_fx(lambda y: spelling(y), decomposition_table=dict(table))(sample)


def _source(term: Term) -> Term:
    source: Term = term.args[0] if term.op == "reshape" else term
    return source


def _put(module: GraphModule, call: Node, found: _Behind, known: dict[Node, Node]) -> str:
    """Compute a node by ``call`` with one option more, where it stands; ``known`` has what such nodes were replaced by."""
    graph, size, value = module.graph, call.meta["val"][0].shape, found.node.meta["val"]
    x, weights, biases = (*call.args, None)[:3]
    options: dict[str, Any] = dict(call.kwargs)
    with graph.inserting_before(found.node):
        if found.residual is not None:
            residual = known.get(found.residual, found.residual)
            if residual.meta["val"].shape != size:
                residual = emit(graph, aten.reshape.default, (residual, list(size)))
            options["residual"] = residual
        else:
            options["activation"] = found.activation
        if found.swapped:
            weights, biases = list(weights)[::-1], None if biases is None else list(biases)[::-1]  # type: ignore[arg-type, call-overload]
        made = emit(graph, call.target, (x, weights) if biases is None else (x, weights, biases), options)
        result = emit(graph, python.getitem, (made, 0))
        if value.shape != size:
            result = emit(graph, aten.reshape.default, (result, list(value.shape)))
    result.meta = {**found.node.meta, "val": result.meta["val"]}
    found.node.replace_all_uses_with(result)
    known[found.node] = result
    for old in (found.node, *reversed(found.inside)):
        graph.erase_node(old)
    return made.format_node() or str(made)
