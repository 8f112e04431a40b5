"""The loop of ``generate()`` on a step that feeds itself: where it serves, what it leaves to transformers, and equal tokens."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import (
    MaxLengthCriteria,
    StoppingCriteriaList,
)

import graphs
from graphs.events import Recorded
from graphs.generation.loop import Loop
from graphs.generation.token_step import TokenStep
from tests.generation.loops import host_reasons, loops_of
from tests.test_accelerate import MODES, NEW, prompt, same, twins

Tensor = torch.Tensor
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


def test_a_criterion_with_a_length_of_its_own_is_followed() -> None:
    model, twin = twins()
    for turn in range(2):
        criteria = StoppingCriteriaList([MaxLengthCriteria(90)])
        same(model, twin, turn, stopping_criteria=criteria, max_new_tokens=20, min_new_tokens=1)
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


class Passing(TorchDispatchMode):
    """A mode that runs each operator as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [graphs.eager, Passing])
def test_what_stood_in_the_way_once_is_forgotten_with_the_call(mode: Any) -> None:
    model, twin = twins()
    with mode():
        same(model, twin, 0)
    assert not loops_of(model)
    for turn in range(1, 3):
        same(model, twin, turn)
    assert len(loops_of(model)) == 1


def test_what_stands_in_the_way_each_time_is_not_tried_for_ever() -> None:
    model, twin = twins()
    for turn in range(5):
        with Passing():
            same(model, twin, turn)
    assert model._graphs_accelerated.loop._unfit


def test_more_kinds_of_generations_in_turn_than_recordings_are_not_recorded_at_each_call() -> None:
    made: list[Recorded] = []
    model, twin = twins(max_recordings=2)
    listener = graphs.on_event(lambda event: made.append(event) if isinstance(event, Recorded) else None)
    counts = []
    for turn in range(7):
        for rows in (1, 2, 3):
            same(model, twin, turn, prompt(turn, rows=rows))
        counts.append(len(made))
    listener.remove()
    assert counts[-1] == counts[-2] and len(loops_of(model)) <= 2
    assert "max_recordings" in host_reasons(model)[-1]
