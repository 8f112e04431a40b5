"""Nodes with one term have one value, in random programs with views, copies, casts and writes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from passes.optimize.operators.terms import Term, Terms

Shape = tuple[int, ...]
SHAPES: tuple[Shape, ...] = ((2, 3, 4), (6, 4), (24,), (4, 6), (2, 12), (2, 1, 3, 4))


def _other_shape(x: Tensor, number: int) -> Tensor:
    return x.reshape(SHAPES[number % len(SHAPES)]) if x.numel() == 24 else x.reshape(-1)


def _written(x: Tensor, number: int) -> Tensor:
    x.add_(number)
    return x


def _written_part(x: Tensor, number: int) -> Tensor:
    x.select(-1, 0).mul_(number + 2)
    return x


UNARY: tuple[Callable[[Tensor, int], Tensor], ...] = (
    _other_shape,
    _written,
    _written_part,
    lambda x, n: x.reshape(x.shape),
    lambda x, n: x.unsqueeze(n % (x.dim() + 1)),
    lambda x, n: x.squeeze(),
    lambda x, n: x.transpose(0, -1),
    lambda x, n: x.permute(*range(1, x.dim()), 0),
    lambda x, n: x.clone(),
    lambda x, n: x.bfloat16(),
    lambda x, n: x.float(),
    lambda x, n: x.float().bfloat16().float(),
    lambda x, n: x * n,
    lambda x, n: x + float(n),
    lambda x, n: x.float().softmax(n % x.dim()),
    lambda x, n: x.float().sum(n % x.dim(), keepdim=True),
    lambda x, n: x.float().mean(-1, keepdim=True),
    lambda x, n: x.split(max(x.shape[-1] // 2, 1), -1)[0],
    lambda x, n: x.split([1, x.shape[-1] - 1], -1)[1] if x.shape[-1] > 1 else x,
    lambda x, n: x[..., n % x.shape[-1] :],
    lambda x, n: x.unbind(0)[n % x.shape[0]] if x.dim() > 1 else x,
    lambda x, n: x.select(0, n % x.shape[0]) if x.dim() > 1 else x,
    lambda x, n: x.expand(x.shape),
    lambda x, n: x.detach(),
    lambda x, n: torch.sigmoid(x),
    lambda x, n: x.pow(2),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.add, torch.mul, torch.sub, lambda x, y: y + x, lambda x, y: y * x)
STEPS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, len(UNARY) + len(BINARY) - 1), st.integers(0, 5)), max_size=14)


def program(steps: list[tuple[int, int, int]]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """A function that takes each step on a value it has, and returns all that it made."""

    def run(a: Tensor, b: Tensor) -> list[Tensor]:
        made = [a * 1, b * 1]
        for which, operation, number in steps:
            x = made[which % len(made)]
            if operation < len(UNARY):
                made.append(UNARY[operation](x, number))
                continue
            same = [y for y in made if y.shape == x.shape]
            made.append(BINARY[operation - len(UNARY)](x, same[number % len(same)]))
        return made

    return run


class Values(Interpreter):
    """Runs a graph and keeps what each node gave, as it was then."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = result.clone()
        return result


def values(module: GraphModule, *inputs: Tensor) -> dict[Node, Tensor]:
    run = Values(module)
    run.run(*inputs)
    return run.found


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4), torch.randn(6, 4)


@settings(max_examples=250, deadline=None)
@given(steps=STEPS)
def test_nodes_with_one_term_have_one_value(steps: list[tuple[int, int, int]]) -> None:
    module = make_fx(program(steps), tracing_mode="fake")(*inputs())
    found, terms = values(module, *inputs()), Terms(module)
    for nodes in terms.nodes.values():
        first, *others = nodes
        for other in others:
            assert torch.equal(found[first], found[other]) and found[first].dtype == found[other].dtype, (first, other)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_a_function_has_the_terms_of_a_graph_that_computes_it(steps: list[tuple[int, int, int]]) -> None:
    """Traced twice, with other operators before it, a program without writes has one term for each of its results."""
    pure = [step for step in steps if UNARY[min(step[1], len(UNARY) - 1)] not in (_written, _written_part)]
    function = program(pure)
    module = make_fx(lambda a, b: function(torch.relu(a), torch.sin(b)), tracing_mode="fake")(*inputs())
    terms = Terms(module)
    given_ = [
        terms.nodes[term][0] for term in terms.nodes if term.op in (torch.ops.aten.relu.default, torch.ops.aten.sin.default)
    ]
    assert len(given_) == 2
    made = terms.of(make_fx(function, tracing_mode="fake")(*inputs()), [term_of(terms, node) for node in given_])
    results = module.graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    assert [term_of(terms, node) for node in results if isinstance(node, Node)] == made


def term_of(terms: Terms, node: Node) -> Term:
    term = terms.term_of(node)
    assert term is not None
    return term


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda a: a.softmax(-1), lambda a: (a - a.amax(-1, True)).exp() / (a - a.amax(-1, True)).exp().sum(-1, keepdim=True)),
        (lambda a: a.flatten(1).float() * 2, lambda a: 2.0 * a.view(2, -1)),
        (lambda a: a.unbind(1)[2], lambda a: a[:, 2]),
        (lambda a: a.split(2, -1)[1], lambda a: a[..., 2:4]),
        (lambda a: a.mT, lambda a: a.permute(0, 2, 1)),
    ],
)
def test_other_spellings_are_one_term(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
    module = make_fx(lambda a: (first(a), second(a)), tracing_mode="fake")(inputs()[0])
    terms = Terms(module)
    one, other = module.graph.output_node().args[0]  # type: ignore[misc]
    assert term_of(terms, one) is term_of(terms, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda a: a.sum(-1), lambda a: a.sum(1)),
        (lambda a: a.bfloat16().float(), lambda a: a),
        (lambda a: a - 1, lambda a: 1 - a),
        (lambda a: torch.add(a, a, alpha=2), lambda a: a + a),
        (lambda a: a[:, ::2], lambda a: a[:, :2]),
        (lambda a: a.reshape(6, 4), lambda a: a.transpose(0, 1).reshape(6, 4)),
        (lambda a: a.clone().add_(1), lambda a: a.clone()),
    ],
)
def test_other_values_are_other_terms(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
    module = make_fx(lambda a: (first(a), second(a)), tracing_mode="fake")(inputs()[0])
    terms = Terms(module)
    one, other = module.graph.output_node().args[0]  # type: ignore[misc]
    assert term_of(terms, one) is not term_of(terms, other)  # type: ignore[arg-type]
