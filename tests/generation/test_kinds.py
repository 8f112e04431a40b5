"""What programs do to a model and to transformers beside calling ``generate()``: it stays as in eager."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.generation import logits_process

import graphs
from tests.generation.loops import host_reasons, loops_of
from tests.models.architectures import ARCHITECTURES
from tests.test_accelerate import prompt, same, twins

Tensor = torch.Tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]


def test_buffers_and_hooks_count_as_in_eager_from_the_first_call_on() -> None:
    """A trial of a cache runs the model: what it counts is put back, and hooks do not see it."""
    pair, calls = twins(), ([], [])
    for model, seen in zip(pair, calls, strict=True):
        model.model.register_buffer("count", torch.zeros((), dtype=torch.int64))
        numbers = itertools.count()
        generator = torch.Generator().manual_seed(0)

        def count(module: Any, args: Any, numbers: Any = numbers, seen: Any = seen, generator: Any = generator) -> None:
            module.count.add_(1)
            seen.append((next(numbers), float(torch.rand((), generator=generator))))

        model.model.register_forward_pre_hook(count)
    for turn in range(3):
        same(*pair, turn)
        assert torch.equal(pair[0].model.count, pair[1].model.count) and calls[0] == calls[1]


class Counting(torch.nn.Module):
    """A feed-forward part that counts its tokens in a buffer."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.tokens.add_(x.shape[0] * x.shape[1])
        return self.inner(x)


def test_what_a_module_counts_is_what_eager_counts() -> None:
    pair = twins()
    for model in pair:
        model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    for turn in range(3):
        same(*pair, turn)
        assert torch.equal(*(model.model.layers[0].mlp.tokens for model in pair))


def test_a_cache_of_another_form_is_not_lent() -> None:
    for change in ("window", "dtype"):
        name = "mistral" if change == "window" else "llama"
        pair = [ARCHITECTURES[name].build() for _ in range(2)]
        graphs.accelerate(pair[0])
        for turn in range(5):
            same(*pair, turn)
            for model in pair:
                if change == "window" and turn == 2:
                    model.config.sliding_window = 4
                elif change == "dtype" and turn in (1, 3):
                    model.to(torch.bfloat16 if turn == 1 else torch.float32)


def test_keys_of_another_dtype_than_before_are_stored() -> None:
    """As a library that puts autocast inside of the model after the first call."""
    pair = twins()
    for turn in range(4):
        same(*pair, turn)
        if turn == 1:
            for model in pair:
                for layer in model.model.layers:
                    layer.self_attn.to(torch.float64)
                    layer.self_attn.register_forward_pre_hook(doubled, with_kwargs=True)
                    layer.self_attn.register_forward_hook(lambda module, args, out: (out[0].float(), *out[1:]))


def doubled(module: Any, args: Any, kwargs: Any) -> Any:
    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}


class Turned(LlamaForCausalLM):
    """Finds the opposite of what its base finds likely."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


def test_a_class_that_is_exchanged_later_is_called() -> None:
    pair = twins()
    for turn in range(6):
        if turn == 3:
            for model in pair:
                model.__class__ = Turned
        same(*pair, turn)


def test_one_layer_in_training_draws_as_in_eager() -> None:
    pair = twins()
    for model in pair:
        model.model.layers[1].self_attn.attention_dropout = 0.5
        model.model.layers[1].train()
    for turn in range(3):
        same(*pair, turn)


def test_an_encoder_runs_once_for_a_loop_of_another_kind() -> None:
    pair = [ARCHITECTURES["t5"].build() for _ in range(2)]
    graphs.accelerate(pair[0])
    counts: list[list[int]] = [[], []]
    for model, seen in zip(pair, counts, strict=True):
        model.encoder.register_forward_hook(lambda *_, seen=seen: seen.append(1))
    for turn in range(2):
        same(*pair, turn, ARCHITECTURES["t5"].inputs(turn)["input_ids"][:1], prompt_lookup_num_tokens=2)
    assert len(counts[0]) == len(counts[1])


PATCHED: dict[str, tuple[Any, str]] = {
    "multinomial": (torch, "multinomial"),
    "argmax": (torch, "argmax"),
    "processor": (logits_process.RepetitionPenaltyLogitsProcessor, "__call__"),
    "list of processors": (logits_process.LogitsProcessorList, "__call__"),
}


@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.parametrize("kind", PATCHED)
def test_functions_of_the_loop_that_a_program_replaces_are_called(kind: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = PATCHED[kind]
    own, called = getattr(owner, name), []

    def replaced(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return own(*args, **kwargs)

    pair, sampled = twins(), kind != "argmax"
    for turn in range(4):
        if turn == (0 if when == "before" else 2):
            monkeypatch.setattr(owner, name, replaced)
        counts = []
        for model in pair:
            before = len(called)
            torch.manual_seed(turn)
            model.generate(prompt(turn), max_new_tokens=6, min_new_tokens=6, do_sample=sampled, repetition_penalty=1.2)
            counts.append(len(called) - before)
        assert counts[0] == counts[1]
    assert called and bool(loops_of(pair[0])) == (when == "later")
    assert host_reasons(pair[0])


def test_attentions_are_as_wide_as_the_tokens() -> None:
    model, twin = (one.eval() for one in twins())
    for one in (model, twin):
        one.set_attn_implementation("eager")
    given = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_attentions": True}
    for turn in range(2):
        found = [one.generate(prompt(turn), **given).attentions for one in (model, twin)]
        assert [[layer.shape for layer in step] for step in found[0]] == [[layer.shape for layer in step] for step in found[1]]


def test_router_logits_are_computed_from_the_tokens_there_are() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    twin = MixtralForCausalLM(config).eval()
    model = MixtralForCausalLM(config).eval()
    model.load_state_dict(twin.state_dict())
    for one in (model, twin):
        one.generation_config.pad_token_id = 0
    graphs.accelerate(model)
    for turn in range(2):
        same(model, twin, turn, output_router_logits=True)


def test_weights_that_are_not_numbers_at_first_are_no_reason_for_ever() -> None:
    model, twin = twins()
    for one in (model, twin):
        one.held = one.lm_head.weight.data.clone()
        one.lm_head.weight.data.fill_(float("nan"))
    same(model, twin, 0)
    for one in (model, twin):
        one.lm_head.weight.data.copy_(one.held)
    for turn in range(1, 4):
        same(model, twin, turn)
    assert graphs.accelerated_report(model).replays


def test_a_custom_loop_of_the_callers_has_the_models_own_cache() -> None:
    kinds: list[str] = []

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        cache = next(value for name, value in kwargs.items() if name in ("cache", "past_key_values"))
        kinds.append(type(cache).__name__)
        return input_ids

    for one in twins():
        one.generate(prompt(0), custom_generate=loop, max_new_tokens=2)
    assert kinds[0] == kinds[1]
