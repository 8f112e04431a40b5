"""``compiler_options=``: what is legal, which passes it stands for, and that a compiled step is made with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import graphs
from graphs.compile.compiled_graph import name_of
from graphs.compiler_options import CompilerOptions
from graphs.config import BackendOptions
from graphs.dynamo.backend import backend_report, graphs_backend
from graphs.errors import ConfigError
from graphs.ops.skinny import operator
from tests.models.one_query_attention import OneQueryAttention, pair_of

CPU = torch.device("cpu")
Tensor = torch.Tensor
EVERYWHERE = {"skinny_products": True, "one_query_attention": True}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 256).bfloat16(), torch.tensor([5])


@pytest.mark.slow
def test_a_captured_step_is_rewritten_and_agrees_with_eager() -> None:
    model, twin = pair_of(OneQueryAttention(16).bfloat16())
    options = {**EVERYWHERE, "force_disable_caches": True, "epilogue_fusion": True}
    step = graphs.capture(model, compiler="inductor", compiler_options=options)
    for _ in range(3):
        x = inputs()
        torch.testing.assert_close(step(*x), twin(*x), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(model.keys, twin.keys, rtol=1e-2, atol=1e-2)
    (key,) = step.report().keys
    assert (key.compiler, key.rewrites) == ("inductor", {"one_query_attention": 1, "skinny_products": 3})
    assert "skinny_products 3x" in str(step.report())


class Block(nn.Module):
    """A feed-forward part with a norm before it and a residual around it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.gate, self.up = norm, nn.Linear(256, 512, bias=False), nn.Linear(256, 512, bias=False)
        self.down = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(rows)) * self.up(rows))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.RMSNorm(256), nn.LayerNorm(256)], ids=lambda norm: type(norm).__name__)
def test_what_is_around_products_becomes_a_part_of_them(norm: nn.Module) -> None:
    torch.manual_seed(0)
    block = Block(norm).bfloat16()
    options = {"skinny_products": True, "norm_prologues": True, "product_epilogues": True, "force_disable_caches": True}
    step = graphs.capture(block, compiler="inductor", compiler_options=options)
    for _ in range(2):
        x = inputs()[0]
        torch.testing.assert_close(step(x), block(x), rtol=2e-2, atol=2e-2)
    (key,) = step.report().keys
    assert key.rewrites == {"skinny_products": 3, "norm_prologues": 1, "product_epilogues": 2}


@pytest.mark.slow
def test_both_are_on_where_they_were_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "pays_on", lambda device: True)
    step = graphs.capture(OneQueryAttention(16).bfloat16(), compiler="inductor", compiler_options={"force_disable_caches": True})
    step(*inputs())
    assert step.report().keys[0].rewrites == {"one_query_attention": 1, "skinny_products": 3}


@pytest.mark.slow
def test_the_weights_of_a_rewritten_step_stay_parameters_and_may_be_updated() -> None:
    model = OneQueryAttention(16).bfloat16()
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    step = graphs.capture(model, compiler="inductor", compiler_options=EVERYWHERE)
    x = inputs()
    step(*x)
    model.q.weight.mul_(2)
    torch.testing.assert_close(step(*x), model(*x), rtol=2e-2, atol=2e-2)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == held
    assert step.report().replays == 2


@pytest.mark.slow
def test_the_backend_takes_the_same_options() -> None:
    model = OneQueryAttention(16).bfloat16()
    options = {"compiler_options": {**EVERYWHERE, "force_disable_caches": True}}
    step = torch.compile(model, backend=graphs_backend, options=options)
    x = inputs()
    torch.testing.assert_close(step(*x), model(*x), rtol=2e-2, atol=2e-2)
    piece = backend_report().pieces[-1]
    assert {rewrite.partition(":")[0] for rewrite in piece.rewrites} == {"one_query_attention", "skinny_products"}


@pytest.mark.slow
def test_a_setting_of_inductors_reaches_it() -> None:
    seen: list[Any] = []

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(graph)

        def uuid(self) -> None:
            return None

    options = {**EVERYWHERE, "post_grad_custom_pre_pass": Pass()}
    graphs.capture(nn.Linear(256, 256, bias=False).bfloat16(), compiler="inductor", compiler_options=options)(inputs()[0])
    assert len(seen) == 1


def test_nothing_is_rewritten_where_it_was_not_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CompilerOptions().pipeline(CPU) == ()
    monkeypatch.setattr(operator, "pays_on", lambda device: True)
    assert len(CompilerOptions().pipeline(CPU)) == 4
    assert CompilerOptions(*[False] * 4).pipeline(CPU) == ()


def test_a_cache_of_compiled_graphs_tells_pipelines_apart() -> None:
    names = [name_of(one) for one in CompilerOptions(*[True] * 4).pipeline(CPU)]
    assert names == [
        "passes.optimize.operators.repeated_heads.repeated_heads",
        "passes.optimize.operators.expert_products.expert_products(operator=graphs.expert_linear.default)",
        "passes.optimize.operators.one_query_attention.one_query_attention("
        "fits=graphs.ops.attention.operator.fits, grouped=False, longest=4096, operator=None)",
        "passes.optimize.operators.skinny_linear.skinny_products("
        "fits=graphs.ops.wo_a.tiles.skinny, operator=graphs.skinny_linear.default)",
    ]


def failing(module: torch.fx.GraphModule) -> list[tuple[str, str]]:
    """A pass that takes most of a graph apart before it fails."""
    module.graph.output_node().args = ((),)
    module.graph.eliminate_dead_code()
    raise ZeroDivisionError("no heads")


@pytest.mark.slow
def test_a_rewrite_that_fails_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = CompilerOptions.pipeline
    monkeypatch.setattr(CompilerOptions, "pipeline", lambda self, device: (failing, *pipeline(self, device)))
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 64)).bfloat16()
    options = {"compiler_options": {"skinny_products": True, "force_disable_caches": True}}
    step = torch.compile(model, backend=graphs_backend, options=options)
    x = torch.randn(2, 256).bfloat16()
    for _ in range(2):
        torch.testing.assert_close(step(x), model(x), rtol=2e-2, atol=2e-2)
    assert "compiled without failing, which failed: ZeroDivisionError: no heads" in caplog.text
    piece = backend_report().pieces[-1]
    assert [rewrite.partition(":")[0] for rewrite in piece.rewrites] == ["skinny_products"] * 2


def test_names_may_be_written_with_dashes() -> None:
    made = CompilerOptions.resolve({"skinny-products": True, "max-autotune": True})
    assert made.skinny_products is True and made.inductor == {"max_autotune": True}


@pytest.mark.parametrize("name", ["force_disable_caches", "_post_fusion_custom_pass", "triton.unique_kernel_names"])
def test_every_setting_of_inductors_is_one(name: str) -> None:
    assert CompilerOptions.resolve({name: None}).inductor == {name: None}


BAD = [
    ({"patch": True}, "'patch' is not legal; it must be one of"),
    ({"save_config": True}, "'save_config' is not legal"),
    ({"__doc__": "text"}, "'__doc__' is not legal"),
    ("fast", "compiler_options = 'fast' is not legal; it must be a mapping"),
    ({"skinny_products": "yes"}, "skinny_products = 'yes' is not legal; it must be True, False, or None"),
    (
        {"max_autotun": True},
        "'max_autotun' is not legal; it must be one of 'skinny_products', 'one_query_attention', 'expert_products'",
    ),
    ({"triton.cudagraphs": True}, "left out: the step is recorded here"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_name_the_legal_ones(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphs.capture(nn.Linear(2, 2), compiler="inductor", compiler_options=options)
    with pytest.raises(ConfigError, match=message):
        BackendOptions.resolve({"compiler_options": options})
