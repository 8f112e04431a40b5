"""Products of two tensors, in one form: the labels of an einsum.

`torch.einsum`, `bmm`, `mm`, `matmul` and `linear` without a bias are the same operation with other labels. A label that an
operand lacks, or has with size 1, is one it is repeated along.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from passes.projections.graph_views import Source

aten = torch.ops.aten
_FUNCTIONS = (
    (torch.einsum, "einsum"),
    (torch.bmm, "bmm"),
    (torch.mm, "mm"),
    (torch.matmul, "matmul"),
    (operator.matmul, "matmul"),
    (torch.nn.functional.linear, "linear"),
    (torch.stack, "stack"),
    (torch.cat, "cat"),
    (torch.concat, "cat"),
    (torch.concatenate, "cat"),
)
_OVERLOADS = tuple(packet.default for packet in (aten.einsum, aten.bmm, aten.mm, aten.matmul, aten.linear, aten.stack, aten.cat))
_METHODS = ("bmm", "mm", "matmul", "__matmul__")
_FIXED = {"bmm": ("gik", "gkj", "gij"), "mm": ("ik", "kj", "ij")}


class Contraction(NamedTuple):
    """``einsum(labels)`` of two nodes."""

    operands: tuple[Source, Source]
    labels: tuple[str, str]
    result: str


def operation(node: Node) -> str:
    """What ``node`` computes, by one name for functions, methods and operators; an empty string for anything else."""
    if node.op == "call_method":
        return str(node.target).strip("_") if node.target in _METHODS else ""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return node.target._opname if node.target in _OVERLOADS else ""
    return next((name for function, name in _FUNCTIONS if function is node.target), "")


def contraction(node: Node, rank: Callable[[Source], int | None], module: GraphModule) -> Contraction | None:
    """The product that ``node`` computes, or None. ``rank`` gives the number of dimensions of a node or parameter."""
    name = operation(node)
    if node.op == "call_module":
        name, operands, equation = "linear", _of_module(node, module), None
    elif name in ("", "stack", "cat"):
        return None
    else:
        operands, equation = _operands(node, name)
    if len(operands) != 2 or not all(isinstance(operand, (Node, str)) for operand in operands):
        return None
    left, right = operands
    ranks = rank(left), rank(right)
    labels = None if ranks[0] is None or ranks[1] is None else _labels(name, equation, (ranks[0], ranks[1]))
    return None if labels is None else Contraction((left, right), labels[:2], labels[2])


def _of_module(node: Node, module: GraphModule) -> list[Any]:
    """Input and weight of a call of an `nn.Linear` without a bias."""
    called = module.get_submodule(str(node.target))
    plain = type(called) is torch.nn.Linear and called.bias is None
    hooked = plain and (called._forward_hooks or called._forward_pre_hooks)
    return [*node.args, *node.kwargs.values(), f"{node.target}.weight"] if plain and not hooked else []


def _operands(node: Node, name: str) -> tuple[list[Any], Any]:
    """The operands, or an empty list if the node takes more than they; and the equation of an einsum."""
    named = dict(node.kwargs)
    equation, *rest = node.args if name == "einsum" and node.args else (None, *node.args)
    operands = list(rest[0]) if name == "einsum" and len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    operands += [named.pop(key) for key in ("input", "self", "tensor", "mat2", "other", "weight") if key in named]
    if name == "linear":
        operands = [*operands, *[named.pop(key) for key in ("bias",) if key in named]]
        operands = operands[:2] if operands[2:] == [None] else operands
    return ([] if named else operands), equation


def _labels(name: str, equation: Any, ranks: tuple[int, int]) -> tuple[str, str, str] | None:
    if name == "einsum":
        return _equation(equation, ranks) if isinstance(equation, str) else None
    if name == "linear":
        lead = string.ascii_uppercase[: ranks[0] - 1]
        return (lead + "k", "jk", lead + "j") if ranks[0] and ranks[1] == 2 else None
    if name in _FIXED:
        return _FIXED[name]
    if min(ranks) < 2:
        return None
    batch = string.ascii_uppercase[: max(ranks) - 2]
    left, right = (batch[len(batch) - (rank - 2) :] for rank in ranks)
    return left + "ik", right + "kj", batch + "ij"


def _equation(equation: str, ranks: Sequence[int]) -> tuple[str, str, str] | None:
    """The labels of an einsum equation, with an ellipsis spelled out and the implicit result of `torch.einsum`."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    if min(hidden) < 0 or max(hidden) > len(spare):
        return None
    lead = "".join(spare[: max(hidden)])
    written = [term.replace("...", lead[len(lead) - count :]) for term, count in zip(terms, hidden, strict=True)]
    if arrow:
        result = result.replace("...", lead)
    else:
        once = [letter for letter in sorted(set(inputs) - set(".,")) if inputs.count(letter) == 1]
        result = lead + "".join(once)
    legal = all(len(set(term)) == len(term) for term in (*written, result))
    fits = all(len(term) == rank for term, rank in zip(written, ranks, strict=True))
    return (written[0], written[1], result) if legal and fits else None


class Role(NamedTuple):
    """What becomes of one digit of a product, and its strides in the two operands.

    ``part`` is ``m`` (rows of the activation), ``g`` (shared by activation, weight and result), ``n`` (columns of the
    weight) or ``k`` (summed over).
    """

    part: str
    size: int
    activation: int
    weight: int


def part_of(activation: int, weight: int, in_result: bool) -> str:
    """The part of a digit with these strides; an empty string where no grouped projection has such a digit."""
    if activation and weight:
        return "g" if in_result else "k"
    if not in_result or not (activation or weight):
        return ""
    return "m" if activation else "n"
