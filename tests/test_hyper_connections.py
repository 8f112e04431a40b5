"""Captured steps with hyper-connections: recorded with operators in their place, uncompiled and compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs.compiler_options import CompilerOptions
from graphs.first_call import candidate_step
from graphs.ops.mhc import operator
from tests.models.hyper_connections import Blocks, Connection, streams

EVERYWHERE = {"hyper_connections": True}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Step(Blocks):
    """The blocks with a cache that each step writes a row of."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.register_buffer("rows", torch.zeros(8, 32))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        self.rows.index_copy_(0, self.place % 8, made.float().mean((0, 1), keepdim=True)[0])
        self.place += 1
        return made + self.rows.sum(0).to(made.dtype)


def pair(**how: Any) -> tuple[Step, Step]:
    first, second = Step(**how), Step(**how)
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_uncompiled_step_is_recorded_with_the_operators(mode: Callable[[], Any]) -> None:
    model, twin = pair()
    step = graphs.capture(model, compiler_options=EVERYWHERE, strict=True)
    with mode():
        for rows in (2, 2, 2, 3, 3):
            x = streams(rows)
            assert torch.equal(step(x), twin(x))
            assert torch.equal(model.rows, twin.rows)
    report = step.report()
    assert (report.recordings, report.replays, report.eager_calls) == (2, 5, 0)
    assert [key.rewrites for key in report.keys] == [{"hyper_connections": 4}] * 2
    assert "rewritten: hyper_connections 4x" in str(report)


def test_weights_may_be_updated_in_place() -> None:
    model, twin = pair()
    step = graphs.capture(model, compiler_options=EVERYWHERE, strict=True)
    for _ in range(3):
        x = streams()
        assert torch.equal(step(x), twin(x))
        for one in (model, twin):
            one.connections[0].fn.mul_(1.5)
            one.head.base.neg_()
    assert step.report().recordings == 1


def test_padded_rows_are_of_no_consequence() -> None:
    model, twin = Blocks(), Blocks()
    twin.load_state_dict(model.state_dict())
    step = graphs.capture(model, compiler_options=EVERYWHERE, buckets=[4], batch_dims={"x": 0}, strict=True)
    for rows in (4, 3, 1, 4):
        x = streams(rows)
        torch.testing.assert_close(step(x), twin(x), rtol=1e-2, atol=1e-2)
    assert step.report().keys[0].rewrites == {"hyper_connections": 4}


def test_autocast_leaves_the_step_as_it_is() -> None:
    model, twin = pair()
    step = graphs.capture(model, compiler_options=EVERYWHERE, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            x = streams()
            assert torch.equal(step(x), twin(x))
    assert step.report().keys[0].rewrites == {}


class Cache:
    """Rows that a step writes one of, and which one."""

    def __init__(self) -> None:
        self.rows, self.place = torch.zeros(8, 32), torch.zeros(1, dtype=torch.int64)


class Cached(Blocks):
    """The blocks with a cache that they are given."""

    def forward(self, x: Tensor, cache: Cache) -> Tensor:  # type: ignore[override]
        made = super().forward(x)
        cache.rows.index_copy_(0, cache.place, made.float().mean((0, 1), keepdim=True)[0])
        cache.place += 1
        return made + cache.rows.sum(0).to(made.dtype)


def test_a_recording_is_pointed_at_another_cache() -> None:
    model, twin = Cached(), Cached()
    twin.load_state_dict(model.state_dict())
    step = graphs.capture(model, compiler_options=EVERYWHERE)
    for _ in range(3):
        cache, other = Cache(), Cache()
        for _ in range(2):
            x = streams()
            assert torch.equal(step(x, cache), twin(x, other))
            assert torch.equal(cache.rows, other.rows) and torch.equal(cache.place, other.place)
    report = step.report()
    assert (report.recordings, report.moved, report.eager_calls) == (1, 2, 0)
    assert report.keys[0].rewrites == {"hyper_connections": 4}


class Louder(Connection):
    """A subclass with another forward."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        post, comb, mixed = super().forward(x * 2)
        return post, comb, mixed + 1


class Other(Connection):
    """A subclass that means something else."""

    def weights(self, mixes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, comb = super().weights(mixes)
        return pre.sqrt(), post, comb


@pytest.mark.parametrize(("kind", "rewrites"), [(Louder, {"hyper_connections": 5}), (Other, {"hyper_connections": 1})])
def test_what_a_module_computes_decides_and_not_its_class(kind: type[nn.Module], rewrites: dict[str, int]) -> None:
    model, twin = pair(kind=kind)
    step = graphs.capture(model, compiler_options=EVERYWHERE, strict=True)
    for _ in range(3):
        x = streams()
        assert torch.equal(step(x), twin(x))
    assert step.report().keys[0].rewrites == rewrites


class Chosen(Step):
    """Asks the host for a number, which the passes remove."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if int(self.place) < 100 else x[:, :, 0]


def test_a_step_whose_host_values_are_removed_has_them_too() -> None:
    first, second = Chosen(), Chosen()
    second.load_state_dict(first.state_dict())
    step = graphs.capture(first, compiler_options=EVERYWHERE, strict=True)
    for _ in range(3):
        x = streams()
        assert torch.equal(step(x), second(x))
    assert step.report().keys[0].rewrites == {"hyper_connections": 4}


def test_nothing_is_traced_where_it_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate_step, "rewrite", lambda *_: pytest.fail("traced"))
    x = streams()
    for options in (None, {"hyper_connections": False}):
        step = graphs.capture(Step(), compiler_options=options, strict=True)
        step(x)
        assert step.report().keys[0].rewrites == {}
    step = graphs.capture(nn.Linear(32, 24), compiler_options=EVERYWHERE, strict=True)
    step(torch.randn(2, 32))
    step = graphs.capture(Step(), compiler_options=EVERYWHERE, strict=True)
    step(streams(65))
    assert step.report().recordings == 1
    assert CompilerOptions().operators(torch.device("cpu")) == ()


def test_they_are_on_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "pays_on", lambda device: True)
    step = graphs.capture(Step(), strict=True)
    step(streams())
    assert step.report().keys[0].rewrites == {"hyper_connections": 4}


def test_a_step_that_cannot_be_traced_is_recorded_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise NotImplementedError("no fake kernel\nand more")

    monkeypatch.setattr(candidate_step, "rewrite", fails)
    model, twin = pair()
    step = graphs.capture(model, compiler_options=EVERYWHERE, strict=True)
    with caplog.at_level(logging.WARNING, "graphs"):
        for _ in range(2):
            x = streams()
            assert torch.equal(step(x), twin(x))
    assert "could not be traced: no fake kernel" in caplog.text and "and more" not in caplog.text
    assert (step.report().recordings, step.report().keys[0].rewrites) == (1, {})


@pytest.mark.slow
def test_a_compiled_step_is_rewritten_and_agrees_with_eager() -> None:
    torch.compiler.reset()
    model, twin = pair()
    options = {**EVERYWHERE, "force_disable_caches": True}
    step = graphs.capture(model, compiler="inductor", compiler_options=options, strict=True)
    for _ in range(3):
        x = streams()
        torch.testing.assert_close(step(x), twin(x), rtol=2e-2, atol=2e-2)
    (key,) = step.report().keys
    assert (key.compiler, key.rewrites) == ("inductor", {"hyper_connections": 4})


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_the_step_of_a_whole_model_of_transformers_has_them(compiler: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16}
    small = {"vocab_size": 64, "index_n_heads": 4, "index_head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 32}
    config = transformers.DeepseekV4Config(num_hidden_layers=2, max_position_embeddings=256, **sizes, **small)
    model = transformers.DeepseekV4ForCausalLM(config).bfloat16().eval()
    call = partial(model, use_cache=False)
    ids = torch.randint(0, 64, (1, 6))
    options = {**EVERYWHERE, "force_disable_caches": True} if compiler == "inductor" else EVERYWHERE
    step = graphs.capture(model, compiler=compiler, compiler_options=options, strict=True)
    for _ in range(2):
        made = step(ids, use_cache=False).logits
        torch.testing.assert_close(made, call(ids).logits, rtol=3e-2, atol=3e-2)
    (key,) = step.report().keys
    assert key.rewrites["hyper_connections"] == 6  # one before the first block, four behind blocks, the head's
