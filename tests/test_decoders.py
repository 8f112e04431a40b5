"""Unmodified decoders of transformers: the decode step is captured and equals eager while the routing varies."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[bench]'")

from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

import graphs
from graphs.dispatch.call_log import NotReplayed
from tests.models.decoders import DECODERS, EAGER_EXPERTS, TOKENS, Decoded, Decoder, decode, tensors_of, with_positions
from tests.parity import assert_same

aten = torch.ops.aten
CASES = [(name, None) for name in DECODERS] + [(name, "eager") for name in EAGER_EXPERTS]
pytestmark = pytest.mark.slow


class _Routing(TorchDispatchMode):
    """Collects which indices every top-k chose."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.topk.default or func is aten.argmax.default:
            index = result if func is aten.argmax.default else result[1]
            self.chosen.append(str(index.flatten().sort().values.tolist()))
        return result


def capture(model: Any) -> Any:
    return graphs.capture(model)


def compare(
    decoder: Decoder, experts: str | None, device: torch.device | str = "cpu", context: Any = torch.no_grad
) -> graphs.CaptureReport:
    """Decode eagerly and captured, require the same, and return the report of the captured step."""
    wanted = _reference(decoder, experts, device, context)
    model = decoder.build(experts, device)
    step = capture(decoder.step(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        got = decode(decoder, model, step, context)
    assert_same(wanted.logits, got.logits, "logits")
    assert torch.equal(wanted.tokens, got.tokens), "tokens"
    assert_same(tensors_of(wanted.cache), tensors_of(got.cache), "cache")
    return step.report()


def _reference(decoder: Decoder, experts: str | None, device: torch.device | str, context: Any) -> Decoded:
    model, routing = decoder.build(experts, device), _Routing()
    with routing:
        decoded = decode(decoder, model, decoder.step(model), context)
    assert len(set(decoded.tokens[0].tolist())) > 8, "a decode that repeats one token shows little"
    assert not decoder.routed or len(set(routing.chosen)) > 4, "routing does not vary"
    return decoded


def expected(name: str, report: graphs.CaptureReport) -> None:
    """Recorded without a refusal."""
    assert not report.refusals, str(report)
    assert report.replays >= TOKENS - DECODERS[name].eager_calls, str(report)


@pytest.mark.parametrize(("name", "experts"), CASES, ids=[f"{name}-{experts or 'default'}" for name, experts in CASES])
def test_a_decode_step_is_recorded_and_equals_eager(name: str, experts: str | None) -> None:
    expected(name, compare(DECODERS[name], experts))


@pytest.mark.parametrize(("name", "experts"), [("llama", None), ("mixtral", "eager")])
def test_a_decode_step_is_recorded_under_inference_mode_too(name: str, experts: str | None) -> None:
    expected(name, compare(DECODERS[name], experts, context=torch.inference_mode))


OWN_CACHES = {"deepseek_v4": lambda config: DynamicCache(config=config), "minimax": lambda config: MiniMaxCache()}


@pytest.mark.parametrize("name", OWN_CACHES)
def test_a_cache_of_fixed_storage_shows_the_model_what_its_own_cache_does(name: str) -> None:
    decoder = DECODERS[name]
    model = decoder.build()
    fixed = decode(decoder, model, decoder.step(model))
    own = decode(dataclasses.replace(decoder, cache=OWN_CACHES[name], arguments=with_positions), model, model)
    assert torch.equal(fixed.tokens, own.tokens)
    assert_same(own.logits, fixed.logits, "logits")
