"""The loop of ``generate()`` on a step that feeds itself: where it serves, what it leaves to transformers, and equal tokens."""

from __future__ import annotations

import copy
import inspect
import threading
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import (
    LlamaForCausalLM,
    MaxLengthCriteria,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation import logits_process

import graphs
from graphs.events import Recorded
from graphs.generation.loop import Loop
from graphs.generation.processors import History, Prepared, prepare
from graphs.generation.token_step import TokenStep
from tests.test_accelerate import MODES, NEW, prompt, same, twins

Tensor = torch.Tensor
VOCABULARY, CAPACITY = 12, 16
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]
ON_THE_HOST = {
    "guidance": "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "processor": "Fewer",
    "stopping": "Enough",
    "scores": "output_scores",
    "no cache": "no cache",
}


def loops_of(model: Any) -> list[Any]:
    return [step for step in model._graphs_accelerated.loop.steps() if step.report().replays]


def host_reasons(model: Any) -> list[str]:
    details = [refusal.detail for refusal in graphs.accelerated_report(model).refusals]
    return [detail.partition("needed for: ")[2] for detail in details if "needed for" in detail]


@pytest.mark.parametrize("mode", [mode for mode in MODES if "beam" not in mode])
def test_the_loop_serves_or_names_what_needs_the_host(mode: str) -> None:
    model, twin = twins()
    for turn in range(2):
        same(model, twin, turn, **MODES[mode])
    assert bool(loops_of(model)) == (mode not in ON_THE_HOST)
    assert host_reasons(model) == ([ON_THE_HOST[mode]] if mode in ON_THE_HOST else [])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_that_end_are_padded_and_the_last_one_ends_the_loop(seed: int, sampled: bool) -> None:
    model, twin = twins()
    ends = [1, *range(10 + 2 * seed, 24 + 2 * seed)]
    for turn in range(2):
        arguments = {"max_new_tokens": 30, "min_new_tokens": None, "eos_token_id": ends, "do_sample": sampled}
        same(model, twin, turn, prompt(turn, rows=3), **arguments)


@pytest.mark.parametrize("fault", ["prepared otherwise", "not recorded"])
@pytest.mark.parametrize("seed", range(4))
def test_what_the_loop_cannot_serve_goes_on_from_where_it_is(fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TokenStep.forward

    def waiting(self: TokenStep, cache: Any, **others: Any) -> None:
        assert self.sequences.last.sum().item() >= 0
        forward(self, cache, **others)

    if fault == "prepared otherwise":
        monkeypatch.setattr(Loop, "_prepares_alike", lambda *_: False)
    else:
        monkeypatch.setattr(TokenStep, "forward", waiting)
    model, twin = twins(passes="off")
    ends = [1, *range(10 + 2 * seed, 20 + 2 * seed)]
    for turn in range(3):
        for sampled in (False, True):
            arguments = {"max_new_tokens": 20, "min_new_tokens": None, "eos_token_id": ends, "do_sample": sampled}
            mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
            same(model, twin, turn, prompt(turn, rows=3), attention_mask=mask, **arguments)
    reasons = host_reasons(model)
    assert reasons and all("prepares" in reason or "host-sync" in reason for reason in reasons)
    assert graphs.accelerated_report(model).replays > 0, "each step is replayed by itself"


@pytest.mark.parametrize("new", [1, 2, 3, 80])
def test_short_and_long_sequences(new: int) -> None:
    model, twin = twins()
    for turn in range(3):
        same(model, twin, turn, max_new_tokens=new, min_new_tokens=new)


def test_settings_that_change_between_calls_are_those_of_the_call() -> None:
    model, twin = twins()
    for turn in range(2):
        for temperature, top_k in ((0.7, 5), (1.9, 50), (0.7, 50)):
            same(model, twin, turn, do_sample=True, temperature=temperature, top_k=top_k)
        same(model, twin, turn, suppress_tokens=[5, 9, 31])
        same(model, twin, turn, min_new_tokens=3 + turn, max_new_tokens=12 + turn, eos_token_id=[1, *range(20, 40)])
        same(model, twin, turn, forced_eos_token_id=7)


def test_caches_made_in_one_mode_are_not_lent_in_another() -> None:
    model, twin = twins()
    for turn, context in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]):
        with context():
            same(model, twin, turn)


def test_two_threads_generate_at_once_on_storage_of_their_own() -> None:
    model, twin = twins()
    wanted = {seed: twin.generate(prompt(seed), max_new_tokens=40, min_new_tokens=40) for seed in range(6)}
    model.generate(prompt(0), max_new_tokens=40, min_new_tokens=40)
    right: list[int] = []

    def work(seeds: range) -> None:
        for seed in seeds:
            if torch.equal(model.generate(prompt(seed), max_new_tokens=40, min_new_tokens=40), wanted[seed]):
                right.append(seed)

    threads = [threading.Thread(target=work, args=(range(first, 6, 2),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == list(range(6))
    assert not model._graphs_accelerated.loop._running


def test_a_hook_on_the_model_runs_for_each_token() -> None:
    model, twin = twins()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    same(model, twin, 0)
    assert len(calls) == NEW and host_reasons(model) == ["a forward hook of the model"]


def test_a_hook_of_all_modules_runs_for_each_token() -> None:
    model, twin = twins()
    calls: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        same(model, twin, 0)
    finally:
        handle.remove()
    assert calls.count(model) == calls.count(twin) == NEW


def test_weights_that_were_exchanged_are_used() -> None:
    model, twin = twins()
    same(model, twin, 0)
    for one in (model, twin):
        torch.manual_seed(5)
        one.lm_head.weight = torch.nn.Parameter(torch.randn_like(one.lm_head.weight))
    for turn in range(2):
        same(model, twin, turn)
    for one in (model, twin):
        with torch.no_grad():
            one.lm_head.weight.mul_(-1)
    same(model, twin, 3)


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


def test_a_captured_model_generates_on_recordings_and_the_model_stays_what_it_is() -> None:
    accelerated, twin = twins()
    model = graphs.restore(accelerated)
    step = graphs.capture(model)
    for turn in range(3):
        same(step, twin, turn)
        same(step, twin, turn, **MODES["sampling"])
    report = step.report()
    assert report.recordings == 2 and report.replays == 6 * (NEW - 1) and not report.eager_calls, str(report)
    assert "forward" not in vars(model) and "generate" not in vars(model)
    step.mode = "eager"
    same(step, twin, 5)
    assert step.report().replays == report.replays


def test_what_is_set_on_a_captured_model_holds_for_its_generate() -> None:
    accelerated, twin = twins()
    step = graphs.capture(graphs.restore(accelerated))
    same(step, twin, 0)
    for one in (step, twin):
        torch.manual_seed(3)
        one.lm_head = torch.nn.Linear(one.config.hidden_size, one.config.vocab_size, bias=False)
        one.generation_config = type(one.generation_config)(pad_token_id=0, eos_token_id=2, do_sample=True, top_k=7)
    for turn in range(2):
        same(step, twin, turn)


def test_a_method_that_another_library_put_in_front_is_called() -> None:
    accelerated, twin = twins()
    model = graphs.restore(accelerated)
    calls: list[int] = []
    for one in (model, twin):
        own = one.forward

        def shifted(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            calls.append(1)
            outputs = own(*args, **kwargs)
            outputs.logits = -outputs.logits
            return outputs

        one.forward = shifted
    graphs.accelerate(model)
    for turn in range(2):
        same(model, twin, turn)
    graphs.restore(model)
    assert vars(model)["forward"].__name__ == "shifted"


def negated(own: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = own(*args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs

    return forward


def shifted(own: Any) -> Any:
    def prepare(ids: Tensor, **kwargs: Any) -> Any:
        inputs = own(ids, **kwargs)
        return {**inputs, "input_ids": (inputs["input_ids"] + 1) % 64}

    return prepare


PATCHES: dict[str, Any] = {
    "forward": lambda model: setattr(model, "forward", negated(model.forward)),
    "a method as forward": lambda model: setattr(
        model, "forward", types.MethodType(lambda self, *a, **k: negated(type(self).forward)(self, *a, **k), model)
    ),
    "the preparation": lambda model: setattr(
        model, "prepare_inputs_for_generation", shifted(model.prepare_inputs_for_generation)
    ),
    "a class with a call of its own": lambda model: setattr(model, "__class__", called_otherwise(type(model))),
}


def called_otherwise(kind: Any) -> Any:
    class Called(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return negated(super().__call__)(*args, **kwargs)

    return Called


@pytest.mark.parametrize("captured", [False, True], ids=["accelerated", "captured"])
@pytest.mark.parametrize("patch", PATCHES)
def test_methods_that_are_put_in_front_later_are_called_for_each_token(patch: str, captured: bool) -> None:
    model, twin = twins()
    made = graphs.capture(graphs.restore(model)) if captured else model
    for turn in range(2):
        same(made, twin, turn)
    for one in (model, twin):
        PATCHES[patch](one)
    for turn in range(2):
        same(made, twin, turn)


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


class Switching(LlamaForCausalLM):
    """Prepares other inputs once a sequence is long."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if input_ids.shape[1] > 10:
            inputs["input_ids"] = (inputs["input_ids"] + 1) % 60
        return inputs


class Narrowing(LlamaForCausalLM):
    """Forgets what is long ago."""

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        updated["attention_mask"][:, :-4] = 0
        return updated


@pytest.mark.parametrize("kind", [Switching, Narrowing])
def test_a_class_that_prepares_its_steps_otherwise_keeps_transformers_loop(kind: Any) -> None:
    model, twin = twins()
    for one in (model, twin):
        one.__class__ = kind
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for turn in range(2):
        same(model, twin, turn, attention_mask=mask, max_new_tokens=14, min_new_tokens=14)
    assert not loops_of(model)


def test_dropout_in_training_draws_as_in_eager() -> None:
    model, twin = twins("gpt2")
    for one in (model, twin):
        one.train()
    for turn in range(2):
        same(model, twin, turn)
    for one in (model, twin):
        one.eval()
    same(model, twin, 2)
    assert loops_of(model)


def test_the_methods_look_like_those_that_they_stand_for() -> None:
    model, twin = twins()
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)
    got, wanted = (one.generate.__wrapped__(one, prompt(0), max_new_tokens=4, min_new_tokens=4) for one in (model, twin))
    assert torch.equal(got, wanted)
    assert model.forward.__func__ is twin.forward.__func__


def test_a_criterion_with_a_length_of_its_own_is_followed() -> None:
    model, twin = twins()
    for turn in range(2):
        criteria = StoppingCriteriaList([MaxLengthCriteria(90)])
        same(model, twin, turn, stopping_criteria=criteria, max_new_tokens=20, min_new_tokens=1)
        same(model, twin, turn)


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


def test_settings_that_differ_at_each_call_are_not_recorded_at_each_call() -> None:
    model, twin = twins()
    for turn in range(9):
        same(model, twin, turn, do_sample=True, temperature=0.5 + turn / 10)
    report = graphs.accelerated_report(model)
    assert report.recordings <= 6 and not report.eager_calls
    assert any("first call with" in reason for reason in host_reasons(model))
    same(model, twin, 9, do_sample=True, temperature=1.3)
    assert graphs.accelerated_report(model).recordings <= 7
