"""Processors of scores in the loop of ``generate()``: as transformers has them, and left to the host where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers.generation import logits_process

from graphs.generation.processors import History, Prepared, prepare
from tests.test_accelerate import same, twins

Tensor = torch.Tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]


VOCABULARY, CAPACITY = 12, 16


PROCESSORS: dict[str, Any] = {
    "repetition": lambda: logits_process.RepetitionPenaltyLogitsProcessor(1.7),
    **{f"{n}-grams": lambda n=n: logits_process.NoRepeatNGramLogitsProcessor(n) for n in (1, 2, 3, 4)},
    "minimum": lambda: logits_process.MinLengthLogitsProcessor(9, [2, 3]),
    "new minimum": lambda: logits_process.MinNewTokensLengthLogitsProcessor(4, 5, 2),
    "suppressed": lambda: logits_process.SuppressTokensLogitsProcessor([0, 7, 40]),
    "first": lambda: logits_process.SuppressTokensAtBeginLogitsProcessor([5, 6], 8),
    "forced end": lambda: logits_process.ForcedEOSTokenLogitsProcessor(11, [3]),
    "forced begin": lambda: logits_process.ForcedBOSTokenLogitsProcessor(3),
    "nucleus": lambda: logits_process.TopPLogitsWarper(0.7),
}


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(2, CAPACITY), variety=st.integers(1, VOCABULARY + 2))
def test_a_processor_gives_what_transformers_does(name: str, seed: int, length: int, variety: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, variety, (3, CAPACITY), generator=generator)
    scores = torch.randn(3, VOCABULARY, generator=generator)
    processor = PROCESSORS[name]()
    prepared = prepare([processor])
    assert isinstance(prepared, Prepared)
    history = History(tokens, torch.tensor(length), torch.arange(CAPACITY), torch.tensor(prepared.limits, dtype=torch.int64))
    wanted = processor(tokens[:, :length].clone(), scores.clone())
    assert torch.equal(prepared.functions[0](history, scores.clone()), wanted)


def test_a_processor_with_settings_that_are_no_plain_values_is_left_to_the_host() -> None:
    class Own(logits_process.TemperatureLogitsWarper):
        pass

    assert prepare([Own(0.5)]) == "Own"
    odd = logits_process.TemperatureLogitsWarper(0.5)
    odd.temperature = object()
    assert prepare([odd]) == "TemperatureLogitsWarper"
    keys = {prepare([logits_process.TemperatureLogitsWarper(t)]).key for t in (0.5, 0.6, 0.5)}  # type: ignore[union-attr]
    assert len(keys) == 2


def test_a_processor_that_is_changed_later_is_not_that_of_another_call() -> None:
    model, twin = twins()
    kept = logits_process.TemperatureLogitsWarper(0.2)

    def own(processor: Any) -> dict[str, Any]:
        return {"logits_processor": logits_process.LogitsProcessorList([processor]), "do_sample": True, "top_k": 0}

    same(model, twin, 0, **own(kept))
    kept.temperature = 5.0
    for turn in range(2):
        same(model, twin, turn, **own(logits_process.TemperatureLogitsWarper(0.2)))
        same(model, twin, turn, **own(kept))


def test_a_processor_whose_tokens_are_written_later_is_not_that_of_another_call() -> None:
    model, twin = twins()
    kept = logits_process.SuppressTokensLogitsProcessor([5, 15])
    same(model, twin, 0, logits_processor=logits_process.LogitsProcessorList([kept]))
    kept.suppress_tokens.copy_(torch.tensor([22, 62]))
    for turn in range(2):
        fresh = logits_process.SuppressTokensLogitsProcessor([5, 15])
        same(model, twin, turn, logits_processor=logits_process.LogitsProcessorList([fresh]))
