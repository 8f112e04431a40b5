"""Events, the log and ranges: what is told of recordings, replays and refusals, and what it costs a replay that nobody asks."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import graphs
from graphs.contract.eligibility import name_of
from graphs.dispatch.call_log import NotReplayed
from graphs.events import Event, Evicted, Moved, Recorded, Refused, Replayed, emit
from graphs.events.listeners import listeners
from graphs.objects.torch_fast_paths import _AsksForProfiler

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    assert listeners.known == (), "a test left a callback behind"


@pytest.fixture
def events() -> Iterator[list[Event]]:
    told: list[Event] = []
    with graphs.on_event(told.append):
        yield told


def plus_one(x: Tensor) -> Tensor:
    return x + 1


def reads(x: Tensor) -> Tensor:
    return x * float(torch.from_numpy(x.numpy()).sum())


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def test_a_recording_and_its_replays_are_told(events: list[Event]) -> None:
    step = graphs.capture(plus_one)
    for _ in range(2):
        step(X)
    recorded, first, second = events
    key = step.report().keys[0]
    assert isinstance(recorded, Recorded) and isinstance(first, Replayed) and isinstance(second, Replayed)
    assert (recorded.step, recorded.key, recorded.rows) == ("plus_one", "x[3, 4]", None)
    assert (recorded.seconds, recorded.bytes) == (key.capture_seconds, key.pool_bytes)
    assert (first.step, first.key, first.rows, first.real_rows) == ("plus_one", "x[3, 4]", None, 1)
    assert 0 < second.seconds < recorded.seconds and recorded.time <= first.time <= second.time


def test_a_padded_replay_tells_its_bucket_and_its_rows(events: list[Event]) -> None:
    step = graphs.capture(plus_one, buckets=[4], batch_dims={"x": 0}, name="padded")
    step.record_buckets(X)
    step(X)
    recorded, replayed = events
    assert (recorded.step, recorded.rows, recorded.size, recorded.key) == ("padded", 4, "4 rows", "x[4, 4]")
    assert isinstance(replayed, Replayed) and (replayed.rows, replayed.real_rows) == (4, 3)


def test_each_refused_call_is_told_with_what_the_report_says(events: list[Event]) -> None:
    step = graphs.capture(reads)
    with pytest.warns(NotReplayed):
        for _ in range(3):
            step(X)
    assert kinds(events) == ["refused"] * 3
    (counted,) = step.report().refusals
    for index, told in enumerate(events):
        assert isinstance(told, Refused) and told.first == (index == 0) and told.outcome == "this call runs eagerly"
        for name in ("reason", "operator", "detail", "remedy", "file", "line"):
            assert getattr(told, name) == getattr(counted, name)


def test_a_call_that_is_recorded_anew_says_so(events: list[Event]) -> None:
    step = graphs.capture(nn.Dropout(0.5).eval())
    step(X)
    step.p = 0.25  # drops the recordings: told by nobody, since the caller did it
    step(X)
    step._graphs_model.p = 0.75
    with pytest.warns(NotReplayed):
        step(X)
    assert kinds(events) == ["recorded", "replayed"] * 2 + ["refused", "recorded", "replayed"]
    assert isinstance(events[4], Refused) and events[4].outcome == "the step is recorded anew"


def test_every_branch_of_a_step_is_told(events: list[Event]) -> None:
    def decides(x: Tensor) -> Tensor:
        return (x + 1 if x.sum() > 0 else torch.sort(x)[0]) * 2

    step = graphs.capture(decides)
    positive, negative = X.abs(), -X.abs()
    for x in (positive, negative, positive, negative):
        assert torch.equal(step(x), decides(x))
    assert kinds(events).count("recorded") == step.report().recordings
    assert kinds(events).count("replayed") == step.report().replays >= 3


def test_graphs_of_dynamo_are_told(events: list[Event]) -> None:
    torch.compiler.reset()
    from graphs.dynamo.backend import graphs_backend

    compiled = torch.compile(plus_one, backend=functools.partial(graphs_backend, options={"compiler": "aten"}))
    for _ in range(3):
        assert torch.equal(compiled(X), X + 1)
    assert kinds(events) == ["recorded", "replayed", "replayed"]
    assert events[0].step == graphs.backend_report().pieces[-1].name


def test_an_event_cannot_be_changed(events: list[Event]) -> None:
    graphs.capture(plus_one)(X)
    with pytest.raises(dataclasses.FrozenInstanceError):
        events[0].step = "other"  # type: ignore[misc]


def test_a_removed_callback_is_told_nothing_more() -> None:
    told: list[Event] = []
    step, handle = graphs.capture(plus_one), graphs.on_event(told.append)
    step(X)
    handle.remove()
    handle.remove()
    step(X)
    assert kinds(told) == ["recorded", "replayed"] and step.report().replays == 2 and not listeners.at_replays


def test_a_callback_may_remove_itself_and_ask_for_the_report() -> None:
    step, told = graphs.capture(plus_one), list[int]()

    def once(event: Event) -> None:
        told.append(step.report().replays)
        if event.kind == "replayed":
            handle.remove()

    handle = graphs.on_event(once)
    for _ in range(3):
        step(X)
    assert told == [0, 1]


def test_what_a_callback_raises_is_logged_once_and_the_step_goes_on(
    caplog: pytest.LogCaptureFixture, events: list[Event]
) -> None:
    def fails(event: Event) -> None:
        raise KeyError("no such metric")

    step = graphs.capture(plus_one)
    with graphs.on_event(fails), pytest.warns(RuntimeWarning, match="no such metric") as warned:
        for _ in range(3):
            assert torch.equal(step(X), X + 1)
    assert len(warned) == 1 and step.report().replays == 3 and kinds(events) == ["recorded", *["replayed"] * 3]
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert line.name == "graphs" and line.exc_info is not None and line.exc_info[0] is KeyError


@pytest.mark.filterwarnings("error")
def test_a_warning_about_a_callback_that_is_made_an_error_is_not_one_of_the_step() -> None:
    step, count = graphs.capture(lambda x, total: total.add_(x)), torch.zeros(3, 4)
    with graphs.on_event(lambda event: 1 / 0):
        for _ in range(2):
            step(X, count)
    assert torch.equal(count, X + X) and step.report().replays == 2


@pytest.mark.parametrize("callback", [None, 3, "print"])
def test_what_cannot_be_called_is_no_callback(callback: Any) -> None:
    with pytest.raises(graphs.errors.ConfigError, match="a function of one event"):
        graphs.on_event(callback)


@pytest.mark.parametrize("name", ["", 3])
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(graphs.errors.ConfigError, match="name"):
        graphs.capture(plus_one, name=name)


class Toy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def method(self, x: Tensor) -> Tensor:
        return x + 1

    def __getattr__(self, name: str) -> Any:
        if name == "__qualname__":
            raise AssertionError("what a class answers for itself was asked for")
        return super().__getattr__(name)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (plus_one, "plus_one"),
        (functools.partial(functools.partial(plus_one)), "plus_one"),
        (torch.add, "add"),
        (Toy(), "Toy"),
        (Toy().method, "Toy.method"),
        (nn.Linear(1, 1), "Linear"),
    ],
)
def test_a_step_is_called_by_its_function_or_class(model: Any, name: str) -> None:
    assert name_of(model) == name


def test_the_log_has_recordings_at_info_and_reasons_at_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="graphs")
    step, refused = graphs.capture(plus_one), graphs.capture(reads)
    with pytest.warns(NotReplayed):
        for _ in range(3):
            step(X)
            refused(X)
    lines = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert [line[:2] for line in lines] == [("graphs", "INFO"), ("graphs", "WARNING")]
    assert re.fullmatch(r"plus_one: recorded x\[3, 4\] in \d+\.\d\d s, \d+\.\d MiB", lines[0][2])
    assert lines[1][2].startswith("reads: this call runs eagerly: ") and "Remedy: " in lines[1][2]


def test_the_log_has_each_run_of_a_first_call_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="graphs")
    step = graphs.capture(plus_one, buckets=[4], batch_dims={"x": 0})
    step(X)
    runs = [record.getMessage().partition(":")[0] for record in caplog.records if record.levelno == logging.DEBUG]
    assert [re.sub("first call, (run )?| .*", "", run) for run in runs] == [*"ABCR", "recording", *"VP"]
    caplog.clear()
    step(X)
    assert not caplog.records, "a replay is not logged"


def test_a_program_without_logging_is_told_by_the_warning_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("graphs").handlers)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Moved(step="a", rows=2, seconds=0.002, compared=True), "a: 2 rows pointed to where its tensors are now, in 2.0 ms"),
        (
            Evicted(step="a", key="x[1]", bytes=2**20, replays=3),
            "a: dropped the recording of x[1] (too-many-keys), 1.0 MiB, after 3 replays",
        ),
    ],
)
def test_other_events_are_logged_and_told(event: Event, text: str, events: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="graphs")
    emit(event)
    assert events == [event] and [record.getMessage() for record in caplog.records] == [text]


def ranges_of(call: Any) -> list[str]:
    """The names of our ranges that PyTorch's profiler sees during a call."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        call()
    return [event.name for event in trace.events() if event.name.startswith("graphs::")]


def test_a_profiler_sees_recordings_and_replays_by_name_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    step = graphs.capture(plus_one, buckets=[4], batch_dims={"x": 0}, name="decode")
    assert ranges_of(lambda: step(X)) == ["graphs::record decode 4 rows", "graphs::replay decode 4 rows"]
    exact = graphs.capture(plus_one)
    exact(X)
    assert ranges_of(lambda: exact(X)) == ["graphs::replay plus_one x[3, 4]"]
    assert ranges_of(lambda: graphs.capture(plus_one, ranges=False)(X)) == []
    monkeypatch.setenv("GRAPHS_RANGES", "0")
    assert ranges_of(lambda: graphs.capture(plus_one)(X)) == []


def test_a_profiled_replay_gives_what_others_give() -> None:
    step = graphs.capture(nn.Linear(4, 4))
    plain = step(X)
    with profile(activities=[ProfilerActivity.CPU]):
        assert torch.equal(step(X), plain)
    assert step.report().replays == 2 and step.report().refusals == ()


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """NVTX of a build that has it, as a list of what was pushed; a pop is ``-``."""
    seen: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("-"))
    monkeypatch.setattr(listeners, "_ranges", False)
    monkeypatch.setattr(listeners, "at_replays", False)
    return seen


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_ranges_that_are_asked_for_are_of_nvtx(by: str, pushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    other = graphs.capture(plus_one)
    monkeypatch.setenv("GRAPHS_RANGES", str(int(by == "variable")))
    step = graphs.capture(plus_one, ranges=True if by == "argument" else None, name="{decode}")
    for call in (step, other, step):
        call(X)
    replay = ["graphs::replay {decode} x[3, 4]", "-"]
    assert pushed == ["graphs::record {decode} x[3, 4]", "-", *replay, *replay]


def test_a_range_is_closed_when_the_step_raises(pushed: list[str]) -> None:
    step = graphs.capture(lambda x, i: x[i], ranges=True)
    step(X, torch.tensor([0]))
    with pytest.raises(IndexError):
        step(X, torch.tensor([7]))
    assert pushed.count("-") * 2 == len(pushed)


def test_a_replay_that_nobody_looks_at_makes_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    step = graphs.capture(plus_one)
    step(X)

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("attended")

    monkeypatch.setattr("graphs.dispatch.dispatcher.attended_replay", never)
    step(X)
    assert step.report().replays == 2


def test_a_torch_that_keeps_no_flag_is_asked_for_its_profiler() -> None:
    assert _AsksForProfiler()._is_profiler_enabled is False
    with profile(activities=[ProfilerActivity.CPU]):
        assert _AsksForProfiler()._is_profiler_enabled is True
