"""``graphs.accelerate`` on a device: tokens, random numbers and cache as in eager, and a host that hardly waits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

import graphs
from graphs.generation.loop import CACHES
from tests.test_accelerate import MODES, prompt, twins

Tensor = torch.Tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed"),
]


def on_device(name: str, device: torch.device, **options: Any) -> tuple[Any, Any]:
    """An accelerated model and the same one as it is, on a device."""
    _, model = twins(name)
    twin = copy.deepcopy(model).to(device)
    return graphs.accelerate(model.to(device), **options), twin


def generated(model: Any, seed: int, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The tokens of a seed, and the next random numbers."""
    torch.manual_seed(seed)
    result = model.generate(ids, **arguments)
    return getattr(result, "sequences", result), torch.rand(3, device=ids.device)


def same(model: Any, twin: Any, seed: int, ids: Tensor, **arguments: Any) -> int:
    """Require the same tokens and the same random numbers afterwards; the length."""
    wanted, drawn = generated(twin, seed, ids, **arguments)
    got, drawn_after = generated(model, seed, ids, **arguments)
    assert torch.equal(wanted, got), (wanted.tolist(), got.tolist())
    assert torch.equal(drawn, drawn_after)
    return int(got.shape[1])


@contextmanager
def host_waits() -> Iterator[list[int]]:
    """Counts what waits for the device: reads of values, and events."""
    waits, synchronize = [0], torch.cuda.Event.synchronize

    def counted(event: Any) -> None:
        waits[0] += 1
        synchronize(event)

    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(torch.cuda.Event, "synchronize", counted)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits[0] += sum("synchronizing" in str(one.message) for one in caught)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_next", "t5", "minimax", "deepseek_v4"])
def test_tokens_are_eagers_and_the_third_call_records_nothing(name: str, device: torch.device) -> None:
    model, twin = on_device(name, device)
    for seed in range(2):
        same(model, twin, seed, prompt(seed).to(device), max_new_tokens=24, min_new_tokens=24)
    before = graphs.accelerated_report(model)
    for seed in range(2, 5):
        same(model, twin, seed, prompt(seed).to(device), max_new_tokens=24, min_new_tokens=24)
    after = graphs.accelerated_report(model)
    assert before.recordings == after.recordings >= 1, str(after)
    assert after.replays >= before.replays + 3 * 23 and after.eager_calls == before.eager_calls, str(after)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("processor", "stopping")])
def test_each_way_of_generating(mode: str, device: torch.device) -> None:
    model, twin = on_device("llama", device)
    arguments = {"max_new_tokens": 24, "min_new_tokens": 24, **MODES[mode]}
    if "attention_mask" in arguments:
        arguments["attention_mask"] = arguments["attention_mask"].to(device)
    for seed in range(3):
        same(model, twin, seed, prompt(seed).to(device), **arguments)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_end_that_is_seen_late_leaves_nothing_behind(sampled: bool, rows: int, device: torch.device) -> None:
    model, twin = on_device("llama", device)
    lengths = set()
    for seed in range(12):
        ends = [1, *range(10 + seed, 20 + seed)]
        ids = prompt(seed, rows).to(device)
        lengths.add(same(model, twin, seed, ids, max_new_tokens=57, do_sample=sampled, eos_token_id=ends))
    assert len(lengths) > 3 and min(lengths) < 40, lengths


def test_a_cache_that_is_handed_out_ends_where_eagers_does(device: torch.device) -> None:
    model, twin = on_device("llama", device)
    for seed in range(4):
        arguments = {"max_new_tokens": 40, "eos_token_id": [1, *range(10, 20)], "return_dict_in_generate": True}
        results = []
        for one in (twin, model):
            torch.manual_seed(seed)
            results.append(one.generate(prompt(seed).to(device), cache_implementation="static", **arguments))
        wanted, got = ((next(getattr(r, name) for name in CACHES if getattr(r, name, None) is not None)) for r in results)
        assert int(wanted.get_seq_length()) == int(got.get_seq_length())


def test_the_host_waits_once_in_sixteen_tokens(device: torch.device) -> None:
    model, _ = on_device("llama", device)
    arguments = {"do_sample": True, "eos_token_id": 63, "suppress_tokens": [63]}
    for new in (2, 50, 2, 50):
        model.generate(prompt(0).to(device), max_new_tokens=new, cache_implementation="static", **arguments)
    counts = {}
    for new in (2, 50):
        with host_waits() as waits:
            model.generate(prompt(0).to(device), max_new_tokens=new, cache_implementation="static", **arguments)
        counts[new] = waits[0]
    assert counts[50] - counts[2] <= 3, counts
