"""Golden graphs of `passes.hyper_connections`, other spellings of the same, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import passes
from graphs.compile.compiled_graph import compile_graph
from graphs.ops.mhc.family import FAMILY
from passes.optimize.operators.hyper_connections import hyper_connections
from tests.models.hyper_connections import EPS, HC, Blocks, Connection, streams

REPLACE = partial(hyper_connections, family=FAMILY)


def traced(step: Callable[..., Any], *args: Tensor) -> GraphModule:
    with torch.no_grad():
        return make_fx(lambda *given: step(*given), tracing_mode="fake", _allow_non_fake_inputs=True)(*args)


def operators(module: GraphModule) -> list[str]:
    """The calls of a graph, without parts of results."""
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return [name for name in names if "getitem" not in name]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_with_hyper_connections_are_an_operator_each(dtype: torch.dtype, weights: torch.dtype) -> None:
    model, x = Blocks(weights=weights), streams(dtype=dtype)
    module = traced(model, x)
    changes = passes.run(module, [REPLACE])
    assert operators(module) == [
        "graphs.mhc_pre.default",
        "aten.relu.default",
        "graphs.mhc_post_pre.default",
        "aten.relu.default",
        "graphs.mhc_post.default",
        "graphs.mhc_head.default",
    ]
    assert [change.by for change in changes] == ["hyper_connections"] * 4
    assert "mhc_pre" in changes[0].after and "1e-06, 1e-06, 3" in changes[0].after
    for given in (x, streams(dtype=dtype)):
        assert torch.equal(module(given), model(given))


def test_they_read_the_weights_where_they_are() -> None:
    model, x = Blocks(), streams()
    module = traced(model, x)
    passes.run(module, [REPLACE])
    model.connections[1].fn.mul_(3)
    model.head.scale.neg_()
    assert torch.equal(module(x), model(x))


class Viewed(Connection):
    """The same with other views, as transformers 5.24 has some of them."""

    def normed(self, x: Tensor) -> Tensor:
        flat = x.float().view(*x.shape[:2], -1)
        return torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + EPS) * flat

    def weights(self, mixes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre = torch.sigmoid(self.base[:HC] + self.scale[0] * mixes[..., :HC]) + EPS
        post = torch.sigmoid(mixes[..., HC : 2 * HC] * self.scale[1] + self.base[HC : 2 * HC]) * 2.0
        logits = mixes[..., 2 * HC :].reshape(*mixes.shape[:-1], HC, HC) * self.scale[2] + self.base[2 * HC :].reshape(HC, HC)
        return pre, post, logits.softmax(3) + EPS

    def collapsed(self, pre: Tensor, x: Tensor) -> Tensor:
        return (pre[..., None] * x).sum(-2).to(x.dtype)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_another_spelling_of_the_same_is_found(iterations: int) -> None:
    model, x = Blocks(Viewed, iterations=iterations), streams()
    module = traced(model, x)
    assert len(passes.run(module, [REPLACE])) == 4
    assert torch.equal(module(x), model(x))


class OtherLayer(Connection):
    def layer(self, normed: Tensor) -> Tensor:
        return functional.linear(normed.bfloat16(), self.fn.bfloat16()).float()


class OtherNorm(Connection):
    def normed(self, x: Tensor) -> Tensor:
        flat = x.flatten(start_dim=2).float()
        return flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS).bfloat16().float()


class OtherSum(Connection):
    def normalised(self, comb: Tensor) -> Tensor:
        return super().normalised(comb) / (comb.sum(dim=-1, keepdim=True) + EPS)


class OtherOrder(Connection):
    def normalised(self, comb: Tensor) -> Tensor:
        return super().normalised(comb.mT).mT


class OtherEps(Connection):
    def collapsed(self, pre: Tensor, x: Tensor) -> Tensor:
        return super().collapsed(pre + EPS, x)


class OtherRounding(Connection):
    def collapsed(self, pre: Tensor, x: Tensor) -> Tensor:
        return (pre.unsqueeze(-1).to(x.dtype) * x).sum(dim=2)


class OtherGate(Connection):
    def weights(self, mixes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, comb = super().weights(mixes)
        return pre * 1.5, post, comb


@pytest.mark.parametrize("kind", [OtherLayer, OtherNorm, OtherEps, OtherRounding, OtherGate])
def test_a_connection_that_means_something_else_is_left_as_it_is(kind: Callable[..., nn.Module]) -> None:
    module = traced(Blocks(kind, head=False), streams())
    before = str(module.graph)
    assert passes.run(module, [REPLACE]) == []
    assert str(module.graph) == before


@pytest.mark.parametrize("kind", [OtherSum, OtherOrder])
def test_weights_that_are_made_otherwise_are_left_to_what_makes_them(kind: Callable[..., nn.Module]) -> None:
    """The input of a block does not depend on them, and the streams behind it are mixed by what there is."""
    model, x = Blocks(kind, head=False), streams()
    module = traced(model, x)
    passes.run(module, [REPLACE])
    assert "aten.div.Tensor" in operators(module)
    assert torch.equal(module(x), model(x))


class Untransposed(Blocks):
    def behind(self, out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return super().behind(out, x, post, comb.mT)


class InFloat32(Blocks):
    def behind(self, out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return super().behind(out.float(), x.float(), post, comb).to(x.dtype)


PRE, POST, HEAD = (f"graphs.mhc_{name}.default" for name in ("pre", "post", "head"))


@pytest.mark.parametrize(("kind", "found"), [(Untransposed, [PRE, PRE, HEAD]), (InFloat32, [PRE, POST, PRE, POST, HEAD])])
def test_streams_that_are_mixed_otherwise_are_mixed_as_they_were(kind: Callable[..., nn.Module], found: list[str]) -> None:
    model, x = kind(), streams()
    module = traced(model, x)
    passes.run(module, [REPLACE])
    assert [name for name in operators(module) if "mhc" in name] == found
    assert torch.equal(module(x), model(x))


class Written(Blocks):
    """Writes the streams, or a block's output, after they were read once."""

    def __init__(self, what: str) -> None:
        super().__init__(count=1, head=False)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        connection = self.connections[0]
        pre, post, comb = connection.weights(connection.layer(connection.normed(x)))
        if self.what == "between":
            x.add_(1)
        comb = connection.normalised(comb)
        out = torch.relu(connection.collapsed(pre, x))
        if self.what == "output before":
            out.add_(1)
        if self.what == "streams before":
            x.add_(1)
        made = self.behind(out, x, post, comb)
        if self.what == "output after":
            out.add_(1)
            return made + out.unsqueeze(-2)
        return made


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("between", []),
        ("streams before", []),
        ("output before", [PRE]),
        ("output after", [PRE]),
    ],
)
def test_memory_that_is_written_is_read_as_it_is_at_that_time(what: str, found: list[str]) -> None:
    model, x = Written(what), streams()
    module = traced(model, x)
    passes.run(module, [REPLACE])
    assert [name for name in operators(module) if "mhc" in name] == found
    assert torch.equal(module(x), model(x))


def added(x: Tensor, shift: Tensor) -> Tensor:
    return x.add_(shift)


def clamped(x: Tensor, shift: Tensor) -> Tensor:
    return x.clamp_(-6, 6)


def added_by_view(x: Tensor, shift: Tensor) -> Tensor:
    x.view(-1).add_(shift)
    return x


def multiplied_out(x: Tensor, shift: Tensor) -> Tensor:
    torch.mul(x, shift + 1, out=x)
    return x


WRITES = (added, clamped, added_by_view, multiplied_out)


class InPlace(Blocks):
    """Writes in place what an operator gives: the streams behind a block, or what goes into one."""

    def __init__(self, where: str, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(head=False)
        self.where, self.write = where, write
        self.register_buffer("shift", torch.zeros((), dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        for connection in self.connections:
            post, comb, mixed = connection(x)
            if self.where == "mixed":
                mixed = self.write(mixed, self.shift)
            x = self.behind(torch.relu(mixed), x, post, comb)
            if self.where == "streams":
                x = self.write(x, self.shift)
        return x


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("where", ["mixed", "streams"])
def test_what_is_written_in_place_is_no_result_of_an_operator(where: str, write: Callable[..., Tensor]) -> None:
    model, x = InPlace(where, write), streams() * 4
    module = traced(model, x)
    passes.run(module, [REPLACE])
    for shift in (0.0, 1.5):
        model.shift.fill_(shift)
        assert torch.equal(module(x), model(x))


def written_first(x: Tensor, shift: Tensor) -> Tensor:
    return (x * 2).add_(shift)


def written_by_name(x: Tensor, shift: Tensor) -> Tensor:
    a = x * 1
    torch.mul(x, 2, out=a)
    return a.add_(shift)


class Twice(Blocks):
    """Computes the streams twice, of which the first is written."""

    def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(count=1, head=False)
        self.write = write
        self.register_buffer("shift", torch.zeros((), dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Any:
        first = self.write(x, self.shift)
        return super().forward(x * 2), first


@pytest.mark.parametrize("write", [written_first, written_by_name])
def test_the_same_value_computed_twice_is_read_where_it_stays(write: Callable[..., Tensor]) -> None:
    model, x = Twice(write), streams()
    module = traced(model, x)
    passes.run(module, [REPLACE])
    assert [name for name in operators(module) if "mhc" in name] == [PRE, POST]
    for shift in (0.0, 1.5):
        model.shift.fill_(shift)
        for made, wanted in zip(module(x), model(x), strict=True):
            assert torch.equal(made, wanted)


class Renamed(Blocks):
    """Writes to memory that a view was taken of before, as the result of another operator."""

    def forward(self, x: Tensor) -> Tensor:
        made = x * 1
        seen = made.view(made.shape)
        torch.mul(x, 2, out=made)
        post, comb, mixed = self.connections[0](seen)
        made.add_(mixed.mean())
        return self.behind(torch.relu(mixed), seen, post, comb)


def test_memory_that_an_operator_is_given_by_name_is_known_again() -> None:
    model, x = Renamed(count=1, head=False), streams()
    module = traced(model, x)
    passes.run(module, [REPLACE])
    assert torch.equal(module(x), model(x))


class Wide(Blocks):
    """A block that returns float32."""

    def behind(self, out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return super().behind(out.float(), x, post, comb)


class Router(nn.Module):
    """A norm, a linear layer that lies as ``[features, outputs]``, a sigmoid: no hyper-connection."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(HC * 32, outputs)), nn.Parameter(torch.randn(outputs))
        self.scale = nn.Parameter(torch.randn(1 if outputs == HC else 3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2).float()
        normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
        return torch.sigmoid((normed @ self.weight) * self.scale[0] + self.bias) + EPS


@pytest.mark.parametrize(
    ("build", "dtype"),
    [
        (lambda: Wide(count=1), torch.bfloat16),
        (lambda: Router(HC), torch.bfloat16),
        (lambda: Router((2 + HC) * HC), torch.bfloat16),
        (lambda: Blocks(count=1, weights=torch.float64), torch.float32),
        (lambda: Blocks(count=1), torch.float64),
    ],
)
def test_what_the_operators_do_not_take_is_left_alone(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, x = build(), streams(3, dtype)
    module = traced(model, x)
    passes.run(module, [REPLACE])
    assert torch.equal(module(x), model(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_the_modes_around_the_pass_make_no_difference(mode: Callable[[], Any]) -> None:
    model, x = Blocks(), streams()
    module = traced(model, x)
    with mode():
        assert len(passes.run(module, [REPLACE])) == 4
    assert torch.equal(module(x), model(x))


def test_a_layer_that_autocast_casts_is_not_that_of_the_operator() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        module = traced(Blocks(), streams())
    assert passes.run(module, [REPLACE]) == []


def test_rows_that_no_tile_fits_are_left_to_torch() -> None:
    module = traced(Blocks(), streams(65))
    assert passes.run(module, [REPLACE]) == []


@pytest.mark.parametrize("compiler", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_what_compilers_make_of_them_is_found(compiler: str) -> None:
    model, x = Blocks(), streams()
    made: list[Any] = []

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        made.append(compile_graph(module, inputs, compiler, [REPLACE], {"force_disable_caches": True}))
        return made[-1]

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=False)(x)
    torch.testing.assert_close(compiled, model(x), rtol=0.02, atol=0.02)
    assert [change.by for change in made[0].changes] == ["hyper_connections"] * 4
