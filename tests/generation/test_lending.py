"""Which cache a call of ``generate()`` is lent: one that the model computes the same with, for what this call is given."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    GitConfig,
    GitForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

import graphs
from tests.generation.loops import host_reasons
from tests.models.architectures import ARCHITECTURES, SIZES
from tests.test_accelerate import prompt, same, twins

Tensor = torch.Tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]
S: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
}


def pair_of(build: Callable[[], Any]) -> tuple[Any, Any]:
    """An accelerated model and the same one as it is; large random weights make what is wrong another token."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(0.8) if "gate" in name else parameter.normal_(std=0.2) if parameter.dim() > 1 else None
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
        made.append(model)
    return graphs.accelerate(made[0]), made[1]


def grown(model: Any) -> list[Any]:
    """What the report says of steps that ran on a cache that grows."""
    return [refusal for refusal in graphs.accelerated_report(model).refusals if "grows" in refusal.detail]


def local() -> Any:
    """Attention with a window that the length of the keys decides about."""
    config = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "max_position_embeddings": 512}
    kinds = {"attention_types": [[["global", "local"], 1]], "bos_token_id": 2, "eos_token_id": 1}
    return GPTNeoForCausalLM(GPTNeoConfig(**config, **kinds))


def test_a_long_call_does_not_make_later_caches_longer_than_they_were_tried() -> None:
    model, twin = pair_of(local)
    for turn, (rows, length) in enumerate([(2, 6), (2, 300), (1, 6), (3, 6), (2, 6)]):
        for again in range(2):
            same(model, twin, turn, prompt(turn + again, rows, length))
    assert "_previous_max_cache_length" not in vars(model)


def test_what_a_model_notes_of_a_callers_static_cache_stays() -> None:
    model, twin = twins()
    model._previous_max_cache_length = 100  # as an eager call with a static cache leaves it
    for turn in range(2):
        same(model, twin, turn)
    assert model._previous_max_cache_length == 100
    ((key, cache),) = model._graphs_accelerated._lending.caches._free
    assert key.size == 64 == cache.layers[0].keys.shape[2]


class Demanding(GPTNeoForCausalLM):
    """A model that cannot be called with tokens alone."""

    def forward(self, *args: Any, adapter: Tensor, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_that_cannot_be_tried_keeps_its_own_cache() -> None:
    def build() -> Any:
        model = ARCHITECTURES["gpt_neo"].build()
        model.__class__ = Demanding
        return model

    model, twin = pair_of(build)
    for turn in range(3):
        same(model, twin, turn, adapter=torch.zeros(()))
    assert grown(model)


@pytest.mark.skipif("nllb-moe" not in CONFIG_MAPPING, reason="this release of transformers has no nllb-moe")
def test_an_encoder_is_tried_with_what_it_gives() -> None:
    """Its decoder reads the output by name; with its static cache it computes something else."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    experts = {"num_experts": 4, "expert_capacity": 8, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    config = CONFIG_MAPPING["nllb-moe"](**{**sizes, **experts, "decoder_start_token_id": 2})

    def build() -> Any:
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.generation_config.decoder_start_token_id, model.generation_config.forced_eos_token_id = 2, None
        return model

    model, twin = pair_of(build)
    for turn in range(3):
        same(model, twin, turn, prompt(turn, 4, 8), do_sample=True)


def test_a_cache_of_recurrent_states_alone_does_not_see_the_prompt_twice() -> None:
    if "lfm3" not in ARCHITECTURES:
        pytest.skip("this release of transformers has no lfm3")
    model, twin = pair_of(ARCHITECTURES["lfm3"].build)
    for one in (model, twin):
        one.model.layers[0].register_forward_hook(lambda module, args, output: time.time() and None)
    for turn in range(3):
        ids = prompt(turn)
        same(model, twin, turn, ids, attention_mask=torch.ones_like(ids))
    assert "a cache of recurrent states alone" in host_reasons(model)


def with_images() -> Any:
    text = {**S, "num_key_value_heads": 2, "num_hidden_layers": 4, "cross_attention_layers": [1]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 16}
    vision |= {"num_attention_heads": 2, "vision_output_dim": 32, "image_size": 8, "patch_size": 4, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=63))


def images(turn: int, number: int) -> dict[str, Any]:
    """A prompt of six tokens, of which ``number`` stand for images."""
    ids = prompt(turn)
    if not number:
        return {"ids": ids}
    ids[:, :number] = 63
    pixels = torch.randn(2, number, 1, 3, 8, 8, generator=torch.Generator().manual_seed(turn))
    ratios, ones = torch.ones(2, number, dtype=torch.long), torch.ones(2, number, 1, dtype=torch.long)
    seen = {"cross_attention_mask": torch.ones(2, 6, number, 1, dtype=torch.long), "attention_mask": torch.ones_like(ids)}
    return {"ids": ids, "pixel_values": pixels, "aspect_ratio_ids": ratios, "aspect_ratio_mask": ones, **seen}


def test_layers_keep_nothing_of_images_for_a_call_with_others_or_none() -> None:
    model, twin = pair_of(with_images)
    for turn, number in enumerate([0, 1, 0, 2, 1, 3, 0, 2]):
        same(model, twin, turn, **images(turn, number))
    assert not grown(model)


def test_a_prompt_that_fails_on_a_fixed_cache_runs_on_one_of_its_own() -> None:
    """GIT joins the mask, which a fixed cache gives another form, to that of an image."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, twin = pair_of(lambda: GitForCausalLM(GitConfig(**S, vision_config={**vision, "image_size": 8, "patch_size": 4})))
    for turn in range(2):
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(turn))
        same(model, twin, turn, pixel_values=pixels)
        same(model, twin, turn)  # without one, where it does not fail
    assert graphs.accelerated_report(model).replays and grown(model)


def test_an_error_of_the_callers_is_raised_as_it_is_and_cures_nothing() -> None:
    model, twin = twins()
    for _ in range(2):
        for one in (model, twin):
            with pytest.raises(IndexError, match="index out of range"):
                one.generate(prompt(0) + 1000, max_new_tokens=4)
    same(model, twin, 0)
    assert not grown(model)


class Stumbling(torch.nn.Module):
    """A layer's norm that can be told to fail."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.fails: type[Exception] | None = None

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.fails is not None:
            raise self.fails("stumbled")
        return self.inner(x)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_want_of_memory_says_nothing_of_a_kind_of_prompt(error: type[Exception]) -> None:
    model, twin = twins()
    model.model.norm = Stumbling(model.model.norm).eval()
    model.model.norm.fails = error
    with pytest.raises(error, match="stumbled"):
        model.generate(prompt(0), max_new_tokens=4)
    assert model.model.norm.calls == 1
    model.model.norm.fails = None
    same(model, twin, 1)
    assert not grown(model)


def test_a_prompt_of_a_kind_that_ran_is_not_run_again_where_it_fails() -> None:
    model, twin = twins()
    model.model.norm = Stumbling(model.model.norm).eval()
    same(model, twin, 0)
    model.model.norm.fails, model.model.norm.calls = RuntimeError, 0
    with pytest.raises(RuntimeError, match="stumbled"):
        model.generate(prompt(1), max_new_tokens=4)
    assert model.model.norm.calls == 1
    model.model.norm.fails = None
    same(model, twin, 2)
    assert not grown(model)


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_that_asserts_keeps_its_own_cache(causal: bool) -> None:
    sizes = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 128}
    kinds = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "causal": causal}
    model, twin = pair_of(lambda: XLMWithLMHeadModel(XLMConfig(**sizes, **kinds)))
    for turn in range(2):
        same(model, twin, turn)


def test_modules_whose_state_was_kept_may_be_taken_out() -> None:
    model, twin = pair_of(ARCHITECTURES["recurrent_gemma"].build)
    for turn in range(2):
        same(model, twin, turn)
    for one in (model, twin):
        one.model.layers, one.config.num_hidden_layers = one.model.layers[1:], 1
        one.config.block_types = one.config._block_types = ["attention"]
        one.model.layers[0].temporal_block.layer_idx = 0
    for turn in range(2):
        same(model, twin, turn)


def test_new_embeddings_are_no_reason_to_run_eagerly() -> None:
    model, twin = twins()
    same(model, twin, 0)
    for one in (model, twin):
        torch.manual_seed(5)
        one.resize_token_embeddings(80)
    assert any(module.training for module in model.modules())
    for turn in range(2):
        same(model, twin, turn)
    assert not grown(model)


class LowRank(torch.nn.Module):
    """A linear layer with an addition of two thin ones, as adapters make it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.a = inner, torch.nn.Linear(inner.in_features, 2, bias=False)
        self.b = torch.nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x) + self.b(self.a(x))
        return result


def test_a_module_in_training_is_named_with_the_cure() -> None:
    model, twin = twins()
    for one in (model, twin):
        torch.manual_seed(1)
        one.model.layers[0].self_attn.q_proj = LowRank(one.model.layers[0].self_attn.q_proj)
    same(model, twin, 0)
    (refusal,) = grown(model)
    assert "call eval(): 'model.layers.0.self_attn.q_proj' is in training mode" in refusal.remedy
    model.eval()
    same(model, twin, 1)
    assert [one.count for one in grown(model)] == [refusal.count]


def test_a_cache_that_is_there_is_lent_without_making_another() -> None:
    model, twin = twins()
    same(model, twin, 0)
    made = []
    prepare = LlamaForCausalLM._prepare_static_cache
    signature = inspect.signature(prepare)
    assert "max_cache_len" in signature.parameters, transformers.__version__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return prepare(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "_prepare_static_cache", counted)
        same(model, twin, 1)
    assert not made
