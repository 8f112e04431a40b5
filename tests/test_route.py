"""`graphs.route`: unmodified modules of transformers, and models around them, on every path."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
from graphs.errors import ConfigError, WeightError
from graphs.ops import path_bytes
from graphs.ops.wo_a import reference

G, N, K = 2, 128, 256
TOLERANCE = {"einsum": 0.003, "auto": 0.003, "bmm": 0.05, "gloop": 0.05, "fused": 0.05}


class Computing(TorchDispatchMode):
    """The operators that compute: those that return no view of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._opname != "_unsafe_view":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def grouped_linear() -> nn.Module:
    modeling = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="transformers with DeepSeek-V4 is not installed"
    )
    torch.manual_seed(0)
    return modeling.DeepseekV4GroupedLinear(K, G * N, G).bfloat16()


def exact(module: Any, o: Tensor) -> Tensor:
    return torch.einsum("bsgk,gnk->bsgn", o.double(), module.weight.detach().view(G, N, K).double())


@pytest.mark.parametrize("path", TOLERANCE)
@pytest.mark.parametrize("example", [(3, 5), (1, 1)])
def test_the_grouped_linear_of_transformers(path: str, example: tuple[int, int]) -> None:
    module = grouped_linear()
    inputs = [torch.randn(*lead, G, K).bfloat16() for lead in ((1, 1), (3, 5), (7, 1), (1, 4))]
    expected = [exact(module, o) for o in inputs]
    routed = graphs.route(module, (torch.randn(*example, G, K).bfloat16(),), path=path)
    (change,) = routed.modules
    taken = "einsum" if path == "auto" else path
    assert (change.name, change.bytes_before, change.bytes_after) == ("", 2 * G * N * K, path_bytes(G, N, K)[taken])
    with torch.no_grad():
        for o, wanted in zip(inputs, expected, strict=True):
            with Computing() as computing:
                y = routed.model(o)
            assert computing.names == [f"graphs.wo_a_{taken}.default"]  # no copy, no second launch
            assert y.shape == wanted.shape and y.dtype == torch.bfloat16
            assert reference.relative_error(y, wanted) < TOLERANCE[path]


def test_the_original_weight_is_freed() -> None:
    module = grouped_linear()
    weight = weakref.ref(module.weight)
    routed = graphs.route(module, (torch.randn(1, 3, G, K).bfloat16(),), path="fused")
    del module
    gc.collect()
    assert weight() is None and not list(routed.model.parameters())


class Attention(nn.Module):
    """What surrounds the projection in a model: other weights, other inputs, a branch that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.o_a_proj = grouped_linear()
        self.o_b_proj = nn.Linear(G * N, 32, bias=False).bfloat16()

    def forward(self, o: Tensor, scale: float = 1.0) -> Tensor:
        if float(o.sum()) > 1e9:
            return o
        return self.o_b_proj(self.o_a_proj(o * scale).flatten(2))


class Model(nn.Module):
    dummy_inputs = {"o": torch.ones(2, 3, G, K, dtype=torch.bfloat16)}  # noqa: RUF012  (as transformers has it)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.layers.append(self.layers[0])

    def forward(self, o: Tensor) -> Tensor:
        return torch.stack([layer(o, scale=0.5) for layer in self.layers])


def test_a_model_keeps_its_class_and_all_its_other_modules() -> None:
    model = Model().eval()
    before = copy.deepcopy(model)
    weights = [weakref.ref(layer.o_a_proj.weight) for layer in model.layers]
    routed = graphs.route(model, path="einsum")
    assert routed.model is model and [module.name for module in routed.modules] == ["layers.0.o_a_proj", "layers.1.o_a_proj"]
    gc.collect()
    assert all(weight() is None for weight in weights)
    o = torch.randn(2, 5, G, K).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(model(o), before(o))
    assert model.layers[2] is model.layers[0] and not model.layers[0].o_a_proj.training
    assert "layers.0.o_b_proj.weight" in model.state_dict()


def test_a_routed_model_is_captured_copied_and_compiled() -> None:
    model = graphs.route(grouped_linear(), (torch.randn(1, 3, G, K).bfloat16(),), path="gloop").model
    o = torch.randn(1, 3, G, K).bfloat16()
    with torch.no_grad():
        expected = model(o)
        step = graphs.capture(model, strict=True)
        assert all(torch.equal(step(o), expected) for _ in range(3)) and step.report().replays >= 2
        assert torch.equal(copy.deepcopy(model)(o), expected)
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(o), expected)


def test_only_the_weights_that_are_named() -> None:
    routed = graphs.route(Model(), path="einsum", only="layers.1.*")
    assert [module.name for module in routed.modules] == ["layers.1.o_a_proj"]
    assert str(routed).startswith("layers.1.o_a_proj: 1 projection(s) routed, ")


def test_what_cannot_be_looked_into_is_told() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(G, N, K))

        def forward(self, o: Tensor) -> Tensor:
            if o.sum() > 0:
                return torch.einsum("mgk,gnk->mgn", o, self.weight)
            return o

    routed = graphs.route(Branching(), (torch.randn(3, G, K),))
    assert routed.modules == () and "TraceError" in routed.skipped[""]
    assert str(routed).startswith("the model itself: not looked into: ")


def test_a_model_without_a_projection_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    routed = graphs.route(model, (torch.randn(2, 4),))
    assert routed.model is model and routed.modules == () and routed.skipped == {}


def test_wrong_use_is_named() -> None:
    with pytest.raises(ConfigError, match="no dummy_inputs"):
        graphs.route(grouped_linear())
    with pytest.raises(ConfigError, match="'cutlass' is not legal"):
        graphs.route(grouped_linear(), (torch.randn(1, 3, G, K),), path="cutlass")
    with pytest.raises(WeightError, match=r"weight is torch\.float32"):
        graphs.route(grouped_linear().float(), (torch.randn(1, 3, G, K),), path="fused")


def test_a_decoder_of_transformers() -> None:
    v4 = pytest.importorskip("transformers.models.deepseek_v4", reason="transformers with DeepSeek-V4 is not installed")
    torch.manual_seed(0)
    config = v4.DeepseekV4Config(
        **{"vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"head_dim": 64, "q_lora_rank": 32, "num_experts_per_tok": 2, "n_routed_experts": 4, "o_groups": 2, "o_lora_rank": 128},
        **{"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "sliding_window": 16, "max_position_embeddings": 128},
    )
    model = v4.DeepseekV4ForCausalLM(config).bfloat16().eval()
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        routed = graphs.route(model, (ids,), {"use_cache": False}, path="einsum", only="*.o_a_proj.weight")
        names = [module.name for module in routed.modules]
        assert names == [f"model.layers.{i}.self_attn.o_a_proj" for i in range(2)]
        assert reference.relative_error(routed.model(ids, use_cache=False).logits, expected) < 0.02
