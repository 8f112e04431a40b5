"""Caches of fixed storage of this project: what they show a model is what its own cache shows it, and their storage stays."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import DynamicCache

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.generation.accelerate import DecodeStep
from graphs.generation.caches.own_caches import own_cache
from tests.models.decoders import CAPACITY, DECODERS, HYBRID, Decoder, tensors_of
from tests.parity import assert_same

Tensor = torch.Tensor
OWN = ("minimax", "deepseek_v4")
FULL_FIRST = {**HYBRID, "block_size": 8, "layer_types": ["full_attention", "linear_attention"]}
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
NEW = 8
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        yield


def prompt(turn: int, rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(turn))


def twins(decoder: Decoder) -> tuple[Any, Any]:
    """An accelerated model, and the same one as it is."""
    made = []
    for _ in range(2):
        model = decoder.build()
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = 1
        made.append(model)
    return graphs.accelerate(made[0]), made[1]


def same(model: Any, twin: Any, turn: int, ids: Tensor, **arguments: Any) -> None:
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, **arguments}
    torch.manual_seed(turn)
    wanted = twin.generate(ids, **given)
    torch.manual_seed(turn)
    assert torch.equal(model.generate(ids, **given), wanted), f"call {turn}"


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_prompts_of_any_length_are_served_by_one_recording(name: str) -> None:
    model, twin = twins(DECODERS[name])
    for turn, length in enumerate((6, 3, 1, 20, 9)):
        same(model, twin, turn, prompt(turn, length=length))
    report = graphs.accelerated_report(model)
    assert report.recordings == 1 and report.eager_calls == 0 and not report.refusals, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"attention_mask": PADDED}, {"num_beams": 3}, {"max_new_tokens": 40}], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_padded_prompts_beams_and_long_sequences_record_once(name: str, mode: dict[str, Any]) -> None:
    decoder = DECODERS[name]
    model, twin = twins(dataclasses.replace(decoder, sizes=FULL_FIRST) if name == "minimax" else decoder)
    for turn in range(3):
        same(model, twin, turn, prompt(turn), **mode)
    report = graphs.accelerated_report(model)
    assert report.recordings == 1 and report.eager_calls == 0 and not report.refusals, str(report)


def test_a_padded_prompt_that_its_own_cache_masks_in_another_way_keeps_that_cache() -> None:
    model, twin = twins(DECODERS["minimax"])
    for turn in range(2):
        same(model, twin, turn, prompt(turn), attention_mask=PADDED)
    report = graphs.accelerated_report(model)
    assert report.recordings == 0 and "grows with each token" in report.refusals[0].detail


def logits_of(model: Any, cache: Any, ids: Tensor, start: int) -> Tensor:
    positions = torch.arange(start, start + ids.shape[1]).expand(ids.shape[0], -1)
    given = {"input_ids": ids, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        logits: Tensor = model(**given).logits
    return logits


PIECES = [(1,), (2, 1, 1), (5, 3, 1, 1, 1, 6), (6, 1, 1), (13, 2, 7, 1)]


@pytest.mark.parametrize("stepwise", [True, False], ids=["as a step", "as any call"])
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_compressed_layers_show_what_the_models_own_do(pieces: tuple[int, ...], stepwise: bool) -> None:
    """Windows of 6 and compressed entries of 2 and 4 tokens, filled in pieces, then one by one."""
    model = DECODERS["deepseek_v4"].build()
    theirs = DynamicCache(config=model.config)
    ours = own_cache(model, theirs, CAPACITY)
    assert ours is not None
    call, start = DecodeStep(model) if stepwise else model, 0
    for tokens in (*pieces, *(1 for _ in range(20))):
        ids = prompt(start, length=tokens)
        assert_same(logits_of(model, theirs, ids, start), logits_of(call, ours, ids, start), f"position {start}")
        start += tokens
    assert int(ours.get_seq_length()) == theirs.get_seq_length() == start


@pytest.mark.parametrize("name", OWN)
def test_a_cache_that_was_reset_is_like_a_new_one(name: str) -> None:
    decoder = DECODERS[name]
    model = decoder.build()
    call, used = decoder.step(model), decoder.cache(model.config)
    logits_of(model, used, prompt(0, length=11), 0)
    logits_of(call, used, prompt(1, length=1), 11)
    where = [tensor.data_ptr() for tensor in tensors_of(used)]
    used.reset()
    fresh = decoder.cache(model.config)
    start = 0
    for tokens in (1, 1, 1, 1, 1):  # so that the first window is closed by a step, which looks at the one before it
        ids = prompt(start, length=tokens)
        assert_same(logits_of(call, fresh, ids, start), logits_of(call, used, ids, start), f"position {start}")
        start += tokens
    assert [tensor.data_ptr() for tensor in tensors_of(used)] == where


def test_rows_are_reordered_in_place() -> None:
    model = DECODERS["deepseek_v4"].build()
    theirs = DynamicCache(config=model.config)
    ours: Any = own_cache(model, theirs, CAPACITY)
    for cache in (theirs, ours):
        logits_of(model, cache, prompt(0, length=11), 0)
    where = [tensor.data_ptr() for tensor in tensors_of(ours)]
    for cache in (theirs, ours):
        cache.reorder_cache(torch.tensor([1, 1]))
    assert [tensor.data_ptr() for tensor in tensors_of(ours)] == where
    for start in range(11, 16):
        ids = prompt(start, length=1)
        assert_same(logits_of(model, theirs, ids, start), logits_of(DecodeStep(model), ours, ids, start), f"position {start}")


def test_more_tokens_than_positions_are_refused() -> None:
    model = DECODERS["deepseek_v4"].build()
    cache = own_cache(model, DynamicCache(config=model.config), 8)
    with pytest.raises(ValueError, match="the cache has 8 positions, not 9"):
        logits_of(model, cache, prompt(0, length=9), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_cache_that_was_handed_out_goes_on_with_the_model_as_it_is(name: str) -> None:
    model, twin = twins(DECODERS[name])
    results = [one.generate(prompt(0), max_new_tokens=NEW, return_dict_in_generate=True) for one in (model, twin)]
    caches = [getattr(one, "cache", None) or one.past_key_values for one in results]
    graphs.restore(model)
    start = prompt(0).shape[1] + NEW - 1
    for position in range(start, start + 4):
        ids = prompt(position, length=1)
        wanted = logits_of(twin, caches[1], ids, position)
        assert_same(wanted, logits_of(model, caches[0], ids, position), f"position {position}")
