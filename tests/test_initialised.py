"""Caches that initialise themselves at their first call, one for each request: those calls are no recordings in vain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs.dispatch.call_log import INITIALISED, NotReplayed

contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotReplayed)
        yield


class Cache:
    """Has its memory from its first use on."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def get(self) -> Tensor:
        if self.memory is None:
            self.memory = torch.zeros(4)
        return self.memory


def step(x: Tensor, cache: Cache) -> Tensor:
    return x + cache.get().add_(1)


def reasons(captured: Any) -> set[tuple[str, str]]:
    return {(refusal.operator, refusal.detail) for refusal in captured.report().refusals}


@contexts
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("keep", [False, True], ids=["at the same address", "kept"])
def test_each_request_is_replayed_from_its_second_call_on(keep: bool, strict: bool, context: Any) -> None:
    captured, kept = graphs.capture(step, strict=strict), list[Cache]()
    with context():
        for _ in range(12):
            cache = Cache()
            assert [captured(torch.zeros(4), cache)[0].item() for _ in range(4)] == [1, 2, 3, 4]
            if keep:
                kept.append(cache)
            del cache
    report = captured.report()
    assert (report.recordings, report.replays, report.eager_calls) == (1, 36, 12)
    assert reasons(captured) == {("cache.memory", INITIALISED)}


@contexts
def test_requests_that_begin_together_are_all_replayed(context: Any) -> None:
    captured, caches = graphs.capture(step, strict=True), [Cache() for _ in range(9)]
    with context():
        for turn in range(1, 4):
            assert [captured(torch.zeros(4), cache)[0].item() for cache in caches] == [turn] * 9
    assert (captured.report().replays, captured.report().eager_calls) == (18, 9)
    assert reasons(captured) == {("cache.memory", INITIALISED)}


class Keeping(nn.Module):
    """Keeps what its argument says: a call with the other one changes it, and the next does not."""

    kept = 0

    def forward(self, x: Tensor, flag: int) -> Tensor:
        self.kept = 1 + flag
        return x * self.kept


@contexts
def test_calls_of_one_value_that_initialise_are_one_value(context: Any) -> None:
    model = Keeping()
    captured = graphs.capture(model, strict=True)
    with context():
        for flag in (0, 0, 0, 1, 2, 3):
            model.kept = 9
            assert captured(torch.ones(4), flag).tolist() == [1.0 + flag] * 4
    assert reasons(captured) == {("self.kept", INITIALISED)}


def test_objects_that_are_used_once_are_told_by_what_they_do() -> None:
    captured = graphs.capture(step, max_recordings=4)
    with torch.no_grad():
        for _ in range(4):
            captured(torch.zeros(4), Cache())
        with pytest.raises(
            NotReplayed, match="a Cache made anew in each of 4 calls that were recorded or initialised something, and"
        ):
            captured(torch.zeros(4), Cache())
    assert captured.report().eager_calls == 5
