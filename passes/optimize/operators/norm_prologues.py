"""A norm in front of products becomes a part of them: the rows are normed as they are read.

Before::

    %wide : convert_element_type(args = (%hidden, torch.float32))
    ...                                                      # rsqrt of the mean square, or of the variance
    %rows : mul(args = (%gain, %scaled))
    %skinny_linear : skinny_linear(args = (%rows, [%weight, %weight_1]))

After::

    %skinny_linear : skinny_linear(args = (%hidden, [%weight, %weight_1]), kwargs = {norm: rms, gain: %gain, eps: 1e-06})

Only where nothing else wants the normed rows: they would have to be written for it. What was rounded between the norm and its
gain is not any more, as with a compiler that fuses the two.
"""

from __future__ import annotations

import operator as python
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from passes.core.values.fake_values import emit
from passes.optimize.operators.terms import Term, Terms

aten = torch.ops.aten
_ADD, _MUL, _SUB, _RSQRT = aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.rsqrt.default
_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


class _Norm(NamedTuple):
    """A norm over the last dimension, of ``hidden``, in float32."""

    name: str
    hidden: Term
    gain: Term
    shift: Term | None
    eps: float


def norm_prologues(module: GraphModule, *, operator: Any) -> list[tuple[str, str]]:
    """Let ``operator``, which `skinny_products` put into the graph, norm its rows where they are a norm of others.

    Args:
        operator: takes ``norm=``, ``gain=``, ``shift=`` and ``eps=``, see `graphs.ops.skinny.operator`.
    """
    calls = [node for node in module.graph.nodes if node.target is operator and "norm" not in node.kwargs and len(node.args) <= 3]
    if not calls:
        return []
    terms, changes = Terms(module), []
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    wanted = [(call, norm) for call in calls if (norm := _norm_of(call, terms, calls)) is not None]
    for call, norm in wanted:
        given = [_node(term, terms) for term in (norm.hidden, norm.gain, norm.shift)]
        if any(node is not None and order[node] > order[call] for node in given):
            continue
        before = call.format_node() or str(call)
        _put(module, call, norm, given)
        changes.append((before, call.format_node() or str(call)))
    return changes


def _norm_of(call: Node, terms: Terms, calls: list[Node]) -> _Norm | None:
    """The norm that the rows of a call come out of, if nothing but such calls reads them."""
    rows = call.args[0]
    source = rows
    while isinstance(source, Node) and source.target in _VIEWS and source.args:
        source = source.args[0]  # type: ignore[assignment]
    if not isinstance(source, Node) or not _feeds_only(source, calls):
        return None
    term = terms.term_of(source)
    if term is None or not term.shape or term.shape[-1] != rows.meta["val"].shape[-1]:  # type: ignore[union-attr]
        return None
    norm = _rms(term) or _layer(term, terms)
    if norm is None or norm.hidden.dtype != term.dtype or norm.hidden.shape != term.shape:
        return None
    there = [one for one in (norm.hidden, norm.gain, norm.shift) if one is not None]
    if any(one.dtype not in (norm.hidden.dtype, torch.float32) for one in there):
        return None
    return norm if all(terms.nodes.get(one) for one in there) else None


def _feeds_only(node: Node, calls: list[Node]) -> bool:
    """Whether every user of a node is one of ``calls``, which multiplies it, or a view of it for them."""
    for user in node.users:
        if user.target in _VIEWS and user.args[0] is node:
            if not _feeds_only(user, calls):
                return False
        elif user not in calls or user.args[0] is not node or node in user.all_input_nodes[1:]:
            return False
    return True


def _factors(term: Term, width: int) -> tuple[Term, Term] | None:
    """A product's gain of one dimension, and its other factor."""
    if term.op is not _MUL or len(term.terms) != 2:
        return None
    for gain, other in (term.terms, term.terms[::-1]):
        if _narrow(gain).shape == (width,) and other.shape[-1:] == (width,) and len(other.shape) > 1:
            return _narrow(gain), other
    return None


def _narrow(term: Term) -> Term:
    """What a term in float32 was before, if that has fewer digits."""
    narrow = term.op == "cast" and term.dtype == torch.float32 and term.terms[0].dtype in (torch.bfloat16, torch.float16)
    return term.terms[0] if narrow else term


def _rms(term: Term) -> _Norm | None:
    """``gain * round(wide * rsqrt(mean(wide**2) + eps))``, or with the rounding after the gain."""
    late = term.op == "cast"
    found = _factors(term.terms[0] if late else term, term.shape[-1])
    if found is None or (not late and found[1].op != "cast"):
        return None
    gain, scaled = found if late else (found[0], found[1].terms[0])
    if scaled.op is not _MUL or scaled.dtype != torch.float32 or len(scaled.terms) != 2:
        return None
    for wide, root in (scaled.terms, scaled.terms[::-1]):
        mean, eps = _rooted(root)
        if mean is None or wide.op != "cast" or mean.op is not aten.mean.dim:
            continue
        square, dims, kept = mean.args
        squared = square.op is aten.pow.Tensor_Scalar and square.args == (wide, 2.0)
        squared |= square.op is _MUL and square.args == (wide, wide)
        if squared and kept and dims == (len(wide.shape) - 1,):
            return _Norm("rms", wide.terms[0], gain, None, eps)
    return None


def _layer(term: Term, terms: Terms) -> _Norm | None:
    """``(wide - mean) * rsqrt(var + eps) * gain + shift``, as a compiler takes a layer norm apart."""
    if term.op != "cast" or term.terms[0].dtype != torch.float32:
        return None
    total, shift = term.terms[0], None
    if total.op is _ADD and len(total.terms) == 2:
        shifts = [one for one in total.terms if _narrow(one).shape == term.shape[-1:]]
        if len(shifts) != 1 or len(term.shape) < 2:
            return None
        shift = _narrow(shifts[0])
        total = next(one for one in total.terms if one is not shifts[0])
    found = _factors(total, term.shape[-1])
    if found is None or found[1].op is not _MUL or len(found[1].terms) != 2:
        return None
    gain, scaled = found
    for away, root in (scaled.terms, scaled.terms[::-1]):
        variance, eps = _rooted(root)
        if variance is None or away.op is not _SUB or len(away.args) != 2 or away.terms[0].op != "cast":
            continue
        wide, mean = away.args
        if _is_moment(variance, 0, wide, terms) and isinstance(mean, Term) and _is_moment(mean, 1, wide, terms):
            return _Norm("layer", wide.terms[0], gain, shift, eps)
    return None


def _rooted(term: Term) -> tuple[Term | None, float]:
    """What one over the root is taken of, and what is added to it first."""
    inner = term.terms[0] if term.op is _RSQRT else None
    if inner is None or inner.op is not _ADD or len(inner.terms) != 1 or len(inner.numbers) != 1:
        return None, 0.0
    return inner.terms[0], inner.numbers[0]


def _is_moment(term: Term, part: int, wide: Term, terms: Terms) -> bool:
    """Whether a term is the variance (0) or the mean (1) of the last dimension of another, without correction."""
    node = term.args[0] if term.op == "node" else None
    if not isinstance(node, Node) or node.target is not python.getitem or node.args[1] != part:
        return False
    both: Any = node.args[0]
    if both.target is not aten.var_mean.correction or terms.is_written(both.args[0]) or terms.term_of(both.args[0]) is not wide:
        return False
    last = len(wide.shape) - 1
    dims = [dim % len(wide.shape) for dim in (both.args[1] if len(both.args) > 1 else both.kwargs.get("dim")) or []]
    return dims == [last] and both.kwargs.get("correction", 1) == 0 and both.kwargs.get("keepdim", False) is True


def _node(term: Term | None, terms: Terms) -> Node | None:
    return None if term is None else terms.nodes[term][0]


def _put(module: GraphModule, call: Node, norm: _Norm, given: list[Node | None]) -> None:
    hidden, gain, shift = given
    rows: Any = call.args[0]
    assert hidden is not None, "a norm is of something"
    if hidden.meta["val"].shape != rows.meta["val"].shape:
        with module.graph.inserting_before(call):
            hidden = emit(module.graph, aten.reshape.default, (hidden, list(rows.meta["val"].shape)))
    call.args = (hidden, *call.args[1:])
    call.kwargs = {**call.kwargs, "norm": norm.name, "gain": gain, "eps": norm.eps} | (
        {"shift": shift} if shift is not None else {}
    )
