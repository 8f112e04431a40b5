"""`passes.routing`: golden graphs of hits and misses, every spelling in every kind of graph, weights prepared once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import passes

G, N, K = 2, 6, 8


@torch.library.custom_op("routing_tests::project", mutates_args=())
def project(o: Tensor, weight: Tensor, factor: float = 1.0) -> Tensor:
    """``o [M, G, K]``, ``weight [G, N, K]``."""
    return torch.einsum("mgk,gnk->mgn", o, weight * factor).contiguous()


@project.register_fake
def _(o: Tensor, weight: Tensor, factor: float = 1.0) -> Tensor:
    assert o.dim() == weight.dim() == 3 and o.shape[1:] == (weight.shape[0], weight.shape[2])
    return o.new_empty(o.shape[0], weight.shape[0], weight.shape[1])


class Target(NamedTuple):
    operator: Any
    tensors: tuple[Tensor, ...]
    constants: tuple[Any, ...] = ()


class Table:
    """Routes everything, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], str, int | None]] = []

    def __call__(self, weight: Tensor, name: str, tokens: int | None) -> Target:
        self.asked.append((tuple(weight.shape), name, tokens))
        return Target(torch.ops.routing_tests.project.default, (weight.contiguous(),), (1.0,))


class Model(nn.Module):
    """A weight and a body."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (G * N, K)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.weight, x)


def printed(module: GraphModule) -> list[str]:
    """Every node but the inputs: what it is called, what it does and with what."""
    lines = []
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            target = node.target if isinstance(node.target, str) else node._pretty_print_target(node.target)
            arguments = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
            lines.append(f"{node.name} = {target.replace('torch.ops.', '')}({', '.join(arguments)})")
    return lines


def routed(module: GraphModule, **settings: Any) -> list[str]:
    """The graph after routing; it is checked to compute what it did."""
    passes.routing(module, Table(), **settings)
    return printed(module)


def einsum(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("sgd,grd->sgr", x, w.view(G, N, K))


def einsum_of_transposes(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("dgr,...gd->g...r", w.view(G, N, K).permute(2, 0, 1), x)


def weight_first(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("grd,sgd->grs", w.view(G, N, K), x)


def bmm_of_transposes(w: Tensor, x: Tensor) -> Tensor:
    lead = x.shape[:-2]
    y = torch.bmm(x.reshape(-1, G, K).transpose(0, 1), w.view(G, -1, K).transpose(1, 2)).transpose(0, 1)
    return y.reshape(*lead, G, -1)


def broadcast_over_rows(w: Tensor, x: Tensor) -> Tensor:
    return (x.unsqueeze(-2) @ w.view(G, N, K).mT).squeeze(-2)


def loop_and_stack(w: Tensor, x: Tensor) -> Tensor:
    return torch.stack([F.linear(x[..., g, :], w.view(G, N, K)[g]) for g in range(G)], -2)


def loop_and_cat(w: Tensor, x: Tensor) -> Tensor:
    return torch.cat([x[..., g * K : (g + 1) * K] @ w[g * N : (g + 1) * N].t() for g in range(G)], dim=-1)


def loop_over_parts(w: Tensor, x: Tensor) -> Tensor:
    return torch.stack([F.linear(part, weight) for part, weight in zip(x.unbind(-2), w.chunk(G), strict=True)], 0)


FLAT = (3, 5, G * K)
HITS: dict[Callable[..., Tensor], tuple[int, ...]] = {  # body -> shape of its input
    einsum: (3, G, K),
    einsum_of_transposes: (3, 5, G, K),
    weight_first: (3, G, K),
    bmm_of_transposes: (3, 5, G, K),
    broadcast_over_rows: (3, G, K),
    loop_and_stack: (3, 5, G, K),
    loop_and_cat: FLAT,
    loop_over_parts: (3, 5, G, K),
}
hits = pytest.mark.parametrize("body", HITS, ids=lambda body: body.__name__)


def wrong_contraction(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("sgd,grd->sr", x, w.view(G, N, K))


def no_groups(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("sgd,hrd->sghr", x, w.view(G, N, K))


def sum_over_columns(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("sgd,grd->sgd", x, w.view(G, N, K))


def a_bias(w: Tensor, x: Tensor) -> Tensor:
    return torch.cat([F.linear(x[:, g], w.view(G, N, K)[g], w[:N, 0]) for g in range(G)], -1)


def a_bias_in_the_product(w: Tensor, x: Tensor) -> Tensor:
    return torch.baddbmm(w.view(G, 1, -1)[:, :, :N], x.transpose(0, 1), w.view(G, N, K).mT)


def one_activation_for_all(w: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x[:, :1].transpose(0, 1).expand(G, -1, -1), w.view(G, N, K).mT)


def one_weight_for_all(w: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), w[:N].t().expand(G, K, N))


def one_part_for_all(w: Tensor, x: Tensor) -> Tensor:
    return torch.stack([F.linear(x[:, 0], w.view(G, N, K)[g]) for g in range(G)], 1)


def a_part_twice(w: Tensor, x: Tensor) -> Tensor:
    return torch.stack([F.linear(x[:, g % G], w.view(G, N, K)[g % G]) for g in range(G + 1)], 1)


def half_of_the_features(w: Tensor, x: Tensor) -> Tensor:
    return torch.stack([F.linear(x[:, g, : K // 2], w.view(G, N, K)[g, :, : K // 2]) for g in range(G)], 1)


def no_weight(w: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), x.permute(1, 2, 0)) * w.sum()


def a_weight_that_is_computed(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("sgd,grd->sgr", x, w.view(G, N, K) * x.sum())


MISSES = [
    *(wrong_contraction, no_groups, sum_over_columns, a_bias, a_bias_in_the_product, one_activation_for_all, one_weight_for_all),
    *(one_part_for_all, a_part_twice, half_of_the_features, no_weight, a_weight_that_is_computed),
]


def by_functions(model: Model, x: Tensor) -> tuple[GraphModule, dict[str, Any]]:
    return passes.trace_with_inputs(model, (x,)), {"inputs": (x,)}


def by_make_fx(model: Model, x: Tensor) -> tuple[GraphModule, dict[str, Any]]:
    return make_fx(model)(x), {}


def by_symbolic_make_fx(model: Model, x: Tensor) -> tuple[GraphModule, dict[str, Any]]:
    return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x), {}


def by_export(model: Model, x: Tensor) -> tuple[GraphModule, dict[str, Any]]:
    return torch.export.export(model, (x,)).module(), {}


def by_decomposed_export(model: Model, x: Tensor) -> tuple[GraphModule, dict[str, Any]]:
    return torch.export.export(model, (x,)).run_decompositions().module(), {}


LEVELS = [by_functions, by_make_fx, by_symbolic_make_fx, by_export, by_decomposed_export]
levels = pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.__name__)


@hits
@levels
def test_every_spelling_in_every_graph(body: Any, level: Any) -> None:
    if level is by_symbolic_make_fx and body in (loop_and_stack, loop_and_cat):
        pytest.skip("every size is a symbol, so that nothing says that the loop covers all groups")
    model, x, table = Model(body), torch.randn(HITS[body]), Table()
    expected = model(x)
    module, given = level(model, x)
    changes = passes.routing(module, table, **given)
    assert len(changes) == 1 and "routing_tests.project" in changes[0][1]
    assert [asked[0] for asked in table.asked] == [(G, N, K)]
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert not list(module.parameters()) and [tuple(b.shape) for b in module.buffers()] == [(G, N, K)]
    free = level in (by_functions, by_symbolic_make_fx)
    assert table.asked[0][2] == (None if free else x.numel() // (G * K))
    if free:
        features = 1 if body is loop_and_cat else 2
        more = torch.randn(*(size + 4 for size in x.shape[:-features]), *x.shape[-features:])
        torch.testing.assert_close(module(more), model(more), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("body", MISSES, ids=lambda body: body.__name__)
@levels
def test_near_misses_stay_untouched(body: Any, level: Any) -> None:
    if level is by_decomposed_export and body is a_bias_in_the_product:
        pytest.skip("baddbmm is decomposed to a product and a sum, and the product is a grouped projection")
    module, given = level(Model(body), torch.randn(3, G, K))
    nodes, code = list(module.graph.nodes), module.code
    assert passes.routing(module, Table(), **given) == []
    assert list(module.graph.nodes) == nodes and module.code == code and not list(module.buffers())


def test_golden_functions() -> None:
    x = torch.randn(3, 5, G, K)
    module = passes.trace_with_inputs(Model(bmm_of_transposes), (x,))
    assert printed(module) == [
        "getattr_1 = builtins.getattr(x, shape)",
        "getitem = operator.getitem(getattr_1, slice(None, -2, None))",
        "reshape = reshape(x, -1, 2, 8)",
        "transpose = transpose(reshape, 0, 1)",
        "view = view(weight, 2, -1, 8)",
        "transpose_1 = transpose(view, 1, 2)",
        "bmm = torch.bmm(transpose, transpose_1)",
        "transpose_2 = transpose(bmm, 0, 1)",
        "getitem_1 = operator.getitem(getitem, 0)",
        "getitem_2 = operator.getitem(getitem, 1)",
        "reshape_1 = reshape(transpose_2, getitem_1, getitem_2, 2, -1)",
    ]
    assert routed(module, inputs=(x,)) == [
        "reshape_2 = reshape(x, -1, 2, 8)",
        "project_default = routing_tests.project.default(reshape_2, _routed_weight_0, 1.0)",
        "size = size(x, 0)",
        "size_1 = size(x, 1)",
        "reshape_3 = reshape(project_default, size, size_1, 2, 6)",
    ]


def test_golden_operators() -> None:
    module = make_fx(Model(loop_and_cat))(torch.randn(FLAT))
    assert routed(module) == [
        "reshape_default = aten.reshape.default(arg0_1, [15, 2, 8])",
        "project_default = routing_tests.project.default(reshape_default, _routed_weight_0, 1.0)",
        "reshape_default_1 = aten.reshape.default(project_default, [3, 5, 12])",
    ]


def test_golden_without_a_single_copy() -> None:
    x = torch.randn(3, G, K)
    assert routed(passes.trace_with_inputs(Model(weight_first), (x,)), inputs=(x,)) == [
        "project_default = routing_tests.project.default(x, _routed_weight_0, 1.0)",
        "permute = permute(project_default, 1, 2, 0)",
    ]


def test_golden_symbolic_sizes() -> None:
    x = torch.randn(3, 5, G, K)
    module = make_fx(Model(bmm_of_transposes), tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    assert routed(module) == [
        "reshape_default = aten.reshape.default(arg0_1, [-1, 2, 8])",
        "project_default = routing_tests.project.default(reshape_default, _routed_weight_0, 1.0)",
        "sym_size_int_5 = aten.sym_size.int(arg0_1, 0)",
        "sym_size_int_6 = aten.sym_size.int(arg0_1, 1)",
        "reshape_default_1 = aten.reshape.default(project_default, [sym_size_int_5, sym_size_int_6, 2, 6])",
    ]
    assert all("val" in node.meta for node in module.graph.nodes if node.op in ("call_function", "get_attr"))


def test_golden_near_miss() -> None:
    x = torch.randn(3, G, K)
    assert routed(passes.trace_with_inputs(Model(no_groups), (x,)), inputs=(x,)) == [
        "view = view(weight, 2, 6, 8)",
        "einsum = torch.functional.einsum(sgd,hrd->sghr, x, view)",
    ]


class Compiled:
    """A backend that routes, at the level of functions or after AOTAutograd."""

    def __init__(self, aot: bool) -> None:
        self.aot, self.table, self.changes = aot, Table(), list[tuple[str, str]]()

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if self.aot:  # its inputs are the same, as fake tensors
            return aot_autograd(fw_compiler=lambda graph, _: self.route(graph, inputs))(module, inputs)
        return self.route(module, inputs)

    def route(self, module: GraphModule, inputs: list[Any]) -> GraphModule:
        nodes = module.graph.find_nodes(op="placeholder")
        weights = {n.name: x for n, x in zip(nodes, inputs, strict=True) if isinstance(x, nn.Parameter)}
        self.changes += passes.routing(module, self.table, constants=weights)
        return module


@hits
@pytest.mark.parametrize("aot", [False, True], ids=["functions", "operators"])
def test_every_spelling_in_what_dynamo_produces(body: Any, aot: bool) -> None:
    model, x, backend = Model(body), torch.randn(HITS[body]), Compiled(aot)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(backend.changes) == 1 and backend.table.asked == [((G, N, K), backend.table.asked[0][1], x.numel() // (G * K))]


def test_dynamic_rows_of_dynamo() -> None:
    model, backend = Model(bmm_of_transposes), Compiled(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for shape in ((3, 5), (7, 4)):
            x = torch.randn(*shape, G, K)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert [asked[2] for asked in backend.table.asked] == [None]


class Linears(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(K, N, bias=bias) for _ in range(G))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x[:, g]) for g, linear in enumerate(self.projections)], -1)


@pytest.mark.parametrize(
    "trace", [torch.fx.symbolic_trace, lambda model: passes.trace_with_inputs(model, (torch.randn(3, G, K),))]
)
def test_a_loop_over_modules(trace: Any) -> None:
    model, x = Linears(), torch.randn(3, G, K)
    module = trace(model)
    expected = model(x)
    assert len(passes.routing(module, Table(), inputs=(x,))) == 1
    torch.testing.assert_close(module(x), expected)
    assert not list(module.parameters()) and len(list(model.parameters())) == G
    assert passes.routing(trace(Linears(bias=True)), Table(), inputs=(x,)) == []


def test_a_weight_used_twice_is_prepared_once() -> None:
    def twice(w: Tensor, x: Tensor) -> Tensor:
        return einsum(w, x) + einsum(w, x.flip(0))

    model, x, table = Model(twice), torch.randn(3, G, K), Table()
    module = passes.trace_with_inputs(model, (x,))
    assert len(passes.routing(module, table, inputs=(x,))) == 2
    assert len(table.asked) == 1 and len(list(module.buffers())) == 1 and not list(module.parameters())
    torch.testing.assert_close(module(x), model(x))


def test_a_chain_of_projections() -> None:
    def chain(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.einsum("sgd,gdr->sgr", x, w.view(G, K, K))
        return x

    model, x = Model(chain, (G, K, K)), torch.randn(3, G, K)
    module = passes.trace_with_inputs(model, (x,))
    assert len(passes.routing(module, Table(), inputs=(x,))) == 3
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-4)


def test_a_weight_that_something_else_reads_is_kept() -> None:
    def also(w: Tensor, x: Tensor) -> Tensor:
        return einsum(w, x) * w.sum()

    x = torch.randn(3, G, K)
    module = passes.trace_with_inputs(Model(also), (x,))
    assert len(passes.routing(module, Table(), inputs=(x,))) == 1
    assert [name for name, _ in module.named_parameters()] == ["weight"]


def test_a_buffer_is_no_weight_unless_it_is_given() -> None:
    x, cache = torch.randn(3, G, K), torch.randn(G * N, K)
    for constants, changes in ((None, 0), ({"weight": cache}, 1)):
        model = Model(einsum)
        del model.weight
        model.register_buffer("weight", cache)
        module = passes.trace_with_inputs(model, (x,))
        assert len(passes.routing(module, Table(), inputs=(x,), constants=constants)) == changes
        torch.testing.assert_close(module(x), einsum(cache, x))


def written_activation(w: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    first = F.linear(x[:, 0], w.view(G, N, K)[0])
    x.mul_(2)
    return torch.stack([first, F.linear(x[:, 1], w.view(G, N, K)[1])], 1)


def written_weight(w: Tensor, x: Tensor) -> Tensor:
    w.view(-1).mul_(2)
    return einsum(w, x)


def written_copy(w: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    parts = x.unbind(1)
    x.mul_(2)
    return torch.stack([F.linear(part, w.view(G, N, K)[g]) for g, part in enumerate(parts)], 1)


def written_result(w: Tensor, x: Tensor) -> Tensor:
    parts = [F.linear(x[:, g], w.view(G, N, K)[g]) for g in range(G)]
    parts[0].view(-1).mul_(2)
    return torch.stack(parts, 1)


WRITING = [written_activation, written_weight, written_result]


@pytest.mark.parametrize("body", WRITING, ids=lambda body: body.__name__)
def test_what_is_written_in_between_is_left_alone(body: Any) -> None:
    x = torch.randn(3, G, K)
    with torch.no_grad():
        assert passes.routing(passes.trace_with_inputs(Model(body), (x,)), Table(), inputs=(x,)) == []
        assert passes.routing(make_fx(Model(body))(x), Table()) == []


def test_a_write_to_the_copy_is_seen_by_its_views() -> None:
    x = torch.randn(3, G, K)
    module = make_fx(Model(written_copy))(x)
    expected = module(x)
    passes.routing(module, Table())
    torch.testing.assert_close(module(x), expected)


def test_a_copy_is_seen_through_only_if_nothing_writes_after_it() -> None:
    def body(w: Tensor, x: Tensor) -> Tensor:
        copied = x.clone()
        x.mul_(2)
        return einsum(w, copied)

    module, x = make_fx(Model(body))(torch.randn(3, G, K)), torch.randn(3, G, K)
    expected = einsum(module._param_constant0, x)
    assert any("project.default(clone," in line for line in routed(module))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("level", [by_functions, by_make_fx])
def test_a_cast_of_the_weight_is_computed_once(level: Any) -> None:
    def body(w: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("sgd,grd->sgr", x.bfloat16(), w.to(torch.bfloat16).view(G, N, K))

    module, given_ = level(Model(body), torch.randn(3, G, K))
    assert len(passes.routing(module, Table(), **given_)) == 1
    assert [buffer.dtype for buffer in module.buffers()] == [torch.bfloat16] and not list(module.parameters())


def test_a_table_may_decline() -> None:
    x = torch.randn(3, G, K)
    module = passes.trace_with_inputs(Model(einsum), (x,))
    before = printed(module)
    assert passes.routing(module, lambda weight, name, tokens: None, inputs=(x,)) == [] and printed(module) == before


def test_rows_of_one_example_are_no_dimension_of_size_one() -> None:
    x = torch.randn(1, 1, G, K)
    module, model = passes.trace_with_inputs(Model(bmm_of_transposes), (x,)), Model(bmm_of_transposes)
    assert len(passes.routing(module, Table(), inputs=(x,))) == 1
    for shape in ((1, 1), (4, 1), (3, 5)):
        torch.testing.assert_close(module(o := torch.randn(*shape, G, K)), model(o), rtol=1e-5, atol=1e-5)


def test_in_the_pipeline() -> None:
    module = make_fx(Model(einsum))(torch.randn(3, G, K))
    (change,) = passes.run(module, [passes.hoist_constants, functools.partial(passes.routing, routes=Table())])
    assert change.by == "routing" and "aten.bmm" in change.before and "routing_tests.project" in change.after


def test_parts_that_change_in_number_are_not_frozen() -> None:
    def body(w: Tensor, x: Tensor) -> Tensor:
        return torch.cat([einsum(w, part) for part in x.split(2)])

    module, model = passes.trace_with_inputs(Model(body), (torch.randn(4, G, K),)), Model(body)
    torch.testing.assert_close(module(o := torch.randn(3, G, K)), model(o))
    with pytest.raises(AssertionError, match="2 parts"):
        module(torch.randn(6, G, K))


LETTERS = "mgnk"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_permutation_of_the_einsum(data: st.DataObject) -> None:
    """Any order of dimensions, any of them split in two, operands either way round."""
    sizes = (
        {"m": 5, "g": 2, "n": 6, "k": 8}
        | ({"a": 3} if data.draw(st.booleans()) else {})
        | ({"h": 3} if data.draw(st.booleans()) else {})
    )
    extra = {"a": "m", "h": "g"}
    part = {label: extra.get(label, label) for label in sizes}
    o, w, y = (
        "".join(data.draw(st.permutations([label for label in sizes if part[label] in parts]))) for parts in ("mgk", "gnk", "mgn")
    )
    terms = (o, w) if data.draw(st.booleans()) else (w, o)
    equation = f"{terms[0]},{terms[1]}->{y}"

    def body(weight: Tensor, x: Tensor) -> Tensor:
        return torch.einsum(equation, *((x, weight) if terms[0] == o else (weight, x)))

    model = Model(body, tuple(sizes[label] for label in w))
    x = torch.randn([sizes[label] for label in o])
    for module, given_ in ((make_fx(model)(x), {}), (passes.trace_with_inputs(model, (x,)), {"inputs": (x,)})):
        table = Table()
        passes.routing(module, table, **given_)
        assert [asked[0] for asked in table.asked] == [(2 * sizes.get("h", 1), 6, 8)]
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)
