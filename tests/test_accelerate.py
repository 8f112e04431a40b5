"""``graphs.accelerate``: unmodified ``generate()`` gives eager's tokens, from recordings that later calls use again."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.errors import ConfigError
from tests.models.decoders import DECODERS

Tensor = torch.Tensor
NEW = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]


def t5() -> Any:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))


def bart() -> Any:
    layers = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in LAYERS.items()}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **layers))


LAYERS = {"layers": 2, "ffn_dim": 48, "attention_heads": 2}


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64))


OTHERS = {"t5": t5, "bart": bart, "gpt2": gpt2}


def twins(name: str = "llama", **options: Any) -> tuple[Any, Any]:
    """An accelerated model, and the same one as it is."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = (OTHERS[name]() if name in OTHERS else DECODERS[name].build()).eval()
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = 1
        made.append(model)
    return graphs.accelerate(made[0], **options), made[1]


def prompt(turn: int, rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(turn))


def same(model: Any, twin: Any, turn: int, ids: Tensor | None = None, **arguments: Any) -> None:
    """Generate with both from one seed and require the same tokens."""
    ids = prompt(turn) if ids is None else ids
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, **arguments}
    torch.manual_seed(turn)
    wanted = twin.generate(ids, **given)
    torch.manual_seed(turn)
    got = model.generate(ids, **given)
    sequences = [getattr(one, "sequences", one) for one in (wanted, got)]
    assert torch.equal(*sequences), f"call {turn}"
    for name in ("scores", "sequences_scores"):
        if getattr(wanted, name, None) is not None:
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name))


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [*OTHERS, *DECODERS])
def test_a_decoder_generates_eagers_tokens_and_records_once(name: str) -> None:
    model, twin = twins(name)
    for turn in range(3):
        same(model, twin, turn)
    report = graphs.accelerated_report(model)
    assert report.recordings == 1 and report.eager_calls == 0 and not report.refusals, str(report)
    assert report.replays == 3 * (NEW - 1)


class Fewer(LogitsProcessor):
    """A processor of the caller's own, with Python in it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids[:, -1].tolist()[0]] = -1e9
        return scores


class Enough(StoppingCriteria):
    """Stops after three tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)


MODES: dict[str, dict[str, Any]] = {
    "padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])},
    "beams": {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},
    "processor": {"logits_processor": LogitsProcessorList([Fewer()])},
    "stopping": {"stopping_criteria": StoppingCriteriaList([Enough()]), "min_new_tokens": 1},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "end of text": {"min_new_tokens": 1, "max_new_tokens": 24},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_each_way_of_generating_gives_eagers_tokens(mode: str) -> None:
    model, twin = twins()
    for turn in range(3):
        same(model, twin, turn, **MODES[mode])


def test_candidates_of_prompt_lookup_are_checked_as_in_eager() -> None:
    model, twin = twins()
    for turn in range(2):
        same(model, twin, turn, prompt(turn, rows=1), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("mode", ["padded", "beams", "sampling", "penalties", "processor"])
def test_a_third_call_of_one_shape_records_nothing(mode: str) -> None:
    model, twin = twins()
    for turn in range(2):
        same(model, twin, turn, **MODES[mode])
    before = graphs.accelerated_report(model)
    for turn in range(2, 5):
        same(model, twin, turn, **MODES[mode])
    after = graphs.accelerated_report(model)
    assert after.recordings == before.recordings == 1 and after.eager_calls == before.eager_calls
    assert after.replays > before.replays


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_in_either_mode_of_the_caller(context: Any) -> None:
    model, twin = twins()
    with context():
        for turn in range(3):
            same(model, twin, turn)
    assert graphs.accelerated_report(model).replays == 3 * (NEW - 1)


def test_one_mode_after_the_other() -> None:
    model, twin = twins()
    for turn, context in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad)):
        with context():
            same(model, twin, turn)


def test_prompts_of_other_lengths_are_served_by_the_same_recording() -> None:
    model, twin = twins()
    for turn, length in enumerate((3, 12, 20, 7)):
        same(model, twin, turn, prompt(turn, length=length))
    assert graphs.accelerated_report(model).recordings == 1


def test_a_cache_that_is_handed_out_is_the_callers() -> None:
    model, _ = twins()
    kept = []
    for turn in range(3):
        torch.manual_seed(turn)
        result = model.generate(prompt(turn), max_new_tokens=NEW, return_dict_in_generate=True)
        cache = next(getattr(result, name) for name in ("cache", "past_key_values") if getattr(result, name, None) is not None)
        kept.append((cache, cache.layers[0].keys.clone()))
    assert len({id(cache) for cache, _ in kept}) == 3
    for cache, keys in kept:
        assert torch.equal(cache.layers[0].keys, keys), "a later call wrote to it"


def test_a_cache_of_the_callers_is_used_as_it_is() -> None:
    model, twin = twins()
    for kind in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)):
        made = [kind(config=model.config) for _ in range(2)]
        ids = prompt(0)
        wanted = twin.generate(ids, max_new_tokens=NEW, past_key_values=made[0])
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, past_key_values=made[1]), wanted)
        assert made[0].get_seq_length() == made[1].get_seq_length()


def test_outside_of_generate_the_model_is_what_it_was() -> None:
    model, twin = twins()
    with torch.no_grad():
        assert torch.equal(model(prompt(0)).logits, twin(prompt(0)).logits)
    assert graphs.accelerated_report(model).replays == 0
    assert list(model.state_dict()) == list(twin.state_dict())


def test_hooks_weights_and_modes_are_followed() -> None:
    model, twin = twins()
    calls: list[int] = []
    for one in (model, twin):
        one.register_forward_hook(lambda *_: calls.append(1))
    same(model, twin, 0)
    assert len(calls) == 2 * NEW
    with torch.no_grad():
        for one in (model, twin):
            one.lm_head.weight.mul_(-1)
    same(model, twin, 1)
    with graphs.eager():
        same(model, twin, 2)


def test_restore_leaves_nothing_behind() -> None:
    model, twin = twins()
    same(model, twin, 0)
    assert graphs.restore(model) is model
    assert vars(model).keys() == vars(twin).keys()
    same(model, twin, 1)
    with pytest.raises(ConfigError, match=r"graphs\.accelerate was called for"):
        graphs.accelerated_report(model)
    assert graphs.restore(model) is model


def test_accelerating_twice_begins_anew() -> None:
    model, twin = twins()
    same(model, twin, 0)
    assert graphs.accelerate(model) is model
    same(model, twin, 1)
    assert graphs.accelerated_report(model).recordings == 1


def test_a_copy_has_recordings_of_its_own() -> None:
    model, twin = twins()
    same(model, twin, 0)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(-1)
        twin.lm_head.weight.mul_(-1)
    same(copied, twin, 1)
    assert graphs.accelerated_report(copied).replays == graphs.accelerated_report(model).replays


def test_it_is_saved_and_pickled_as_the_model_that_it_is(tmp_path: Path) -> None:
    model, twin = twins()
    same(model, twin, 0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    same(pickle.loads(pickle.dumps(model)), twin, 1)


def test_a_streamer_gets_every_token() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, twin = twins()
    streamers = Streamer(), Streamer()
    for one, streamer in zip((model, twin), streamers, strict=True):
        one.generate(prompt(0, rows=1), max_new_tokens=NEW, streamer=streamer)
    assert streamers[0].tokens == streamers[1].tokens and streamers[0].tokens[-1] == -1


def test_what_cannot_generate_and_options_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model = 'Linear' is not legal; it must be a model with generate"):
        graphs.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="no_such_option"):
        twins(no_such_option=1)


def test_errors_of_generate_are_its_own_and_leave_it_usable() -> None:
    model, twin = twins()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(prompt(0), max_new_tokens=-1)
    same(model, twin, 0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        warnings.simplefilter("ignore", UserWarning)
        yield


def test_a_cache_that_grows_is_warned_about_once() -> None:
    model, _ = twins()
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "cache_implementation": "dynamic"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NotReplayed)
        for turn in range(2):
            model.generate(prompt(turn), **given)
    assert [one.category for one in caught if one.category is NotReplayed] == [NotReplayed]
    assert graphs.accelerated_report(model).refusals[0].count == 2 * (NEW - 1)
