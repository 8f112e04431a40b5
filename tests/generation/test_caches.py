"""Caches of ``generate()``: those that callers hold are theirs, and none is lent where it does not belong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import (
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)

import graphs
from graphs.events import Recorded
from tests.test_accelerate import NEW, prompt, same, twins

Tensor = torch.Tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]


def test_caches_made_in_one_mode_are_not_lent_in_another() -> None:
    model, twin = twins()
    for turn, context in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]):
        with context():
            same(model, twin, turn)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_conversation_goes_on_with_the_cache_that_was_handed_out(beams: int) -> None:
    model, twin = twins()
    arguments = {"max_new_tokens": 30, "min_new_tokens": 30, "return_dict_in_generate": True, "num_beams": beams}
    results = [one.generate(prompt(0), **arguments) for one in (twin, model)]
    for turn in range(3):
        wanted, got = results
        assert torch.equal(wanted.sequences, got.sequences)
        theirs, ours = wanted.cache, got.cache
        assert type(theirs) is type(ours) and theirs.get_seq_length() == ours.get_seq_length()
        for expected, layer in zip(theirs.layers, ours.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys)
        if beams > 1:
            break
        asked = [torch.cat([one.sequences, prompt(turn + 1, length=3)], 1) for one in results]
        pairs = zip((twin, model), asked, results, strict=True)
        results = [one.generate(ids, cache=result.cache, **arguments) for one, ids, result in pairs]
    before = graphs.accelerated_report(model)
    for turn in range(2):
        same(model, twin, turn, **arguments)
    assert graphs.accelerated_report(model).recordings == before.recordings


def test_autocast_between_calls() -> None:
    model, twin = twins()
    same(model, twin, 0)
    for turn, dtype in enumerate([torch.bfloat16, torch.float16, torch.bfloat16]):
        with torch.autocast("cpu", dtype):
            same(model, twin, turn)
        same(model, twin, turn)


def test_a_cache_of_the_callers_own_is_served_by_the_recording_of_another() -> None:
    model, twin = twins()
    prefix, kept = prompt(9), []
    for one in (model, twin):
        cache = StaticCache(config=one.config, max_cache_len=64)
        with torch.no_grad():
            one(prefix, cache=cache)
        kept.append(cache)
    recorded: list[Any] = []
    listener = graphs.on_event(lambda event: recorded.append(event) if isinstance(event, Recorded) else None)
    try:
        for turn in range(4):
            ids = torch.cat([prefix, prompt(turn, length=3)], 1)
            arguments = {"max_new_tokens": 10, "min_new_tokens": 10}
            got, wanted = (
                one.generate(ids, cache=copy.deepcopy(c), **arguments) for one, c in zip((model, twin), kept, strict=True)
            )
            assert torch.equal(got, wanted) and got.stride() == wanted.stride()
    finally:
        listener.remove()
    assert len(recorded) == 1


class InTuple(LlamaForCausalLM):
    """Hands the cache out in a tuple."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        result = super().generate(*args, return_dict_in_generate=True, **kwargs)
        return result.sequences, result.cache


def test_a_cache_that_is_handed_out_in_a_container_is_not_lent_again() -> None:
    model, twin = twins()
    for one in (model, twin):
        one.__class__ = InTuple
    found = []
    for one in (graphs.accelerate(model), twin):
        sequences, cache = one.generate(prompt(0), max_new_tokens=NEW, min_new_tokens=NEW)
        one.generate(prompt(5), max_new_tokens=NEW, min_new_tokens=NEW)
        with torch.no_grad():
            found.append(one(sequences[:, -1:], cache=cache).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("turning", [8, 100])
def test_a_model_that_begins_anew_at_a_length_is_followed(turning: int) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
        lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": turning, "initializer_range": 0.3}
        made.append(Phi3ForCausalLM(Phi3Config(**sizes, **tokens, **lengths, num_key_value_heads=2, rope_scaling=rope)).eval())
    model, twin = graphs.accelerate(made[0]), made[1]
    for turn in range(2):
        same(model, twin, turn)
