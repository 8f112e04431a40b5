"""Methods of models that somebody replaces, before or behind `accelerate`, are called; and `capture(model).generate`."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import (
    LlamaForCausalLM,
)

import graphs
from tests.generation.loops import loops_of
from tests.test_accelerate import MODES, NEW, prompt, same, twins

Tensor = torch.Tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]


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


def test_the_methods_look_like_those_that_they_stand_for() -> None:
    model, twin = twins()
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)
    got, wanted = (one.generate.__wrapped__(one, prompt(0), max_new_tokens=4, min_new_tokens=4) for one in (model, twin))
    assert torch.equal(got, wanted)
    assert model.forward.__func__ is twin.forward.__func__
