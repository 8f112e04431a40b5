"""Rewritten steps inside `graphs.capture`: ways, assumptions that fail, what is put back, counters, bounds, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.dispatch.replay import _PATIENCE, MAX_VARIANTS
from graphs.errors import HostSync, ManyWays
from graphs.rewriting.checked_replay import Speculation
from tests.parity import parity

pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")


def values(*numbers: float) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((3,), float(i + 1)), torch.tensor(number)) for i, number in enumerate(numbers)]


class Modes(nn.Module):
    """Takes a way by a value on the device, and keeps a buffer, a Python list of tensors and a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.rows = [torch.zeros(4, 3)]

    def forward(self, x: Tensor, mode: Tensor) -> Tensor:
        self.total += x
        self.rows[0][mode % 4] = x
        ways = {0: self.doubled, 1: self.halved}
        return ways.get(mode.item(), self.shifted)(mode)

    def doubled(self, mode: Tensor) -> Tensor:
        return self.total * 2

    def halved(self, mode: Tensor) -> Tensor:
        self.total.mul_(0.5)
        return self.total + self.rows[0].sum(0)

    def shifted(self, mode: Tensor) -> Tensor:
        return self.total - mode


def test_each_way_is_recorded_once_and_replayed() -> None:
    report = parity(Modes, values(0, 1, 2, 0, 1, 2, 2, 1, 0, 0)).report()
    assert (report.recordings, report.replays, report.eager_calls) == (3, 10, 0) and report.refusals == ()


def test_what_a_failed_replay_wrote_is_put_back() -> None:
    model = Modes()
    step = graphs.capture(model)
    step(torch.ones(3), torch.tensor(0))
    before = [model.total.clone(), model.rows[0].clone()]
    with pytest.raises(RuntimeError, match="the way that raises"), torch.no_grad():
        model.forward = raising  # type: ignore[method-assign]
        step(torch.ones(3), torch.tensor(1))
    assert torch.equal(model.total, before[0]) and torch.equal(model.rows[0], before[1])
    assert step.report().replays == 1


def test_a_replay_that_never_says_whether_it_held_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = Modes(), Modes()
    monkeypatch.delenv("GRAPHS_RAISE_INTERNAL", raising=False)
    step = graphs.capture(model)
    calls = values(0, 0, 0)
    for call, (x, mode) in enumerate(calls):
        if call == 1:
            monkeypatch.setattr(Speculation, "valid", silent)
        assert torch.equal(step(x, mode), twin(x, mode))
        monkeypatch.undo()
        assert torch.equal(model.total, twin.total) and torch.equal(model.rows[0], twin.rows[0])
    assert "internal-error" in [refusal.reason for refusal in step.report().refusals]


def silent(self: Speculation, run: int) -> bool:
    raise RuntimeError("the device does not answer")


def raising(x: Tensor, mode: Tensor) -> Tensor:
    raise RuntimeError("the way that raises")


def test_a_way_that_raises_is_the_users_error_and_leaves_what_eager_leaves() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor, mode: Tensor) -> Tensor:
            self.steps.add_(1)
            if mode.item() > 3:
                raise LookupError("no such mode")
            return x * self.steps

    model = Picky()
    step = graphs.capture(model)
    for mode, steps in ((1, 1), (2, 2), (7, 3), (2, 4)):
        if mode == 7:
            with pytest.raises(LookupError, match="no such mode"):
                step(torch.ones(3), torch.tensor(mode))
        else:
            assert step(torch.ones(3), torch.tensor(mode)).tolist() == [steps] * 3
        assert model.steps.item() == steps


class Sampler(nn.Module):
    """Draws before and after it decides."""

    def forward(self, x: Tensor, mode: Tensor) -> Tensor:
        noise = torch.rand(3)
        if mode.item() > 0:
            return x + noise + torch.rand(3)
        return x - noise * torch.randn(3)


def test_random_numbers_are_those_of_eager_on_every_way() -> None:
    step = parity(Sampler, values(1, 1, 0, 0, 1, 0, 1))
    assert step.report().recordings == 2 and step.report().replays == 7


class Counting(nn.Module):
    """Counts in Python, rings through a cache, clears it every fourth step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.lengths = [2]
        self.register_buffer("cache", torch.zeros(3, 3))

    def forward(self, x: Tensor, mode: Tensor) -> Tensor:
        if self.step % 4 == 3:
            self.cache.zero_()
        self.cache[self.step % 3] = x
        self.step += 1
        self.lengths[0] += self.step
        return self.cache.sum(0) * self.lengths[0]


def test_numbers_that_python_counts_are_counted_on_the_device() -> None:
    report = parity(Counting, values(*[0] * 12)).report()
    assert report.recordings == 1 and report.replays == 12 and report.refusals == ()


@pytest.mark.parametrize("new", [0, 3, 11])
def test_a_counter_that_somebody_else_sets_is_read_again(new: int) -> None:
    def between(index: int, model: Counting) -> None:
        if index == 5:
            model.step = new

    parity(Counting, values(*[0] * 9), between=between)


def test_a_counter_is_a_plain_number_between_calls() -> None:
    model = Counting()
    step = graphs.capture(model)
    for count in range(1, 6):
        step(torch.ones(3), torch.tensor(0))
        assert type(model.step) is int and model.step == step.step == count
        assert type(model.lengths[0]) is int


def many(x: Tensor, mode: Tensor) -> Tensor:
    return x * {0: 1.0}.get(int(mode), 2.0) if int(mode) < 0 else x * int({int(mode): int(mode)}[int(mode)])


def test_ways_are_limited_and_the_rest_runs_eagerly_by_name() -> None:
    calls = values(*range(MAX_VARIANTS + 3), *range(4))
    report = parity(lambda: many, calls).report()
    assert report.recordings == MAX_VARIANTS and report.replays == MAX_VARIANTS + 4 and report.eager_calls == 3
    (refusal,) = report.refusals
    assert (refusal.reason, refusal.operator, refusal.count) == ("many-ways", "branch", 3)
    assert f"{MAX_VARIANTS} ways" in refusal.detail
    assert refusal.file == __file__ and "return x * {0: 1.0}" in Path(__file__).read_text().splitlines()[refusal.line - 1]


def test_too_many_ways_are_raised_in_strict_mode() -> None:
    step = graphs.capture(many, strict=True)
    for x, mode in values(*range(MAX_VARIANTS)):
        step(x, mode)
    with pytest.raises(ManyWays, match="pass what decides as an argument"):
        step(*values(MAX_VARIANTS)[0])
    assert step(*values(3)[0]).tolist() == [3, 3, 3]  # ways that are recorded are served


def test_a_step_that_goes_another_way_in_most_calls_is_not_replayed_in_vain() -> None:
    ways = MAX_VARIANTS + _PATIENCE + 2
    report = parity(lambda: many, values(*range(ways), 0, 0, 0)).report()
    assert report.replays == MAX_VARIANTS and report.eager_calls == ways + 3 - MAX_VARIANTS  # even if its way was recorded once


def partly(x: Tensor, mode: Tensor) -> Tensor:
    if mode.item() > 0:
        return x * float(x.numpy().sum())  # here
    return x * 2


def test_a_way_that_cannot_be_recorded_is_named_and_others_are_replayed() -> None:
    step = parity(lambda: partly, values(0, 0, 1, 1, 0, 1, 0))
    report = step.report()
    assert (report.recordings, report.replays, report.eager_calls) == (1, 4, 3)
    (refusal,) = report.refusals
    assert (refusal.reason, refusal.operator, refusal.count) == ("host-sync", "Tensor.numpy", 3)
    assert refusal.line == partly.__code__.co_firstlineno + 2


def test_a_way_that_cannot_be_recorded_is_raised_in_strict_mode_with_the_state_as_it_was() -> None:
    class Partly(Modes):
        def forward(self, x: Tensor, mode: Tensor) -> Tensor:
            self.total += x
            return partly(self.total, mode)

    model = Partly()
    step = graphs.capture(model, strict=True)
    step(*values(0)[0])
    for _ in range(2):
        with pytest.raises(HostSync, match=r"Tensor\.numpy"):
            step(*values(1)[0])
        assert model.total.tolist() == [1, 1, 1]
    assert step(*values(0)[0]).tolist() == [4, 4, 4]


def growing(x: Tensor, mode: Tensor) -> Tensor:
    count = int(mode)
    return (torch.arange(count) * 2.0).sum() + x


def test_an_unbounded_length_is_refused_with_what_to_pass_and_recorded_with_it() -> None:
    calls = values(3, 0, 5, 2, 8, 3)
    (refusal,) = parity(lambda: growing, calls).report().refusals
    line = growing.__code__.co_firstlineno + 1
    assert refusal.reason == "host-sync" and refusal.line == line + 1
    assert refusal.remedy == f'Pass bounds={{"test_rewriting.py:{line}": the largest value}}'
    for name in ("count", f"test_rewriting.py:{line}"):
        report = parity(lambda: growing, calls, bounds={name: 8}).report()
        assert (report.recordings, report.replays, report.refusals) == (1, 6, ())


def test_a_length_above_its_bound_is_never_cut_off() -> None:
    report = parity(lambda: growing, values(3, 9, 3, 12, 8), bounds={"count": 8}).report()
    assert report.replays == 3 and report.eager_calls == 2
    assert [refusal.count for refusal in report.refusals] == [2]


@pytest.mark.parametrize("settings", [{"verify": "always"}, {"verify": "off"}, {"outputs": "borrowed"}, {"strict": True}])
@pytest.mark.parametrize("make", [Modes, Sampler, Counting])
def test_ways_and_counters_under_every_setting(make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    report = parity(make, values(0, 1, 2, 0, 1, 2, 2, 1, 0), **settings).report()
    assert report.eager_calls == 0 and report.refusals == ()


def test_padding_does_not_take_part_in_what_a_step_decides() -> None:
    def step(x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x * 3

    calls = [(torch.full((rows, 2), sign),) for rows, sign in ((3, 1.0), (4, 1.0), (3, -1.0), (2, 1.0), (3, 1.0))]
    report = parity(lambda: step, calls, buckets=[4, 8], batch_dims={"x": 0}).report()
    assert "rows-interact" in {refusal.reason for refusal in report.refusals} and report.replays == 5


def test_a_branch_of_which_both_sides_are_recorded_assumes_nothing_so_sizes_share_a_bucket() -> None:
    def step(x: Tensor, flag: Tensor) -> Tensor:
        y = x * 2
        if flag.item() > 0:
            y = y.relu()
        return y

    calls = [(torch.full((rows, 2), -1.0), torch.tensor(flag)) for rows, flag in ((1, 1), (2, 1), (3, 0), (5, 1), (6, 0), (8, 0))]
    report = parity(lambda: step, calls, buckets=[4, 8], batch_dims={"x": 0}).report()
    assert (report.recordings, report.replays, report.refusals) == (2, len(calls), ())


def test_a_replay_leaves_no_trace_of_ways_that_were_tried_first() -> None:
    model = Modes()
    step = graphs.capture(model)
    for x, mode in values(0, 1, 2):
        step(x, mode)
    expected = Modes()
    for x, mode in values(0, 1, 2):
        expected(x, mode)
    for mode in (0, 1, 2, 1, 0):  # the last used is tried first
        got, wanted = step(torch.ones(3), torch.tensor(mode)), expected(torch.ones(3), torch.tensor(mode))
        assert torch.equal(got, wanted) and torch.equal(model.total, expected.total)
        assert torch.equal(model.rows[0], expected.rows[0])


def test_an_assumption_tells_of_each_run_whether_it_held() -> None:
    assumption = Speculation([])
    for run, broken in enumerate([False, True, True, False], start=1):
        assumption.ran(torch.tensor(broken), [])
        assert assumption.runs() == run and assumption.valid(run) is not broken


def test_dropping_a_recording_leaves_the_other_ways() -> None:
    step = graphs.capture(Modes())
    for x, mode in values(0, 1, 2, 0):
        step(x, mode)
    step.invalidate()
    assert step.report().recordings == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotReplayed)
        for x, mode in values(0, 1, 0):
            step(x, mode)
    assert step.report().recordings == 2


class Slots(nn.Module):
    """Counts its calls on the device, then writes a row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        self.calls += 1
        self.cache[int(slot)] = x
        return self.cache.sum(0) * self.calls


def test_an_index_outside_is_the_error_it_is_in_eager_and_the_step_works_on() -> None:
    expected, model = Slots(), Slots()
    step = graphs.capture(model)
    for x, slot in values(0, 3, -1, 4, 2, -5, 1):
        if -4 <= slot < 4:
            assert torch.equal(step(x, slot), expected(x, slot))
        else:
            for run in (step, expected):
                with pytest.raises(IndexError):
                    run(x, slot)
        assert torch.equal(model.cache, expected.cache) and torch.equal(model.calls, expected.calls)
    assert step.report().replays == 5 and step.report().recordings == 1


class WritesWhatItIsGiven(nn.Module):
    """A cache that the caller hands in as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(6, dtype=torch.int64))

    def forward(self, given: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        before = given[:3] * 2
        p = int(position)
        self.cache[p] = 7 + p
        return before, given[:3] * 2


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_an_argument_may_lie_in_memory_that_the_step_writes(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphs.first_call.candidates._is_fused", lambda step: fused)
    monkeypatch.setattr("graphs.first_call.candidates.CompiledRegion", lambda body: body)
    monkeypatch.setattr("passes.optimize.fuse_exact.WORTH", 1)
    model, reference = WritesWhatItIsGiven(), WritesWhatItIsGiven()
    step = graphs.capture(model, static=["given"], strict=True)
    for position in (0, 2, 1, 4, 0):
        for made, wanted in zip(
            step(model.cache, torch.tensor(position)), reference(reference.cache, torch.tensor(position)), strict=True
        ):
            assert torch.equal(made, wanted)
    assert step.report().replays == 5
