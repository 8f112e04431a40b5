"""Hyper-connections become one operator each, which two kernels compute in the place of a hundred.

Before, of transformers' DeepSeek-V4 (the middle is 20 normalisations of a matrix of 4 by 4)::

    %flat : view(args = (%streams, [4, 1, 16384]))
    %mm : mm(args = (%normed, %fn_t))
    ...
    %collapsed : _to_copy(args = (%sum,), kwargs = {dtype: torch.bfloat16})

After::

    %mhc_pre : mhc_pre(args = (%streams, %fn, %base, %scale, 1e-06, 1e-06, 20))
    %collapsed : getitem(args = (%mhc_pre, 0))

What is looked for is not listed here: the product with a linear layer says which tensors and numbers there may be, and a
function that means the operator, traced for these, has to have the terms of the graph (`passes.optimize.operators.terms`): the
same operators on the same values, rounded alike. Anything else stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from passes.core.values.fake_values import emit
from passes.optimize.operators.terms import Term, Terms, value_of

aten = torch.ops.aten
_ADD, _MUL, _BMM, _MM = aten.add.Tensor, aten.mul.Tensor, aten.bmm.default, aten.mm.default
_SIGMOID, _RSQRT, _DIV, _AMAX = aten.sigmoid.default, aten.rsqrt.default, aten.div.Tensor, aten.amax.default
_EXPAND = aten.expand.default
_ARRANGED = ("reshape", "slice", "select")
_NORMALISING = (_AMAX, aten.sub.Tensor, aten.exp.default, aten.sum.dim_IntList, _DIV, _ADD)


@dataclass(frozen=True)
class HyperConnections:
    """A family of operators, with the functions that they mean.

    Attributes:
        pre: ``(streams [..., H, D], fn, base, scale, norm_eps, eps, iterations)`` to the input of a block ``[..., D]``, ``post``
            and ``comb``.
        post: ``(out [..., D], streams, post, comb)`` to the streams behind a block.
        head: ``(streams, fn, base, scale, norm_eps, eps)`` to the input of what comes behind the last block.
        pre_operator, post_operator, head_operator: compute these.
        post_pre_operator: `post`, then `pre` of its result: the streams, and the results of `pre`.
        fits: whether they are to be used for a number of rows, H and D.
        dtypes: of streams and of linear layers that the operators take.
    """

    pre: Callable[..., Any]
    post: Callable[..., Any]
    head: Callable[..., Any]
    pre_operator: Any
    post_operator: Any
    post_pre_operator: Any
    head_operator: Any
    fits: Callable[[int, int, int], Any]
    dtypes: frozenset[torch.dtype]

    def __str__(self) -> str:
        return f"{self.pre.__module__}: {self.pre_operator}, {self.fits.__module__}.{self.fits.__name__}"


def hyper_connections(module: GraphModule, *, family: HyperConnections) -> list[tuple[str, str]]:
    """Rewrite ``module`` in place; returns the results that each operator stands for, with the operator."""
    if not any(_may_be(node, module, family) for node in module.graph.nodes):
        return []
    found = _Finder(module, family)
    return _Writer(module, family, found).changes() if found.connections else []


def may_be_connection(rows: Sequence[int], layer: Sequence[int], fits: Callable[[int, int, int], Any]) -> bool:
    """Whether a product of matrices of two shapes, ``[rows, features]`` and ``[features, outputs]``, may be a part of one.

    Args:
        fits: as of `HyperConnections`.
    """
    return any(_sizes(rows, layer, fits))


def _sizes(rows: Sequence[int], layer: Sequence[int], fits: Callable[[int, int, int], Any]) -> list[tuple[int, bool]]:
    """The numbers of streams that a product may be of, and whether it is the head's then."""
    features, outputs = layer
    sizes = [(hc, False) for hc in range(1, outputs) if hc * (2 + hc) == outputs] + [(outputs, True)]
    return [(hc, head) for hc, head in sizes if hc and features % hc == 0 and fits(rows[0], hc, features // hc)]


def _may_be(node: Node, module: GraphModule, family: HyperConnections) -> bool:
    if node.op != "call_function" or node.target is not _MM:
        return False
    shapes = [value.shape for one in node.all_input_nodes if (value := value_of(one, module)) is not None]
    return len(shapes) == 2 and may_be_connection(shapes[0], shapes[1], family.fits)


class Connection(NamedTuple):
    """What computes a block's input from the streams.

    Attributes:
        streams, layer: their terms; the linear layer's are ``fn``, ``base``, ``scale``.
        numbers: what is added to the mean square and to sums; then, but for the head's, the number of iterations.
        results: the terms of what the family's function returns.
    """

    streams: Term
    layer: tuple[Term, Term, Term]
    numbers: tuple[float, ...]
    results: list[Term]

    @property
    def is_head(self) -> bool:
        """Whether it is what comes behind the last block."""
        return len(self.results) == 1


class Spread(NamedTuple):
    """What computes the streams behind a block: the terms of its output, and of the streams before and behind it."""

    out: Term
    streams: Term
    result: Term


class _Finder:
    """The hyper-connections of a graph.

    Attributes:
        connections: in the order of the graph, each with what comes behind its block, if that was found.
    """

    def __init__(self, module: GraphModule, family: HyperConnections) -> None:
        self._module, self._family = module, family
        self._traced: dict[Any, GraphModule] = {}
        self.terms = Terms(module)
        self._known = list(self.terms.nodes)
        connections = [one for term in self._known if term.op is _MM for one in self._connections(term)]
        sums = [term for term in self._known if term.op is _ADD and len(term.terms) == 2]
        self.connections = [(one, None if one.is_head else self._spread(one, sums)) for one in connections]

    def _connections(self, product: Term) -> Iterator[Connection]:
        """The one that a product with a linear layer is part of, if any."""
        rows, layer = (term.shape for term in product.terms)
        for hc, head in _sizes(rows, layer, self._family.fits):
            for made in self._candidates(product, hc, head):
                function = self._family.head if head else self._family.pre
                results = self._results(function, (made.streams, *made.layer), made.numbers)
                if self.terms.nodes.get(results[0]) and all(map(self._is_there, (made.streams, *made.layer))):
                    yield made._replace(results=results)
                    return

    def _candidates(self, product: Term, hc: int, head: bool) -> Iterator[Connection]:
        """What a product may be part of, by what is around it."""
        features = product.terms[0].shape[1]
        normed, weight = (_source(term, "reshape", "permute", "cast") for term in product.terms)
        norms = [term for term in normed.terms if term.op is _RSQRT] if normed.op is _MUL else []
        around = self._reached([product], (*_ARRANGED, _MUL, _ADD))
        beside = [_source(part, *_ARRANGED, "cast") for term in around for part in term.terms if part not in around]
        counts = 1 if head else 3
        bases = [one for one in dict.fromkeys(beside) if one.shape == (product.shape[1],)]
        scales = [one for one in dict.fromkeys(beside) if one.shape == (counts,) and one not in bases[:1]]
        added = [user.numbers[0] for user in self._users(around, _SIGMOID, _ADD) if user.numbers]
        norm_eps = [number for norm in norms for number in norm.terms[0].numbers]
        if not (norms and bases and added and norm_eps) or (head and len(bases) + len(scales) < 2):
            return
        if weight.shape != (product.shape[1], features):
            return  # a linear layer that lies otherwise
        iterations = () if head else (self._iterations(around),)
        for streams in self._streams(normed, hc, features // hc):
            for base in bases:
                for scale in scales or bases:
                    layer = (weight, base, scale)
                    if self._family.dtypes.issuperset(one.dtype for one in (streams, *layer)):
                        yield Connection(streams, layer, (norm_eps[0], added[0], *iterations), [])

    def _streams(self, normed: Term, hc: int, width: int) -> list[Term]:
        """The streams that are normed together, as ``[..., H, D]``."""
        flat = [term for term in normed.terms if term.op is not _RSQRT]
        flat += [term.terms[0] for term in flat if term.op == "cast"]
        alike = [term for term in self._known if term.shape[-2:] == (hc, width)]
        pairs = ((term, one) for term in alike for one in flat if term.size == one.size)
        return [term for term, one in pairs if self.terms.reshape(term, one.shape) is one]

    def _reached(self, start: Iterable[Term], through: Sequence[Any]) -> dict[Term, None]:
        """The terms that are made of some by operators of certain kinds alone."""
        found, pending = dict.fromkeys(start), list(start)
        while pending:
            for user in self.terms.users[pending.pop()]:
                if user.op in through and user not in found:
                    found[user] = None
                    pending.append(user)
        return found

    def _users(self, terms: Iterable[Term], *ops: Any) -> list[Term]:
        """What a chain of operators makes of any of some terms."""
        found = list(terms)
        for op in ops:
            found = [user for term in found for user in self.terms.users[term] if user.op is op]
        return found

    def _iterations(self, around: Iterable[Term]) -> int:
        """Each has two divisions, with that of the softmax; where there are other ones, nothing has to be made."""
        begin = self._users(around, _AMAX)
        return max(sum(term.op is _DIV for term in self._reached(begin, _NORMALISING)) // 2, 1)

    def _spread(self, connection: Connection, sums: Sequence[Term]) -> Spread | None:
        """What computes the streams behind the block of a connection."""
        _, post, comb = connection.results
        for total in sums:
            for spread, mixed in (total.terms, total.terms[::-1]):
                product = _source(mixed, "reshape")
                if spread.op is not _MUL or product.op is not _BMM or len(spread.terms) != 2:
                    continue
                outs = [_source(term, "reshape") for term in spread.terms if _source(term, "reshape", "cast") is not post]
                mixing = _source(product.terms[0], "reshape", "permute", "cast", _EXPAND)
                if mixing is comb and len(outs) == 1:
                    streams = _source(product.terms[1], "reshape", _EXPAND)
                    made = self._spread_of(outs[0], streams, post, comb, total)
                    if made is not None:
                        return made
        return None

    def _spread_of(self, out: Term, streams: Term, post: Term, comb: Term, total: Term) -> Spread | None:
        """What computes ``total``, if it does so of these as the family's function does."""
        shape = total.shape
        if len(shape) < 2 or streams.size != total.size or out.size * shape[-2] != total.size:
            return None
        out, streams = self.terms.reshape(out, (*shape[:-2], shape[-1])), self.terms.reshape(streams, shape)
        if not all(self._is_there(term) for term in (out, streams)) or post.shape != shape[:-1]:
            return None
        if streams.dtype not in self._family.dtypes or out.dtype != streams.dtype:
            return None
        made = self._results(self._family.post, (out, streams, post, comb), ())
        return Spread(out, streams, total) if made == [total] else None

    def _is_there(self, term: Term) -> bool:
        """Whether a node computes a term, which nothing overwrites."""
        return bool(self.terms.nodes.get(term))

    def _results(self, function: Callable[..., Any], given: Sequence[Term], numbers: tuple[float, ...]) -> list[Term]:
        """The terms of what a function returns."""
        key = (function, tuple((term.shape, term.dtype) for term in given), numbers)
        if key not in self._traced:
            inputs = [torch.empty(term.shape, dtype=term.dtype, device="meta") for term in given]
            with torch.no_grad():
                self._traced[key] = make_fx(lambda *tensors: function(*tensors, *numbers))(*inputs)
        return self.terms.of(self._traced[key], given)


def _is_contiguous(node: Node) -> bool:
    """Whether a node gives what an operator of this project does: what follows may depend on strides."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_contiguous()


def _source(term: Term, *ops: Any) -> Term:
    """What a term was before operators of some kinds."""
    while term.op in ops:
        term = term.terms[0]
    return term


class _Writer:
    """Puts operators in the place of what was found."""

    def __init__(self, module: GraphModule, family: HyperConnections, found: _Finder) -> None:
        self._module, self._graph, self._family = module, module.graph, family
        self._terms = found.terms
        self._connections = found.connections
        self._places = {node: index for index, node in enumerate(module.graph.nodes)}
        self._made: dict[Term, Node] = {}
        self._changes: list[tuple[str, str]] = []

    def changes(self) -> list[tuple[str, str]]:
        """Rewrite the graph and say what changed."""
        spreads = {spread.result: (one, spread) for one, spread in self._connections if spread is not None}
        joined = [one for one, _ in self._connections if not one.is_head and one.streams in spreads and self._is_given(one)]
        begun = [one for one, _ in self._connections if one not in joined]
        for one in begun:
            operators = (self._family.pre_operator, self._family.head_operator)
            self._replace(operators[one.is_head], (), one, one.results)
        for one, spread in ((one, spread) for one, spread in self._connections if spread is not None):
            following = next((other for other in joined if other.streams is spread.result), None)
            behind = (spread.out, spread.streams, *one.results[1:])
            if following is None:
                self._replace(self._family.post_operator, behind, None, [spread.result])
            else:
                results = [spread.result, *following.results]
                self._replace(self._family.post_pre_operator, behind, following, results)
        return self._changes

    def _is_given(self, connection: Connection) -> bool:
        """Whether a linear layer is there before anything of the graph is."""
        return all(term.op == "leaf" for term in connection.layer)

    def _replace(self, target: Any, behind: Sequence[Term], connection: Connection | None, results: Sequence[Term]) -> None:
        """Put an operator before the first node that computes one of its results, if all that it is given is there."""
        nodes = [self._terms.nodes[term][0] if self._terms.nodes.get(term) else None for term in results]
        old = [node for node in nodes if node is not None]
        first = min(old, key=self._places.__getitem__)
        given = [self._node(term) for term in (*behind, *([connection.streams] if connection and not behind else []))]
        layer = connection.layer if connection is not None else ()
        needed = [*given, *(node for node in map(self._node, layer) if node.op != "get_attr")]
        there = all(self._places.get(node, -1) < self._places[first] for node in needed)
        if not there or not all(_is_contiguous(node) for node in old):
            return
        with self._graph.inserting_before(first):
            numbers = connection.numbers if connection is not None else ()
            call = emit(self._graph, target, (*given, *map(self._held, layer), *numbers))
            parts = range(len(results)) if len(results) > 1 else ()
            made = [emit(self._graph, operator.getitem, (call, index)) for index in parts] or [call]
        self._changes.append(("; ".join(node.format_node() or str(node) for node in old), call.format_node() or str(call)))
        for term, node, new in zip(results, nodes, made, strict=True):
            self._made[term] = new
            if node is not None:
                new.meta = {**node.meta, **new.meta}
                node.replace_all_uses_with(new)

    def _node(self, term: Term) -> Node:
        if term in self._made:
            return self._made[term]
        return self._terms.nodes[term][0]

    def _held(self, term: Term) -> Node:
        """A weight, read where it is needed."""
        node = self._node(term)
        if node.op != "get_attr":
            return node
        again = self._graph.get_attr(str(node.target))
        again.meta = {"val": value_of(node, self._module), **node.meta}
        return again
