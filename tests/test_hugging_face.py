"""Models, outputs and caches of transformers, toy sizes."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[bench]'")

import transformers
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

import graphs
from graphs.dispatch.call_log import NotReplayed
from tests.parity import assert_same

Tensor = torch.Tensor
TOKENS = 20
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # newer name, older name


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).eval()


def static_cache(model: Any) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=32)


PROMPT = torch.tensor([[3, 7, 11, 2], [5, 1, 90, 44]])


def decode(model: Any, call: Any, tokens: int = TOKENS) -> tuple[Tensor, list[Tensor], Any]:
    """Greedy tokens, the logits they came from, and the cache; ``call`` does the steps after the prompt."""
    cache, rows = static_cache(model), PROMPT.shape[0]
    positions = torch.arange(PROMPT.shape[1]).expand(rows, -1)
    with torch.no_grad():
        logits = model(PROMPT, past_key_values=cache, position_ids=positions).logits[:, -1]
        kept, chosen = [], []
        for position in range(PROMPT.shape[1], PROMPT.shape[1] + tokens):
            token = logits.argmax(-1, keepdim=True)
            chosen.append(token)
            output = call(token, past_key_values=cache, position_ids=torch.full((rows, 1), position))
            logits = output.logits[:, -1].clone()
            kept.append(logits)
    return torch.cat(chosen, 1), kept, cache


def first_token(call: Any, model: Any, cache: Any = None, **options: Any) -> Any:
    """A step on one token, for one sequence."""
    cache = cache if cache is not None else static_cache(model)
    with torch.no_grad():
        return call(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, position_ids=torch.zeros_like(ONE), **options)


ONE = torch.ones(1, 1, dtype=torch.int64)


def tensors_of(cache: Any) -> list[Tensor]:
    return [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("outputs", ["owned", "borrowed"])
def test_decoding_with_a_static_cache_equals_eager(model: Any, outputs: str) -> None:
    step = graphs.capture(model, outputs=outputs, strict=True)
    wanted, wanted_logits, wanted_cache = decode(model, model)
    tokens, logits, cache = decode(model, step)
    assert torch.equal(tokens, wanted) and len(set(wanted[0].tolist())) > 1
    assert_same(wanted_logits, logits, "logits")
    assert_same(tensors_of(wanted_cache), tensors_of(cache), "cache")
    report = step.report()
    assert (report.recordings, report.replays, report.eager_calls, report.refusals) == (1, TOKENS, 0, ())


def test_a_new_sequence_in_the_same_cache_replays(model: Any) -> None:
    step, cache = graphs.capture(model), static_cache(model)
    for start in (0, 5):
        cache.reset()
        for position in range(start, start + 3):
            ids, positions = torch.full((2, 1), position + 1), torch.full((2, 1), position)
            with torch.no_grad():
                step(ids, past_key_values=cache, position_ids=positions)
    report = step.report()
    assert (report.recordings, report.replays) == (1, 5), "the first call makes the cache's tensors"
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [("changing-value", 1)]


def test_two_caches_take_turns(model: Any) -> None:
    step = graphs.capture(model)
    caches, references = [static_cache(model) for _ in range(2)], [static_cache(model) for _ in range(2)]
    with torch.no_grad():
        for position in range(4):
            for sequence in range(2):
                arguments = torch.tensor([[position + 10 * sequence]]), torch.tensor([[position]])
                got = step(arguments[0], past_key_values=caches[sequence], position_ids=arguments[1]).logits
                wanted = model(arguments[0], past_key_values=references[sequence], position_ids=arguments[1]).logits
                assert_same(wanted, got, f"position {position} of sequence {sequence}")
    report = step.report()
    assert (report.recordings, report.moved, report.replays) == (1, 1, 8 - len(caches))


def test_a_dropped_cache_is_freed_and_its_recording_is_not(model: Any) -> None:
    step, cache = graphs.capture(model), static_cache(model)
    for _ in range(3):
        output = first_token(step, model, cache)
    assert step.report().replays == 2
    keys, gone = weakref.ref(cache.layers[0].keys), weakref.ref(cache)
    del cache, output
    gc.collect()
    assert gone() is None, "the recording keeps the cache object"
    other = static_cache(model)
    first_token(step, model, other)  # a new key: the next occasion to tidy up
    gc.collect()
    assert keys() is None, "the recording of a cache that is gone keeps its tensors"
    first_token(step, model, other)
    report = step.report()
    assert (report.recordings, report.moved, report.replays) == (1, 1, 3), "the recording serves the next cache"


def test_a_growing_cache_is_refused_and_decodes_as_eager(model: Any) -> None:
    step, got, wanted = graphs.capture(model), transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad(), pytest.warns(UserWarning, match="runs eagerly"):
        for position in range(5):
            arguments = torch.tensor([[position + 1]]), torch.tensor([[position]])
            a = step(arguments[0], past_key_values=got, position_ids=arguments[1]).logits
            b = model(arguments[0], past_key_values=wanted, position_ids=arguments[1]).logits
            assert_same(b, a, f"token {position}")
    assert got.get_seq_length() == wanted.get_seq_length() == 5
    assert step.report().replays == 0 and step.report().eager_calls == 5


def test_the_output_class_has_the_same_fields_in_every_way_it_is_read(model: Any) -> None:
    step, cache = graphs.capture(model), static_cache(model)
    for _ in range(3):
        cache.reset()
        got = first_token(step, model, cache, output_hidden_states=True)
    assert step.report().replays == 2
    wanted = first_token(model, model, output_hidden_states=True)
    assert type(got) is type(wanted) is CausalLMOutputWithPast
    assert list(got) == list(got.keys()) == list(wanted) == ["logits", CACHE, "hidden_states"]
    assert got.logits is got["logits"] is got[0] and got[CACHE] is cache
    assert got.loss is None and got.attentions is None and "loss" not in got
    assert type(got.hidden_states) is tuple and len(got.hidden_states) == 3
    assert [type(item) for item in got.to_tuple()] == [type(item) for item in wanted.to_tuple()]
    assert vars(got).keys() == vars(wanted).keys()
    assert_same([wanted.logits, *wanted.hidden_states], [got.logits, *got.hidden_states], "output")


def test_an_output_can_be_changed_like_any_other_and_the_next_is_not(model: Any) -> None:
    step, cache = graphs.capture(model), static_cache(model)
    wanted = first_token(model, model).logits
    for index in range(5):
        cache.reset()
        output = first_token(step, model, cache)
        assert list(output) == ["logits", CACHE] and output.loss is None, f"call {index}"
        assert not hasattr(output, "extra")
        assert_same(wanted, output.logits, f"logits of call {index}")
        output.logits.add_(1)
        output.loss, output.extra = torch.ones(()), "mine"
        assert output["loss"] is output.loss and list(output) == ["logits", CACHE, "loss"]
        output["logits"] = torch.zeros(1)
        assert output.logits.tolist() == output[0].tolist() == [0]
    assert step.report().replays == 4


def test_an_output_class_is_an_argument_too() -> None:
    def head(encoded: BaseModelOutput, scale: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=encoded.last_hidden_state * scale, hidden_states=(encoded[0] + 1,))

    step = graphs.capture(head)
    for seed in range(3):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        got, wanted = step(BaseModelOutput(last_hidden_state=x), torch.tensor(2.0)), head(BaseModelOutput(x), torch.tensor(2.0))
        assert type(got) is BaseModelOutput and list(got) == list(wanted) and type(got.hidden_states) is tuple
        assert_same(wanted.to_tuple(), got.to_tuple(), "output")
    assert step.report().replays == 3


def test_an_output_class_is_cut_to_the_batch() -> None:
    def head(x: Tensor) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=x * 2, hidden_states=(x + 1, x.t() + 2))

    step = graphs.capture(head, buckets=[2, 4], batch_dims={"x": 0})
    for rows in (3, 1, 4, 2, 3):
        x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
        got, wanted = step(x), head(x)
        assert type(got) is type(wanted) and list(got) == list(wanted)
        assert_same(wanted.to_tuple(), got.to_tuple(), f"{rows} rows")
    report = step.report()
    assert report.replays == 5 and {key.rows for key in report.keys} == {2, 4} and report.refusals == ()


def test_a_prompt_and_its_decoding_are_served_by_one_step(model: Any) -> None:
    """A prompt is another key; where the library waits for the device to build its mask, it runs eagerly with the reason."""
    step = graphs.capture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        tokens, _, _ = decode(step, step, tokens=4)
    assert torch.equal(tokens, decode(model, model, tokens=4)[0])
    report = step.report()
    assert report.replays == 4 and report.eager_calls == 1
