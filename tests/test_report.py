"""The report: counts of everything that happened, as plain data, text and JSON."""

from __future__ import annotations

import dataclasses
import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graphs
from graphs.dispatch.call_log import CallLog, NotReplayed
from graphs.observation.timing import CallTime
from graphs.report import CaptureReport, KeyReport, RefusalCount
from graphs.rewriting.proof import Proof
from tests.parity import batches


def two_keys(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 + y


def used_step() -> graphs.CapturedModule[..., Any]:
    """Two buckets with 3 replays of 5 rows and 1 of 7, two refused calls, one eager call."""
    step = graphs.capture(two_keys, buckets=[4, 8], batch_dims={"x": 0, "y": 0})
    for rows in (3, 1, 1, 7):
        step(torch.ones(rows, 2), torch.ones(rows, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        for _ in range(2):
            step(torch.ones(9, 2), torch.ones(9, 2))
    with graphs.eager():
        step(torch.ones(1, 2), torch.ones(1, 2))
    return step


def from_json(text: str) -> CaptureReport:
    data = json.loads(text)
    data["refusals"] = tuple(RefusalCount(**item) for item in data["refusals"])
    data["keys"] = tuple(KeyReport(**item) for item in data["keys"])
    return CaptureReport(**data)


def test_counts_add_up_to_the_calls() -> None:
    report = used_step().report()
    assert (report.recordings, report.replays, report.eager_calls) == (2, 4, 3)
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [("above-largest-bucket", 2)]
    assert report.device == "cpu" and report.mode == "graph"


def test_each_recording_has_its_figures() -> None:
    small, large = sorted(used_step().report().keys, key=lambda key: key.rows or 0)
    assert (small.rows, small.replays, large.rows, large.replays) == (4, 3, 8, 1)
    assert small.padding_waste == pytest.approx(1 - 5 / 12) and large.padding_waste == pytest.approx(1 / 8)
    assert "x[4, 2]" in small.key and "y[8, 2]" in large.key
    for key in (small, large):
        assert key.capture_seconds > 0 and key.pool_bytes > 0 and key.device_free_delta == 0
        assert key.eager_host_us is not None and key.eager_host_us > 0
        assert key.replay_host_us is not None and key.replay_host_us > 0
        assert key.eager_device_us is None and key.replay_device_us is None, "a CPU has no device time"


def test_pool_bytes_are_those_of_the_intermediates() -> None:
    step = graphs.capture(lambda x: (x + 1).relu())
    step(torch.ones(250))
    assert step.report().keys[0].pool_bytes == 2 * 250 * 4


def test_json_holds_everything() -> None:
    report = used_step().report()
    assert from_json(report.to_json()) == report
    assert "\n" not in report.to_json(indent=None)
    assert set(json.loads(report.to_json())) == {field.name for field in dataclasses.fields(CaptureReport)}


def test_text_names_recordings_and_refusals_with_their_remedy() -> None:
    report = used_step().report()
    lines = str(report).splitlines()
    assert lines[0] == "graphs: 2 recording(s) on cpu, 4 replay(s), 3 eager call(s), mode graph"
    assert sum("bucket 4, 58% padding): 3 replays" in line for line in lines) == 1
    assert sum("not replayed 2x: above-largest-bucket [batch]" in line for line in lines) == 1
    assert any(report.refusals[0].remedy in line for line in lines)


def test_text_of_a_step_that_never_ran() -> None:
    assert (
        str(graphs.capture(two_keys).report()) == "graphs: 0 recording(s) on no device, 0 replay(s), 0 eager call(s), mode graph"
    )


KEY = KeyReport("x[4]", None, 7, 100.0, 80.0, 10.0, 8.0, 0.5, 3 << 20, 1 << 20, 0.0, 5556)


def test_text_of_a_recording_on_a_device() -> None:
    text = str(CaptureReport("cuda:0", "graph", 1, 7, 0, (), (KEY,)))
    assert "x[4] (exact sizes): 7 replays, recorded in 0.50 s, pays after 5556 calls" in text
    assert "host 100 us eager, 10 us replayed; device 80 us eager, 8 us replayed; pool 3.0 MiB, device memory 1.0 MiB" in text


def test_text_of_a_recording_that_is_no_faster() -> None:
    slow = dataclasses.replace(KEY, break_even_calls=None)
    assert "never pays" in str(CaptureReport("cpu", "graph", 1, 7, 0, (), (slow,)))


def test_a_report_is_frozen_and_does_not_follow_the_step() -> None:
    step = graphs.capture(two_keys)
    before = step.report()
    step(torch.ones(2), torch.ones(2))
    assert before.replays == 0 and step.report().replays == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.replays = 5  # type: ignore[misc]


def test_the_mode_is_the_present_one() -> None:
    step = graphs.capture(two_keys, mode="eager")
    step(*batches((2,), (2,))[0], torch.ones(2))
    assert step.report().mode == "eager" and step.report().eager_calls == 1
    step.mode = "graph"
    assert step.report().mode == "graph"


def test_replays_of_a_dropped_recording_still_count() -> None:
    step = graphs.capture(two_keys)
    for _ in range(3):
        step(torch.ones(2), torch.ones(2))
    step.invalidate()
    assert (step.report().recordings, step.report().replays) == (0, 3)


def timed(eager: CallTime, replay: CallTime) -> Any:
    """As much of a recording as the ledger looks at."""
    contract, recording = SimpleNamespace(rows=None), SimpleNamespace(pool_bytes=0)
    times = {"eager": eager, "replay": replay, "capture_seconds": 0.5}
    compiled = {"compiler": "none", "compile_seconds": 0.0, "candidates": {}, "rewrites": {}, "proof": Proof()}
    return SimpleNamespace(
        key="x[4]", contract=contract, recording=recording, replays=3, real_rows=3, device_free_delta=0, **times, **compiled
    )


def test_break_even_is_capture_time_over_what_a_replay_saves() -> None:
    """The longer of host and device time counts: 100 us eager, 50 us replayed."""
    report = CallLog().report("cuda:0", "graph", [timed(CallTime(100.0, 60.0), CallTime(20.0, 50.0))])
    assert report.keys[0].break_even_calls == 10_001
    report = CallLog().report("cuda:0", "graph", [timed(CallTime(100.0, 60.0), CallTime(20.0, 110.0))])
    assert report.keys[0].break_even_calls is None
