"""Keys, buckets recorded ahead, random numbers, and verification of every replay."""

from __future__ import annotations

import enum
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.errors import ConfigError, VerifyMismatch
from graphs.events import Event, Evicted, on_event
from graphs.recording.cpu_tape import TapeRecorder, TapeRecording
from tests.parity import batches, parity

Tensor = torch.Tensor


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def described(x: Tensor, value: Any) -> tuple[Tensor, str]:
    return x * 2, repr(value)


DISTINCT = [
    *(0, 1, -1, True, False, None, 1.0, 0.0, -0.0, math.inf, math.nan, 1j, complex(0.0, -0.0)),
    *("", "1", "a", b"a", (1,), [1], (), [], {}, {"a": 1}, {"b": 1}, {"a": 2}, {1: 1}, (1, 2), ((1,), 2)),
    *(torch.float32, torch.float64, torch.device("cpu"), torch.strided, torch.contiguous_format, ...),
    *(slice(0, 1), slice(0, 2), slice(None), range(1), range(2), Colour.RED, Colour.BLUE),
    *(np.float64(1.0), np.float32(1.0), np.int64(1), np.bool_(True)),
]


@pytest.mark.filterwarnings("error::graphs.dispatch.call_log.NotReplayed")
def test_constants_are_told_apart_by_type_and_value() -> None:
    step = graphs.capture(described, max_recordings=len(DISTINCT))
    for _ in range(2):
        for value in DISTINCT:
            for _ in range(2):  # the second is recognised as like the last
                assert step(torch.ones(2), value)[1] == repr(value)
    assert step.report().recordings == len(DISTINCT)


@pytest.mark.parametrize(
    ("one", "other"),
    [(np.float64(0.0), np.float64(-0.0)), (complex(0.0, 0.0), complex(0.0, -0.0)), (range(0), range(2, 2))],
    ids=["numpy zero", "complex zero", "empty range"],
)
def test_equal_constants_that_are_not_the_same_are_told_apart(one: Any, other: Any) -> None:
    step = graphs.capture(described)
    for value in (one, one, one, other):
        assert step(torch.ones(2), value)[1] == repr(value)


def test_a_size_reaches_the_model_as_a_size() -> None:
    step = graphs.capture(lambda x, size: x * size.numel(), strict=True)
    for _ in range(2):
        assert step(torch.ones(2), torch.Size([3, 4])).tolist() == [12, 12]


def test_positions_and_names_of_arguments_are_part_of_the_key() -> None:
    step = graphs.capture(lambda x, y=None, *, z=None: x + (0 if y is None else y) + (0 if z is None else 2 * z))
    one = torch.ones(2)
    for _ in range(3):
        assert step(one, one).tolist() == [2, 2]
        assert step(one, z=one).tolist() == [3, 3]
        assert step(one, one, z=one).tolist() == step(z=one, x=one, y=one).tolist() == [4, 4]


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.ones(3),
        lambda: torch.ones(2, dtype=torch.float64),
        lambda: torch.ones(2, dtype=torch.int32),
        lambda: torch.ones(4)[::2],
        lambda: torch.ones(2, 1),
    ],
    ids=["shape", "dtype", "integer", "stride", "dimensions"],
)
def test_what_a_tensor_is_is_part_of_the_key(other: Callable[[], Tensor]) -> None:
    step = graphs.capture(lambda x: x * 2)
    for _ in range(3):
        for tensor in (torch.ones(2), other()):
            result = step(tensor)
            assert torch.equal(result, tensor * 2) and result.dtype == tensor.dtype
    assert (step.report().recordings, step.report().replays) == (2, 6)


def recorded_keys(step: Any) -> list[str]:
    return [key.key for key in step.report().keys]


def test_the_recording_used_least_recently_makes_room() -> None:
    step = graphs.capture(lambda x: x * 2, max_recordings=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in (1, 2, 3, 2, 1, 1, 4, 5):
            assert step(torch.ones(size)).tolist() == [2] * size
    assert recorded_keys(step) == ["x[1]", "x[4]", "x[5]"]
    report = step.report()
    assert (report.recordings, report.evictions, report.replays, report.eager_calls) == (3, 2, 8, 0)
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [("too-many-keys", 0)]
    assert [str(warning.message).count("max_recordings=3") for warning in caught if warning.category is NotReplayed] == [1]
    assert "2 recording(s) dropped to make room" in str(report)


def test_the_call_like_the_last_one_is_a_use() -> None:
    step = graphs.capture(lambda x: x * 2, max_recordings=2)
    with pytest.warns(NotReplayed, match="used least recently"):
        for size in (1, 2, 1, 1, 1, 3):
            step(torch.ones(size))
    assert recorded_keys(step) == ["x[1]", "x[3]"]


def test_a_recording_that_made_room_frees_its_memory() -> None:
    step = graphs.capture(lambda x: x * 2, max_recordings=1)
    step(torch.ones(1))
    (entry,) = step._graphs_recordings.routes.entries.values()
    gone = weakref.ref(entry.recording)
    del entry
    with pytest.warns(NotReplayed):
        step(torch.ones(2))
    gc.collect()
    assert gone() is None and step.report().recordings == 1


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_new_size_of_a_known_bucket_needs_no_room() -> None:
    step = graphs.capture(lambda x: x * 2, buckets=[4, 8], batch_dims={"x": 0}, max_recordings=1)
    for size in (1, 2, 3, 4, 3):
        assert step(torch.ones(size, 2)).tolist() == [[2, 2]] * size
    assert (step.report().evictions, step.report().replays, step.report().eager_calls) == (0, 5, 0)


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_variants_do_not_take_turns_in_dropping_one_another() -> None:
    def model(x: Tensor, mode: Tensor, n: int) -> Tensor:
        return x * int({int(mode): int(mode)}[int(mode)]) + n

    step, calls = graphs.capture(model, max_recordings=4), 0
    for _ in range(12):
        for mode in range(5):
            for n in (2, 3):
                x, calls = torch.full((2,), float(calls)), calls + 1
                assert torch.equal(step(x, torch.tensor(mode), n), x * mode + n)
    report = step.report()
    assert report.recordings <= 4 and report.replays + report.eager_calls == calls == 120
    assert report.evictions <= 12, "variants of two keys drop one another for ever"
    assert ("too-many-keys", "key") in {(refusal.reason, refusal.operator) for refusal in report.refusals}


def test_an_invalidated_step_records_again() -> None:
    step = graphs.capture(lambda x, n: x * n, max_recordings=1)
    step(torch.ones(2), 1)
    step.invalidate()
    assert step(torch.ones(2), 2).tolist() == [2, 2]
    assert step.report().recordings == 1 and step.report().eager_calls == 0


class Cache:
    def __init__(self) -> None:
        self.k = torch.zeros(3)


def accumulate(x: Tensor, cache: Cache) -> Tensor:
    cache.k.add_(x)
    return cache.k * 2


def test_a_dropped_cache_frees_its_recording() -> None:
    step, cache = graphs.capture(accumulate), Cache()
    for _ in range(3):
        step(torch.ones(3), cache)
    gone, tensor = weakref.ref(cache), weakref.ref(cache.k)
    del cache
    gc.collect()
    assert gone() is None, "a recording keeps its cache alive"
    step(torch.ones(3), Cache())
    gc.collect()
    assert tensor() is None, "the recording of a cache that is gone is kept"
    assert step.report().recordings == 1 and step.report().replays == 4


def test_a_dropped_step_frees_its_model_and_recordings() -> None:
    model = nn.Linear(3, 3)
    step = graphs.capture(model)
    with torch.no_grad():
        step(torch.ones(3))
    gone, weight = weakref.ref(model), weakref.ref(model.weight)
    del step, model
    gc.collect()
    assert gone() is None and weight() is None


class Advancing(nn.Module):
    """State of every kind, with buffers of no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return x * self.steps


def recorded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The rows of every recording from here on, in order."""
    rows: list[int | None] = []
    record = TapeRecorder.record

    def watched(self: TapeRecorder, body: Any, contract: Any, *args: Any, **kwargs: Any) -> TapeRecording:
        rows.append(contract.rows)
        return record(self, body, contract, *args, **kwargs)

    monkeypatch.setattr(TapeRecorder, "record", watched)
    return rows


def test_buckets_are_recorded_ahead_largest_first_and_leave_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = recorded_rows(monkeypatch), Advancing()
    step = graphs.capture(model, buckets=[2, 8, 4], batch_dims={"x": 0})
    random = torch.get_rng_state()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    step.record_buckets(x)
    assert rows == [8, 4, 2]
    assert model.steps.item() == 0 and torch.equal(x, before) and torch.equal(torch.get_rng_state(), random)
    assert (step.report().recordings, step.report().replays, step.report().eager_calls) == (3, 0, 0)
    for count, size in enumerate((3, 1, 8, 5), start=1):
        x = torch.randn(size, 2)
        assert torch.equal(step(x), x * count)
    assert rows == [8, 4, 2], "a bucket was recorded again"
    assert step.report().replays == 4


def test_a_batch_larger_than_every_bucket_serves_to_record_them() -> None:
    step = graphs.capture(lambda x: x * 2, buckets=[2, 4], batch_dims={"x": 0})
    step.record_buckets(torch.ones(9, 2))
    assert {key.rows for key in step.report().keys} == {2, 4} and step.report().refusals == ()


def test_buckets_cannot_be_recorded_without_knowing_the_batch() -> None:
    step = graphs.capture(lambda x: x * 2, buckets=[2, 4])
    with pytest.raises(ConfigError, match="batch_dims"):
        step.record_buckets(torch.ones(3, 2))
    with pytest.raises(ConfigError, match="batch_dims"):
        graphs.capture(lambda x: x * 2, batch_dims={"x": 0}).record_buckets(torch.ones(3, 2))


def test_a_bucket_that_cannot_be_recorded_raises_and_leaves_the_state() -> None:
    class Step(Advancing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.sum().item()

    model = Step()
    step = graphs.capture(model, buckets=[2, 4], batch_dims={"x": 0}, passes="off")
    with pytest.raises(graphs.Refusal, match="host-sync"):
        step.record_buckets(torch.ones(3, 2))
    assert model.steps.item() == 0


def test_a_step_that_initialises_itself_says_so_when_recorded_ahead() -> None:
    class Lazy(Advancing):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "scale"):
                self.scale = torch.full((2,), 3.0)
            return super().forward(x) * self.scale

    model = Lazy()
    step = graphs.capture(model, buckets=[4], batch_dims={"x": 0})
    with pytest.raises(graphs.Refusal, match="call it once first"):
        step.record_buckets(torch.ones(3, 2))
    assert model.steps.item() == 0 and not hasattr(model, "scale")
    step(torch.ones(3, 2))
    step.record_buckets(torch.ones(3, 2))
    assert step(torch.ones(2, 2)).tolist() == [[6, 6]] * 2


def test_the_batch_is_inferred_from_two_calls_and_padded_from_then_on() -> None:
    step = parity(
        lambda: lambda x, w: x @ w, [(x, torch.ones(2, 2)) for (x,) in batches((3, 2), (5, 2), (6, 2), (7, 2))], buckets=[8]
    )
    report = step.report()
    assert sorted((key.rows or 0, key.replays) for key in report.keys) == [(0, 1), (8, 3)]
    assert report.refusals == ()


def test_two_sizes_that_change_at_once_prove_no_batch() -> None:
    step = parity(lambda: lambda x: x * 2, batches((3, 2), (5, 4), (6, 7)), buckets=[8])
    assert [key.rows for key in step.report().keys] == [None] * 3


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_batch_above_the_largest_bucket_runs_eagerly_and_the_next_replays() -> None:
    step = parity(lambda: lambda x: x * 2, batches((3, 2), (9, 2), (9, 2), (4, 2)), buckets=[4], batch_dims={"x": 0})
    report = step.report()
    assert (report.replays, report.eager_calls) == (2, 2)
    assert [(r.reason, r.operator, r.count) for r in report.refusals] == [("above-largest-bucket", "batch", 2)]
    assert "9 rows" in report.refusals[0].detail and "4" in report.refusals[0].detail


def test_interacting_rows_are_named_and_recorded_at_exact_sizes() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = graphs.capture(lambda x: x - x.mean(0), buckets=[8], batch_dims={"x": 0})
        for (x,) in batches((3, 2), (5, 2), (3, 2)):
            torch.testing.assert_close(step(x), x - x.mean(0))
    report = step.report()
    assert [(refusal.reason, refusal.operator) for refusal in report.refusals] == [("rows-interact", "padding")]
    assert [key.rows for key in report.keys] == [None, None] and (report.replays, report.eager_calls) == (3, 0)
    (text,) = [str(warning.message) for warning in caught if warning.category is NotReplayed]
    assert text.startswith("graphs: the step is recorded at its exact sizes: rows-interact")


def test_state_written_only_by_a_smaller_batch_is_untouched() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("small_batches", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] < 4:
                self.small_batches.add_(1)
            return x * 2

    parity(Step, batches((4, 2), (4, 2)), buckets=[4], batch_dims={"x": 0})


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_an_argument_written_only_by_a_smaller_batch_is_untouched() -> None:
    def model(x: Tensor) -> Tensor:
        x.t().contiguous().add_(1)  # a copy, except of a single row
        return x * 2

    parity(lambda: model, batches((2, 2), (2, 2)), buckets=[2], batch_dims={"x": 0})


def dropout(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True)


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": dropout,
    "rand": lambda x: x + torch.rand(7),
    "randn_like": lambda x: torch.randn_like(x),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "multinomial": lambda x: torch.multinomial(torch.softmax(x, 0), 3),
    "randint": lambda x: torch.randint(0, 100, (5,)),
    "randperm": lambda x: torch.randperm(9),
    "exponential": lambda x: torch.empty(4).exponential_() + x.sum(),
    "written": lambda x: x.clone().normal_(),
    "gumbel": lambda x: (x - torch.empty_like(x).exponential_().log()).argmax(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_those_of_eager_after_the_same_seed(name: str) -> None:
    model = RANDOM[name]
    step, sequences = graphs.capture(model), []
    for call in (model, step, model, step):
        torch.manual_seed(11)
        outputs = [call(torch.linspace(-1, 1, 7)) for _ in range(4)]
        sequences.append([*outputs, torch.rand(3)])
    for sequence in sequences[1:]:
        assert all(torch.equal(a, b) for a, b in zip(sequences[0], sequence, strict=True))
    assert any(not torch.equal(sequences[0][0], other) for other in sequences[0][1:-1]), "every call gave the same numbers"
    assert step.report().replays == 8


def test_random_numbers_go_on_where_the_caller_left_off() -> None:
    step, got, wanted = graphs.capture(dropout), [], []
    for call, into in ((step, got), (dropout, wanted)):
        torch.manual_seed(3)
        for _ in range(3):
            into.append(call(torch.ones(16)))
            into.append(torch.rand(2))  # the caller draws in between
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_an_argument_of_another_layout_gets_the_random_numbers_of_eager() -> None:
    step, outputs = graphs.capture(dropout), []
    for call in (dropout, step):
        torch.manual_seed(3)
        outputs.append(call(torch.ones(4, 16).t()))
    assert torch.equal(*outputs)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[Tensor]], Any]], None]:
    """Lets every later replay do something wrong with its outputs."""
    replay = TapeRecording.replay

    def inject(wrong: Callable[[list[Tensor]], Any]) -> None:
        def faulty(self: TapeRecording, tensors: Any, rows: int, journal: Any = None) -> list[Tensor]:
            produced = replay(self, tensors, rows, journal)
            wrong(produced)
            return produced

        monkeypatch.setattr(TapeRecording, "replay", faulty)

    return inject


def two_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, x + 1


def test_the_first_replay_is_compared_and_the_output_named(fault: Any) -> None:
    fault(lambda produced: produced[1].add_(1))
    step = graphs.capture(two_outputs)
    with pytest.warns(NotReplayed, match="verify-mismatch"):
        assert step(torch.ones(2))[1].tolist() == [2, 2], "the eager result"
    (refusal,) = step.report().refusals
    assert (refusal.reason, refusal.operator) == ("verify-mismatch", "output 1")
    assert "differs from eager in 2 of 2 elements, by up to 1" in refusal.detail
    assert step.report().recordings == 0


def test_a_wrong_state_is_found_by_the_first_replay(fault: Any) -> None:
    model = Advancing()
    fault(lambda produced: model.steps.add_(1))
    step = graphs.capture(model)
    with pytest.warns(NotReplayed, match="state written by the step"):
        assert step(torch.ones(2)).tolist() == [1, 1]
    assert model.steps.item() == 1


def test_verification_of_every_replay_finds_a_fault_that_comes_later(fault: Any) -> None:
    model = Advancing()
    step = graphs.capture(model, verify="always")
    for count in (1, 2):
        assert step(torch.ones(2)).tolist() == [count] * 2
    fault(lambda produced: produced[0].mul_(1.01))
    with pytest.raises(VerifyMismatch, match="output 0"):
        step(torch.ones(2))
    assert model.steps.item() == 2, "the state is as before the call"
    assert step.report().recordings == 0


def test_verification_of_every_replay_finds_a_wrong_state(fault: Any) -> None:
    model = Advancing()
    step = graphs.capture(model, verify="always")
    step(torch.ones(2))
    fault(lambda produced: model.steps.add_(1))
    with pytest.raises(VerifyMismatch, match="state written by the step"):
        step(torch.ones(2))
    assert model.steps.item() == 1


def test_no_verification_finds_nothing(fault: Any) -> None:
    fault(lambda produced: produced[0].add_(1))
    step = graphs.capture(two_outputs, verify="off")
    assert step(torch.ones(2))[0].tolist() == [3, 3]


@pytest.mark.parametrize("verify", ["capture", "always", "off"])
def test_every_level_of_verification_advances_state_once_per_call(verify: str) -> None:
    step = parity(Advancing, batches(*[(3,)] * 5), verify=verify)
    assert step.report().replays == 5


class Outer(nn.Module):
    def __init__(self, verify: str) -> None:
        super().__init__()
        self.inner = graphs.capture(Advancing(), verify=verify)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(x) * 10


@pytest.mark.parametrize("verify", ["capture", "always"])
def test_a_captured_step_with_state_inside_another_advances_once_per_call(verify: str) -> None:
    outer = Outer(verify)
    step = graphs.capture(outer, verify=verify)
    got = [step(torch.ones(1)).item() for _ in range(4)]
    assert got == [1 + 20, 3 + 40, 5 + 60, 7 + 80]
    assert outer.inner.steps.item() == 8 and outer.inner.report().replays == 0


def test_the_inner_step_still_replays_by_itself() -> None:
    outer = Outer("capture")
    step = graphs.capture(outer)
    for _ in range(3):
        step(torch.ones(1))
    assert [outer.inner(torch.ones(1)).item() for _ in range(2)] == [7, 8]
    assert outer.inner.report().replays == 2
    with graphs.eager():
        assert step(torch.ones(1)).item() == 9 + 100


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_recording_that_made_room_is_told_as_an_event() -> None:
    told: list[Event] = []
    step = graphs.capture(lambda x: x * 2, max_recordings=1, name="double")
    with on_event(told.append):
        for size in (1, 1, 2):
            step(torch.ones(size))
    (evicted,) = [event for event in told if isinstance(event, Evicted)]
    assert (evicted.step, evicted.key, evicted.replays) == ("double", "x[1]", 2) and evicted.bytes > 0
