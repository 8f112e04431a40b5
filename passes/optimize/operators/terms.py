"""What the nodes of a graph compute, as terms: two nodes with one term have the same value, however their graph is spelled.

A term is an operator over terms. Those that only arrange elements have one spelling: ``view``, ``reshape`` and ``unsqueeze`` are
``reshape``, which goes to its source through others of its kind; ``t`` and ``transpose`` are ``permute``; parts of ``split`` and
``unbind`` are ``slice`` and ``select``; a copy is its source; sums and products have no first operand. A softmax is made of its
parts, as compilers write it. So what a function means can be looked for in a graph: traced on its own, its terms are those of
the nodes that compute it.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from passes.core.aliasing import Aliases, parent_of, written
from passes.core.schema import is_mutable, returns_view

aten = torch.ops.aten
Shape = tuple[int, ...]
_EXACT = 2**53
"""Whole numbers below this are the same as floats."""


class Term:
    """A value. Equal ones are one object.

    Attributes:
        op: an operator, or a word for what arranges elements; ``"leaf"`` for what a graph is given, ``"memory"`` for memory that
            it writes, at one time, and ``"node"`` for what nothing is known of.
        args: of terms, numbers and others.
        shape, dtype: of the value.
    """

    __slots__ = ("args", "dtype", "op", "shape")

    def __init__(self, op: Any, args: tuple[Any, ...], shape: Shape, dtype: torch.dtype) -> None:
        self.op, self.args, self.shape, self.dtype = op, args, shape, dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def terms(self) -> list[Term]:
        """The terms among its arguments."""
        return [one for one in self.args if isinstance(one, Term)]

    @property
    def numbers(self) -> list[float]:
        """The numbers among its arguments."""
        return [one for one in self.args if isinstance(one, float)]


class Terms:
    """The terms of one graph, and of functions that are looked for in it.

    Attributes:
        nodes: the nodes of each term, in the order of the graph, but for those whose memory the graph writes: they have it for a
            time only.
        users: the terms of the graph that each is an argument of.
    """

    def __init__(self, module: GraphModule) -> None:
        self._known: dict[Any, Term] = {}
        self._order: dict[Term, int] = {}
        self.nodes: defaultdict[Term, list[Node]] = defaultdict(list)
        self.users: defaultdict[Term, list[Term]] = defaultdict(list)
        self._of, self._aliases = self._read(module, {}), Aliases.of(module)
        for node, term in self._of.items():
            if not self.is_written(node):
                self.nodes[term].append(node)
        for term in dict.fromkeys(self._of.values()):
            self._use(term)

    def _use(self, term: Term) -> None:
        """Note whose argument each part of a term is, those without a node of their own among them."""
        pending = [term]
        while pending:
            user = pending.pop()
            for part in dict.fromkeys(user.terms):
                if user not in self.users[part]:
                    self.users[part].append(user)
                    pending.append(part)

    def of(self, function: GraphModule, given: Sequence[Term]) -> list[Term]:
        """The results of a traced function of ``given``, a term for each of its inputs."""
        inputs = [node for node in function.graph.nodes if node.op == "placeholder"]
        terms = self._read(function, dict(zip(inputs, given, strict=True)))
        results = function.graph.output_node().args[0]
        listed = results if isinstance(results, (tuple, list)) else [results]
        return [terms[one] for one in listed if isinstance(one, Node)]

    def is_written(self, node: Node) -> bool:
        """Whether the graph writes memory of a node, before or behind it."""
        return self._aliases.is_written(node)

    def term_of(self, node: Node) -> Term | None:
        """What a node of the graph gives, where it stands; None for what is no tensor of a known size."""
        return self._of.get(node)

    def _read(self, module: GraphModule, given: dict[Node, Term]) -> dict[Node, Term]:
        return _Reader(self, module, given).terms()

    def make(self, op: Any, args: tuple[Any, ...], shape: Shape, dtype: torch.dtype) -> Term:
        """The term of an operator as it is written."""
        key = (op, tuple((type(one), one) for one in args), shape, dtype)
        if key not in self._known:
            self._known[key] = Term(op, args, shape, dtype)
            self._order[self._known[key]] = len(self._order)
        return self._known[key]

    def reshape(self, term: Term, shape: Shape) -> Term:
        """The elements of a term in another shape."""
        if term.op == "cast":
            return self.cast(self.reshape(term.args[0], shape), term.dtype)
        source = term.args[0] if term.op == "reshape" else term
        return source if source.shape == shape else self.make("reshape", (source,), shape, term.dtype)

    def permute(self, term: Term, dims: Sequence[int]) -> Term:
        """A term with its dimensions in another order."""
        order = tuple(dim % len(term.shape) for dim in dims)
        shape = tuple(term.shape[dim] for dim in order)
        return term if order == tuple(range(len(order))) else self.make("permute", (term, order), shape, term.dtype)

    def cast(self, term: Term, dtype: torch.dtype) -> Term:
        """A term in another dtype."""
        return term if term.dtype == dtype else self.make("cast", (term,), term.shape, dtype)

    def slice(self, term: Term, dim: int, start: int, end: int) -> Term:
        """The elements of a term from ``start`` to ``end`` along a dimension."""
        dim %= len(term.shape)
        shape = (*term.shape[:dim], end - start, *term.shape[dim + 1 :])
        return term if shape == term.shape else self.make("slice", (term, dim, start, end), shape, term.dtype)

    def select(self, term: Term, dim: int, index: int) -> Term:
        """The elements of a term at one place along a dimension."""
        dim %= len(term.shape)
        shape = (*term.shape[:dim], *term.shape[dim + 1 :])
        return self.make("select", (term, dim, index), shape, term.dtype)

    def symmetric(self, op: Any, args: Sequence[Any], shape: Shape, dtype: torch.dtype) -> Term:
        """A sum or a product."""
        terms = sorted((one for one in args if isinstance(one, Term)), key=self._order.__getitem__)
        return self.make(op, (*terms, *(one for one in args if not isinstance(one, Term))), shape, dtype)


class _Reader:
    """One walk over a graph.

    Attributes:
        writes: how often each memory was written so far.
    """

    def __init__(self, terms: Terms, module: GraphModule, given: dict[Node, Term]) -> None:
        self._terms, self._module = terms, module
        self._aliases = Aliases.of(module)
        self._found = dict(given)
        self.writes: Counter[Any] = Counter()

    def terms(self) -> dict[Node, Term]:
        """The terms of all nodes that are tensors of a known size."""
        for node in self._module.graph.nodes:
            if node not in self._found:
                term = self._term(node)
                if term is not None:
                    self._found[node] = term
            for target in written(node):
                self.writes[self._aliases.root(target)] += 1
        return self._found

    def _term(self, node: Node) -> Term | None:
        value = value_of(node, self._module)
        if value is None:
            return None
        shape, dtype = tuple(value.shape), value.dtype
        if node.op in ("placeholder", "get_attr"):
            return self._terms.make("leaf", (node if node.op == "placeholder" else node.target,), shape, dtype)
        made = self._applied(node, shape, dtype) if is_function(node) else None
        return made if made is not None else self._terms.make("node", (node,), shape, dtype)

    def _applied(self, node: Node, shape: Shape, dtype: torch.dtype) -> Term | None:
        """What a function gives for its arguments as they are now; None where no term tells."""
        if node.target is operator.getitem:
            return _part(self, node)
        args = [self._argument(one) for one in node.args]
        return _RULES.get(node.target, _plain)(self._terms, node, args, shape, dtype)

    def _argument(self, value: Any) -> Any:
        """What a node reads: the term of another one, or of memory as it is now."""
        if isinstance(value, Node):
            return self.read(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and abs(value) < _EXACT else value

    def read(self, node: Node) -> Any:
        """The term of what a node gives, now."""
        term = self._found.get(node)
        if term is None or not self._aliases.is_written(node):
            return term if term is not None else node
        parent = parent_of(node)
        source = self._found.get(parent) if isinstance(parent, Node) else None
        if source is not None and returns_view(node.target):
            seen = self._applied(node, term.shape, term.dtype)
            if seen is not None:
                return seen
        elif source is not None and is_mutable(node.target) and (source.shape, source.dtype) == (term.shape, term.dtype):
            return self.read(parent)  # written in place
        root = self._aliases.root(node)
        return self._terms.make("memory", (node, self.writes[root], root), term.shape, term.dtype)


def value_of(node: Node, module: GraphModule) -> Tensor | None:
    """What a node gives, without data; None for what is no tensor, or has a size that only the device knows."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = module
        for name in str(node.target).split("."):
            value = getattr(value, name)
    if not isinstance(value, Tensor) or not all(type(size) is int for size in value.shape):
        return None
    return value


def is_function(node: Node) -> bool:
    """Whether a node depends on its arguments alone, and writes nothing."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node)
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    return not written(node) and not is_mutable(target) and torch.Tag.nondeterministic_seeded not in target.tags


def _plain(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    """An operator of its arguments as they are."""
    if any(isinstance(one, (list, Node)) and not _is_plain(one) for one in args):
        return None
    if not all(isinstance(one, (str, bool, int, float, type(None))) for one in node.kwargs.values()):
        return None
    named = sorted((name, one) for name, one in node.kwargs.items() if one is not None)
    return terms.make(node.target, (*(tuple(one) if isinstance(one, list) else one for one in args), *named), shape, dtype)


def _is_plain(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, (int, float, bool)) for one in value)


def _part(reader: _Reader, node: Node) -> Term | None:
    """A part of a tensor that was split."""
    split, index = node.args
    assert isinstance(split, Node)
    terms, source = reader._terms, reader.read(split.args[0]) if split.args and isinstance(split.args[0], Node) else None
    if not isinstance(source, Term) or not isinstance(index, int):
        return None
    if split.target is aten.unbind.int:
        return terms.select(source, _argument(split, 1, 0), index)
    if split.target in (aten.split_with_sizes.default, aten.split.Tensor):
        sizes: Any = split.args[1]
        dim = _argument(split, 2, 0)
        length = source.shape[dim]
        each: list[int] = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes] * length
        start = sum(each[:index])
        return terms.slice(source, dim, start, min(start + each[index], length))
    return None


def _argument(node: Node, position: int, default: Any) -> Any:
    name = node.target._schema.arguments[position].name  # type: ignore[union-attr]
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _reshaped(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    return terms.reshape(args[0], shape) if isinstance(args[0], Term) else None


def _expanded(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    same = isinstance(args[0], Term) and args[0].shape == shape
    return args[0] if same else _plain(terms, node, args, shape, dtype)


def _permuted(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    if not isinstance(args[0], Term):
        return None
    order = list(range(len(shape)))
    if node.target is aten.permute.default:
        order = [int(dim) for dim in args[1]]
    elif len(shape) > 1:
        a, b = (0, 1) if node.target is aten.t.default else (int(args[1]), int(args[2]))
        order[a], order[b] = order[b], order[a]
    return terms.permute(args[0], order)


def _copied(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    """A copy, in another dtype perhaps."""
    moved = node.kwargs.get("device") is not None
    return terms.cast(args[0], dtype) if isinstance(args[0], Term) and not moved else None


def _sliced(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    dim, start, step = (_argument(node, place, default) for place, default in ((1, 0), (2, 0), (4, 1)))
    if not isinstance(args[0], Term) or step != 1 or not all(type(one) is int for one in (dim, start or 0)):
        return None
    first = min(max(start or 0, -args[0].shape[dim]) % max(args[0].shape[dim], 1), args[0].shape[dim])
    return terms.slice(args[0], dim, first, first + shape[dim])


def _selected(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    if not isinstance(args[0], Term) or not all(isinstance(one, float) for one in args[1:]):
        return None
    dim, index = int(args[1]), int(args[2])
    return terms.select(args[0], dim, index % args[0].shape[dim])


def _reduced(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    if not isinstance(args[0], Term) or node.kwargs.get("dtype") is not None or args[0].dtype != dtype:
        return None
    given, count = _argument(node, 1, None), len(args[0].shape)
    dims = tuple(sorted(dim % count for dim in given)) if given else tuple(range(count))
    return terms.make(node.target, (args[0], dims, bool(_argument(node, 2, False))), shape, dtype)


def _symmetric(op: Any) -> Callable[..., Term | None]:
    def rule(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
        if node.kwargs or len(args) != 2 or not all(isinstance(one, (Term, float)) for one in args):
            return None
        return terms.symmetric(op, args, shape, dtype)

    return rule


def _softmax(terms: Terms, node: Node, args: list[Any], shape: Shape, dtype: torch.dtype) -> Term | None:
    source = args[0]
    if not isinstance(source, Term) or source.dtype != dtype or dtype != torch.float32 or not shape:
        return None
    dim = (int(args[1]) % len(shape),)
    kept = tuple(1 if place in dim else size for place, size in enumerate(shape))
    largest = terms.make(aten.amax.default, (source, dim, True), kept, dtype)
    powers = terms.make(aten.exp.default, (terms.make(aten.sub.Tensor, (source, largest), shape, dtype),), shape, dtype)
    total = terms.make(aten.sum.dim_IntList, (powers, dim, True), kept, dtype)
    return terms.make(aten.div.Tensor, (powers, total), shape, dtype)


def _for_all(targets: Iterable[Any], rule: Callable[..., Term | None]) -> dict[Any, Callable[..., Term | None]]:
    return dict.fromkeys(targets, rule)


_RULES: dict[Any, Callable[..., Term | None]] = {
    **_for_all((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default), _reshaped),
    **_for_all((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _reshaped),
    **_for_all((aten.permute.default, aten.t.default, aten.transpose.int), _permuted),
    **_for_all((aten.clone.default, aten.alias.default, aten.detach.default, aten._to_copy.default), _copied),
    torch.ops.prims.convert_element_type.default: _copied,
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    **_for_all((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default), _reduced),
    **_for_all((aten.add.Tensor, aten.add.Scalar), _symmetric(aten.add.Tensor)),
    **_for_all((aten.mul.Tensor, aten.mul.Scalar), _symmetric(aten.mul.Tensor)),
    aten._softmax.default: _softmax,
}
