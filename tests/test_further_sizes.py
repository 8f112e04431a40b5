"""Further sizes of a step that was recorded: less is run for them, and nothing is taken for the same step that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from graphs.first_call import record_key

Tensor = torch.Tensor


class Counted(torch.nn.Module):
    """A step with a layer and a cache."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.linear = fn, torch.nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4096, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def plain(model: Any, x: Tensor) -> Tensor:
    return torch.relu(model.linear(x)).view(x.shape[0], 2, 4).transpose(1, 2) + x.shape[0]


def by_row(model: Any, x: Tensor) -> Tensor:
    return torch.relu(model.linear(x)).view(x.shape[0], 2, 4).transpose(1, 2)


def writes(model: Any, x: Tensor) -> Tensor:
    model.cache[torch.arange(x.shape[0])] = x
    return model.cache[: x.shape[0]] * 2


def branches(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * 2 if x.shape[0] > 3 else model.linear(x) + 1


def odd_number(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * (x.shape[0] ** 2 + 1)


def other_order(model: Any, x: Tensor) -> Tensor:
    return (model.linear(x) + 1) * 2 if x.shape[0] % 2 else (model.linear(x) * 2) + 1


def draws(model: Any, x: Tensor) -> Tensor:
    return torch.rand_like(x) + model.linear(x)


@pytest.fixture
def further(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of each call that was recorded as a further size."""
    found: list[int] = []
    record = record_key._record_further

    def noted(call: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(call.step.call.tensors[0].shape[0])
        return record(call, *args, **kwargs)

    monkeypatch.setattr(record_key, "_record_further", noted)
    return found


def run(fn: Callable[[Any, Tensor], Tensor], mode: Any, sizes: tuple[int, ...], **options: Any) -> graphs.CaptureReport:
    with mode():
        torch.manual_seed(0)
        model = Counted(fn)
        torch.manual_seed(0)
        twin, step = Counted(fn), graphs.capture(model, **options)
        for turn in range(3):
            for size in sizes:
                x = torch.randn(size, 8)
                state = torch.get_rng_state()
                expected = twin(x)
                after = torch.get_rng_state()
                torch.set_rng_state(state)
                assert torch.equal(step(x), expected), (turn, size)
                assert torch.equal(torch.get_rng_state(), after)
                assert torch.equal(model.cache, twin.cache)
    return step.report()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fn", [plain, writes, draws])
def test_a_further_size_is_recorded_from_two_runs(fn: Callable[[Any, Tensor], Tensor], mode: Any, further: list[int]) -> None:
    report = run(fn, mode, (5, 2, 7))
    assert further == [2, 7]
    assert (report.recordings, report.replays, report.eager_calls) == (3, 9, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("fn", "expected"), [(branches, [2, 7]), (odd_number, []), (other_order, [7, 4])])
def test_what_the_size_decides_otherwise_is_tried_as_a_whole(
    fn: Callable[[Any, Tensor], Tensor], expected: list[int], mode: Any, further: list[int]
) -> None:
    report = run(fn, mode, (5, 2, 7, 4) if fn is other_order else (5, 3, 2, 7))
    assert further == expected
    assert (report.recordings, report.replays) == (4, 12)


def test_a_size_that_writes_other_rows_is_put_back(further: list[int]) -> None:
    report = run(writes, torch.no_grad, (2, 600, 3))
    assert further == [600, 3] and report.replays == 9


def test_buckets_share_the_proof_of_padding(further: list[int]) -> None:
    with torch.no_grad():
        step = graphs.capture(Counted(by_row), buckets=(2, 4, 8), batch_dims={"x": 0})
        step.record_buckets(torch.randn(8, 8))
        assert further == [4, 2]
        for size in (1, 2, 3, 5, 8):
            x = torch.randn(size, 8)
            with graphs.eager():
                expected = step(x)
            torch.testing.assert_close(step(x), expected)
    assert step.report().recordings == 3


def test_the_report_says_where_a_size_was_timed() -> None:
    lines = str(run(by_row, torch.no_grad, (5, 2))).splitlines()
    assert ["timed at another size" in line for line in lines if "exact sizes" in line] == [False, True]


class Initialised(torch.nn.Module):
    """A step that makes a table when it is called first, and looks into it at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.tables:
            self.tables["factors"] = [2.0]
        return x * self.tables["factors"][0]


@torch.no_grad()
def test_what_the_first_run_made_is_there_in_the_runs_that_follow() -> None:
    model = Initialised()
    step, x = graphs.capture(model), torch.randn(3, 8)
    assert torch.equal(step(x), x * 2)
    made = model.tables["factors"]
    assert torch.equal(step(x), x * 2) and torch.equal(step(x), x * 2)
    assert model.tables["factors"] is made and step.report().recordings == 1
