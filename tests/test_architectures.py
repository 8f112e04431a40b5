"""``graphs.accelerate`` on a toy of each architecture: eager's tokens from recordings, with the cache it has by default."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.generation.cache_trial import emptied
from tests.models.architectures import ARCHITECTURES, prompt

Tensor = torch.Tensor
NEW = 8
EAGER = {
    "dory": "grows with each token",  # its last loop joins keys to the end of the cache
    "cpmant": "grows with each token",  # its bias of positions is as long as the sequence
    "openai-gpt": "no cache that a call before filled",  # it has none
}
"""Architectures that decode eagerly, and what the report says of it."""
pytestmark = pytest.mark.slow


class Seen(LogitsProcessor):
    """Keeps the scores of each step."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return scores


def twins(name: str) -> tuple[Any, Any]:
    """An accelerated model, and the same one as it is."""
    return graphs.accelerate(ARCHITECTURES[name].build()), ARCHITECTURES[name].build()


def same(models: tuple[Any, Any], turn: int, inputs: dict[str, Any], *, scored: bool = False, **arguments: Any) -> None:
    """Generate with both from one seed; require the same tokens.

    Args:
        scored: require scores that differ by rounding as well. What looks at them is a processor in Python, so that each step
            is a recording of its own.
    """
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, **arguments}
    found = []
    for model in models:
        torch.manual_seed(turn)
        seen = Seen()
        processors = {"logits_processor": LogitsProcessorList([seen])} if scored else {}
        found.append((model.generate(**inputs, **given, **processors), seen.scores))
    (got, scores), (wanted, wanted_scores) = found
    assert torch.equal(got, wanted), f"call {turn}"
    torch.testing.assert_close(scores, wanted_scores, atol=1e-4, rtol=1e-4)


def counted(report: Any) -> list[Any]:
    """Reasons why steps ran eagerly."""
    return [refusal for refusal in report.refusals if refusal.count]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.mark.one_in(12)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EAGER])
def test_an_architecture_is_recorded_once_and_gives_eagers_tokens(name: str) -> None:
    models = twins(name)
    with torch.no_grad():
        same(models, 0, ARCHITECTURES[name].inputs(0))
        first = graphs.accelerated_report(models[0])
        same(models, 1, ARCHITECTURES[name].inputs(1))
    report = graphs.accelerated_report(models[0])
    assert report.recordings == first.recordings >= 1, str(report)
    assert report.replays > first.replays >= NEW - 3, str(report)
    assert report.eager_calls == 0 and not counted(report), str(report)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", EAGER)
def test_what_is_not_recorded_is_told_and_gives_eagers_tokens(name: str) -> None:
    models = twins(name)
    with torch.no_grad():
        for turn in range(2):
            same(models, turn, ARCHITECTURES[name].inputs(turn))
    report = graphs.accelerated_report(models[0])
    told = counted(report)
    tried = 1  # step of the first call, which is told as one that is recorded otherwise
    assert report.recordings == 0 and sum(refusal.count for refusal in told) >= 2 * (NEW - 1) - tried, str(report)
    assert any(EAGER[name] in refusal.detail for refusal in told), str(report)


MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": {"scored": True},
    "long": {"max_new_tokens": 20, "min_new_tokens": 20},
}
SPREAD = (
    "gpt2",
    "bloom",
    "mistral",
    "gemma3_text",
    "qwen3_moe",
    "deepseek_v32",
    "mamba2",
    "bamba",
    "lfm2",
    "falcon_h1",
    "t5",
    "bart",
)
CONTEXTS = [torch.no_grad, torch.inference_mode]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPREAD)
def test_ways_of_generating_for_a_spread_of_architectures(name: str, mode: str) -> None:
    models, context = twins(name), CONTEXTS[len(name + mode) % 2]
    with context():
        for turn in range(2):
            same(models, turn, ARCHITECTURES[name].inputs(turn), **MODES[mode])
        before = graphs.accelerated_report(models[0])
        same(models, 2, ARCHITECTURES[name].inputs(2), **MODES[mode])
    after = graphs.accelerated_report(models[0])
    assert after.recordings == before.recordings >= 1 and after.replays > before.replays
    assert after.eager_calls == 0 and not counted(after), str(after)


@pytest.mark.parametrize("name", ["bamba", "lfm2"])
def test_beams_take_the_states_of_recurrent_layers_along(name: str) -> None:
    models = twins(name)
    for turn in range(2):
        same(models, turn, ARCHITECTURES[name].inputs(turn), num_beams=3)


def test_a_cache_that_is_lent_again_looks_like_a_new_one_and_has_its_storage() -> None:
    """Some models read a prompt in both directions where the cache is new, by ``is_initialized``."""
    model = ARCHITECTURES["llama"].build()
    cache, new = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    with torch.no_grad():
        model(prompt(0), past_key_values=cache)
        where = cache.layers[0].keys.data_ptr()
        assert emptied(cache).is_initialized == new.is_initialized and cache.get_seq_length() == new.get_seq_length() == 0
        got, wanted = (model(prompt(1), past_key_values=one).logits for one in (cache, new))
    assert torch.equal(got, wanted) and cache.layers[0].keys.data_ptr() == where and cache.is_initialized
