"""State of another form than keys by position: assigned to modules, handed through in lists, keys that end with the sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

import graphs
from graphs.generation.caches.end_cache import EndCache, EndLayer
from graphs.generation.module_states import ModuleStates
from tests.models.architectures import ARCHITECTURES, prompt

Tensor = torch.Tensor
NAMES = ("recurrent_gemma", "rwkv", "gpt_neo", "mvp")
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "long": {"max_new_tokens": 24, "min_new_tokens": 24},
    "penalty": {"repetition_penalty": 1.3},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]


def same(model: Any, twin: Any, turn: int, inputs: dict[str, Any], **arguments: Any) -> None:
    given = {"max_new_tokens": 8, "min_new_tokens": 8, **arguments}
    found = []
    for one in (model, twin):
        torch.manual_seed(turn)
        found.append(one.generate(**inputs, **given))
    assert torch.equal(*found), f"call {turn}"


@pytest.mark.slow
@pytest.mark.one_in(4)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_eagers_and_nothing_is_recorded_again(name: str, variant: str, context: Any) -> None:
    if name == "rwkv" and variant == "beams":
        pytest.skip("transformers refuses beams for a model whose state it cannot reorder")
    model, twin = graphs.accelerate(ARCHITECTURES[name].build()), ARCHITECTURES[name].build()
    counts = []
    with context():
        for turn in range(4):
            same(model, twin, turn, ARCHITECTURES[name].inputs(turn), **VARIANTS[variant])
            counts.append(graphs.accelerated_report(model).recordings)
    if any("get_seq_length was a method" in refusal.detail for refusal in graphs.accelerated_report(model).refusals):
        pytest.skip("this release of transformers assigns a method to its cache at each step")
    assert counts[0] >= 1 and counts[2] == counts[3], counts


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_other_lengths_and_padded_ones(name: str) -> None:
    model, twin = graphs.accelerate(ARCHITECTURES[name].build()), ARCHITECTURES[name].build()
    for turn, (length, padded) in enumerate([(6, 0), (9, 0), (9, 3), (1, 0), (7, 2), (6, 0)]):
        ids = prompt(turn)[:, :1].repeat(1, length)
        ids = (ids + torch.arange(length)) % 50 + 3
        mask = torch.ones_like(ids)
        if padded and name not in ("rwkv", "recurrent_gemma"):  # which read what is padded
            mask[0, :padded], ids[0, :padded] = 0, 0
        same(model, twin, turn, {"input_ids": ids, "attention_mask": mask})


def test_modules_keep_tensors_of_their_own_behind_a_generation() -> None:
    model = graphs.accelerate(ARCHITECTURES["recurrent_gemma"].build())
    twin = ARCHITECTURES["recurrent_gemma"].build()
    held = []
    for turn in range(3):
        same(model, twin, turn, ARCHITECTURES["recurrent_gemma"].inputs(turn))
        states, wanted = ModuleStates(model).held(), ModuleStates(twin).held()
        for place, state in wanted.items():
            torch.testing.assert_close(states[place], state)
        held.append({place: (state, state.clone()) for place, state in states.items()})
    for states in held:
        assert all(torch.equal(state, before) for state, before in states.values()), (
            "a later generation wrote what was handed out"
        )


def test_a_copy_and_a_restored_model_go_on() -> None:
    model, twin = graphs.accelerate(ARCHITECTURES["recurrent_gemma"].build()), ARCHITECTURES["recurrent_gemma"].build()
    inputs = ARCHITECTURES["recurrent_gemma"].inputs
    for turn in range(2):
        same(model, twin, turn, inputs(turn))
    for one in (copy.deepcopy(model), graphs.restore(model)):
        for turn in range(2, 4):
            same(one, twin, turn, inputs(turn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_mask_is_moved_to_where_the_keys_are(dtype: torch.dtype) -> None:
    cache = EndCache(1, 8)
    layer = cache.layers[0]
    assert isinstance(layer, EndLayer) and layer.get_mask_sizes(3) == (3, 0)
    keys = torch.arange(1.0, 4).view(1, 1, 3, 1)
    assert torch.equal(cache.update(keys, keys, 0)[0], keys) and layer.get_mask_sizes(1) == (8, 0)
    given = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]]).bool()[:, None, None]  # the first is padding; by position
    given = given if dtype is torch.bool else torch.zeros(1, 1, 1, 8).masked_fill(~given, torch.finfo(dtype).min)
    with cache.decode_step(1, {"attention_mask": given}) as wanted:
        mask = wanted["attention_mask"]
        stored = cache.update(torch.full((1, 1, 1, 1), 4.0), torch.full((1, 1, 1, 1), 4.0), 0)[0]
    seen = mask if dtype is torch.bool else mask == 0
    assert stored.flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert seen.flatten().tolist() == [False] * 5 + [True] * 3
    for given in (None, torch.tensor([[0, 1, 1, 1, 1]])):
        with cache.decode_step(1, {"attention_mask": given}) as wanted:
            seen = wanted["attention_mask"] == 0
        assert seen.flatten().tolist() == [False] * 3 + [given is None] + [True] * 4
    cache.reset()
    assert not layer.begun and not layer.keys.any() and layer.get_mask_sizes(2) == (2, 0)
