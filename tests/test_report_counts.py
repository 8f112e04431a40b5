"""What a report counts: eager calls by their reasons, and recordings that were made all the same beside them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.rewriting.checked_replay import Speculation

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _quiet() -> object:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", NotReplayed)
        yield


def test_a_recording_made_anew_is_no_call_that_was_not_replayed() -> None:
    settings = SimpleNamespace(scale=1.0)
    step = graphs.capture(lambda x: x * settings.scale)
    for call in range(20):
        settings.scale = 1.0 + (call >= 10)
        assert step(torch.ones(2)).tolist() == [settings.scale] * 2
    report = step.report()
    (refusal,) = report.refusals
    assert (report.replays, report.eager_calls) == (20, 0)
    assert (refusal.reason, refusal.count, refusal.recorded) == ("changing-value", 0, 1)
    assert "recorded otherwise 1x: changing-value" in str(report) and "not replayed" not in str(report)


def test_the_counts_of_reasons_add_up_to_the_eager_calls() -> None:
    settings = SimpleNamespace(scale=1.0)
    step = graphs.capture(lambda x: x * settings.scale)
    for call in range(8):
        settings.scale = float(call)
        step(torch.ones(2))
    report = step.report()
    assert report.eager_calls == sum(refusal.count for refusal in report.refusals) > 0


def test_a_graph_that_breaks_its_assumption_in_its_own_call_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, attempts = Speculation.ran, []

    def broken(self: Speculation, flag: Tensor, saved: object) -> None:
        attempts.append(self)
        ran(self, torch.ones_like(flag), saved)  # type: ignore[arg-type]

    monkeypatch.setattr(Speculation, "ran", broken)

    def model(x: Tensor) -> Tensor:
        if x.sum().item() > 2:
            return torch.cat([x, x])  # of another shape, so that the branch is an assumption
        return x

    step = graphs.capture(model)
    for _ in range(3):
        assert step(torch.ones(3)).tolist() == [1.0] * 6
    report = step.report()
    assert (report.recordings, report.replays, report.eager_calls) == (0, 0, 3)
    assert report.refusals[0].reason == "verify-mismatch" and report.refusals[0].count == 3
    assert len({id(one) for one in attempts}) <= 2


@pytest.mark.parametrize("limit", [2**63, 2**64, -(2**64), 10**20])
@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
def test_numbers_beyond_64_bits_are_compared_as_python_does(limit: int, kind: torch.dtype) -> None:
    def model(x: Tensor) -> Tensor:
        n = x.to(kind).sum().item()
        return x * 2 if n < limit else x * 3 if n != limit else x

    step = graphs.capture(model)
    for value in (3, -1, 2**62, -(2**62), 0):
        x = torch.tensor([value])
        assert torch.equal(step(x), model(x))
    report = step.report()
    assert (report.recordings, report.replays) == (1, 5), str(report)
