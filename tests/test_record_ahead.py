"""Sizes recorded ahead of serving: from one example, in a budget, with what is wrong found before anything runs."""

from __future__ import annotations

import io
import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch import key_recorder
from graphs.dispatch.ahead.budget import needed_bytes
from graphs.dispatch.captured_module import CapturedModule
from graphs.environment import as_bytes
from graphs.errors import ConfigError, InternalError

Tensor = torch.Tensor
SPARE = 16


class Step(nn.Module):
    """A step that counts its calls in a buffer, and writes a row of a cache for each row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(SPARE + 1, 64))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        self.steps.add_(1)
        self.cache.index_copy_(0, slot, x)
        return (self.cache[slot] * 2).relu() + x


@pytest.fixture(autouse=True)
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call that was tried to record: whatever else runs a step ahead of its calls begins there."""
    made: list[int] = []
    run = key_recorder.record_key

    def counted(step: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(len(step.call.tensors[0]))
        return run(step, *args, **kwargs)

    monkeypatch.setattr(key_recorder, "record_key", counted)
    return made


def example(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)), torch.arange(rows)


def captured(**settings: Any) -> CapturedModule[Step]:
    given: dict[str, Any] = {"batch_dims": {"x": 0, "slot": 0}, "padding": {"slot": graphs.sentinel(SPARE)}}
    return graphs.capture(Step(), **{**given, **settings})


def test_sizes_are_recorded_largest_first_and_replayed(tried: list[int]) -> None:
    step = captured(buckets=[2, 8, 4])
    found = step.record(example(), sizes=[4, 8, 8])
    assert [(size.size, size.recorded, size.note) for size in found.sizes] == [(8, True, ""), (4, True, "")]
    assert [key.rows for key in step.report().keys] == [8, 4]
    assert tried == [8, 4] and step.steps.item() == 0 and not step.cache.any(), "the state is as it was"
    twin = Step()
    for rows in (3, 4, 6):
        x, slot = torch.randn(rows, 64), torch.randperm(SPARE)[:rows]
        assert torch.equal(step(x, slot), twin(x, slot))
        assert torch.equal(step.cache[:SPARE], twin.cache[:SPARE])
    assert step.report().recordings == 2 and step.report().replays == 3 and len(tried) == 2


def test_rows_are_cut_off_or_the_last_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []
    run = key_recorder.record_key

    def kept(step: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(step.call.tensors))
        return run(step, *args, **kwargs)

    monkeypatch.setattr(key_recorder, "record_key", kept)
    step = graphs.capture(lambda x, y: x + y.sum(0)[:, None], batch_dims={"x": 0, "y": 1})
    step.record({"x": torch.tensor([[1.0], [2.0]]), "y": torch.tensor([[1.0, 2.0]] * 3)}, sizes=[4, 1])
    large, small = seen
    assert large[0].flatten().tolist() == [1, 2, 2, 2] and large[1].tolist() == [[1, 2, 2, 2]] * 3
    assert small[1].tolist() == [[1]] * 3 and small[1].is_contiguous(), "a call of this size would be"


def test_a_dummy_row_in_the_spare_slot_serves_as_an_example() -> None:
    step = captured(buckets=[1, 2, 4])
    found = step.record((torch.ones(1, 64), torch.tensor([SPARE])))
    assert [(size.size, size.note) for size in found.sizes] == [(4, ""), (2, ""), (1, "")]
    assert [key.rows for key in step.report().keys] == [4, 2, 1]
    twin = Step()
    for rows in (1, 3, 4, 2, 3):
        x, slot = torch.randn(rows, 64), torch.randperm(SPARE)[:rows]
        assert torch.equal(step(x, slot), twin(x, slot)) and torch.equal(step.cache[:SPARE], twin.cache[:SPARE])
    assert step.report().replays == 5 and step.report().recordings == 3 and step.report().refusals == ()


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize(
    "model",
    [lambda x, slot: x + x.sum(0), lambda x, slot: torch.where(x.amax() > 100, -x, x)],
    ids=["a sum", "what only poisoned rows show"],
)
def test_what_a_dummy_row_leaves_open_is_proved_of_the_first_row_that_counts(model: Callable[..., Tensor]) -> None:
    step = graphs.capture(model, buckets=[4], batch_dims={"x": 0, "slot": 0}, padding={"slot": graphs.sentinel(SPARE)})
    step.record((torch.zeros(1, 64), torch.tensor([SPARE])))
    for rows in (2, 3, 4, 2):
        x = torch.randn(rows, 64)
        assert torch.equal(step(x, torch.arange(rows)), model(x, torch.arange(rows)))
    assert "rows-interact" in {refusal.reason for refusal in step.report().refusals}
    assert {key.rows for key in step.report().keys} == {None}, "the recording that was left open is kept"


def repeated(size: int) -> tuple[Tensor, Tensor]:
    x, slot = example(1)
    return x.expand(size, 64).contiguous(), slot.expand(size).contiguous()


FORMS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "tuple": (example(), lambda step, x, slot: step(x, slot)),
    "dict": (dict(zip(("x", "slot"), example(), strict=True)), lambda step, x, slot: step(x=x, slot=slot)),
    "pair": ((example()[:1], {"slot": example()[1]}), lambda step, x, slot: step(x, slot=slot)),
    "function": (repeated, lambda step, x, slot: step(x, slot)),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_example_has_one_of_four_forms(form: str, tried: list[int]) -> None:
    step, (given, call) = captured(), FORMS[form]
    assert [size.size for size in step.record(given, sizes=[1, 3]).sizes] == tried == [3, 1]
    for rows in (1, 3):
        call(step, *example(rows))
    assert tried == [3, 1] and step.report().replays == 2


class Cache:
    def __init__(self, rows: int, device: str = "cpu") -> None:
        self.rows = torch.zeros(rows, 64, device=device)


def test_a_function_gives_each_size_a_cache_of_its_own() -> None:
    step = graphs.capture(lambda x, cache: cache.rows.add_(x).clone())
    caches = {size: Cache(size) for size in (1, 2, 4)}
    step.record(lambda size: (torch.ones(size, 64), caches[size]), sizes=caches)
    assert step.report().recordings == 3 and not any(cache.rows.any() for cache in caches.values())
    for size, cache in caches.items():
        for count in (1, 2):
            assert torch.equal(step(torch.ones(size, 64), cache), torch.full((size, 64), float(count)))
    assert step.report().recordings == 3 and step.report().replays == 6


BAD: dict[str, tuple[dict[str, Any], Any, dict[str, Any], str]] = {
    "zero": ({}, example(), {"sizes": [4, 0]}, r"sizes = \[4, 0\].*positive integers"),
    "negative": ({}, example(), {"sizes": [-1]}, r"sizes = \[-1\].*positive"),
    "none": ({}, example(), {"sizes": []}, "non-empty"),
    "a number": ({}, example(), {"sizes": 4}, "sizes = 4"),
    "not given": ({}, example(), {}, "sizes = None"),
    "no bucket": ({"buckets": [2, 4]}, example(), {"sizes": [2, 3]}, r"\[3\].*some of the buckets, 2, 4"),
    "too many": ({"max_recordings": 2}, example(), {"sizes": [1, 2, 3]}, "max_recordings = 2.*at least 3"),
    "no rows": ({}, (torch.ones(0, 64), torch.arange(0)), {"sizes": [2]}, "a batch of no rows.*one or more rows"),
    "two sizes": ({}, (torch.ones(3, 64), torch.arange(2)), {"sizes": [2]}, r"dimensions of one size.*3.*2"),
    "no batch": ({"batch_dims": None}, example(), {"sizes": [2]}, "batch_dims = None"),
    "another size": ({}, lambda size: example(3), {"sizes": [3, 4]}, r"example\(4\) = 'a batch of 3 rows'.*4 rows"),
    "one call": (
        {"batch_dims": None},
        lambda size: example(3),
        {"sizes": [3, 4]},
        r"example\(3\) = 'a call like example\(4\)'",
    ),
    "a form": ({}, 3, {"sizes": [2]}, "example = 'int'.*a tuple"),
    "no budget": ({}, example(), {"sizes": [2], "memory_budget": 0}, "memory_budget = 0"),
    "no unit": ({}, example(), {"sizes": [2], "memory_budget": "2 apples"}, "'2 apples'.*MiB"),
    "a small budget": (
        {},
        example(),
        {"sizes": [1, 2, 4, 8], "memory_budget": 1024},
        r"memory_budget = 1024.*2112 bytes or more, for the arguments of size 8 alone; size 2 would fit",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_anything_runs(case: str, tried: list[int]) -> None:
    settings, given, arguments, message = BAD[case]
    step = captured(**settings)
    with pytest.raises(ConfigError, match=message):
        step.record(given, **arguments)
    assert tried == [] and step.report().recordings == 0


def test_a_cache_on_another_device_is_refused_before_anything_runs(tried: list[int]) -> None:
    step = graphs.capture(lambda x, cache: cache.rows.add_(x).clone())
    here, elsewhere = Cache(2), Cache(1, "meta")
    with pytest.raises(graphs.Refusal, match=r"mixed-devices.*cache\.rows is on meta, and the step runs on cpu"):
        step.record(lambda size: (torch.ones(size, 64), elsewhere if size == 1 else here), sizes=[1, 2])
    with pytest.raises(graphs.Refusal, match="mixed-devices"):
        graphs.capture(Step(), batch_dims={"x": 0, "slot": 0}).record((example()[0], example()[1].to("meta")), sizes=[2])
    assert tried == []


def test_what_does_not_fit_is_refused_and_what_was_recorded_stays() -> None:
    whole = captured().record(example(), sizes=[8, 4, 1])
    budget = whole.sizes[0].bytes + whole.sizes[2].bytes + 64
    step = captured()
    with pytest.warns(UserWarning, match=r"size 4 is not recorded: memory-budget.*needs about.*are left of"):
        found = step.record(example(), sizes=[8, 4, 1], memory_budget=budget)
    assert [size.recorded for size in found.sizes] == [True, False, True] and "memory-budget" in found.sizes[1].note
    assert found.bytes <= budget == found.memory_budget
    x = torch.randn(4, 64)
    assert torch.equal(step(x, torch.arange(4)), x + (2 * x).relu())
    assert (step.report().eager_calls, step.report().recordings) == (1, 2)
    with pytest.raises(graphs.Refusal, match=r"memory-budget.*size 4"):
        captured(strict=True).record(example(), sizes=[8, 4, 1], memory_budget=budget)


def test_the_largest_is_dropped_where_it_alone_takes_more_than_the_budget() -> None:
    whole = captured().record(example(), sizes=[8, 4, 1])
    step = captured()
    with pytest.raises(graphs.Refusal, match=r"memory-budget.*size 8 took .* by its measure size 4 would fit"):
        step.record(example(), sizes=[8, 4, 1], memory_budget=whole.sizes[0].bytes - 1)
    assert step.report().recordings == 0 and step.steps.item() == 0


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_budget_of_the_capture_holds_at_calls(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "variable":
        monkeypatch.setenv("GRAPHS_MEMORY_BUDGET", "1.5 kB")
    step = captured(memory_budget=1500 if by == "argument" else None)
    for rows in (1, 2, 1, 2, 3):
        step(*example(rows))
    report = step.report()
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [("memory-budget", 3)]
    assert (report.recordings, report.replays) == (1, 2)


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512 MB", 512_000_000), ("1.5k" + "ib", 1536), ("7", 7), ("3b", 3), (9, 9)]
)
def test_sizes_of_memory_have_units(text: object, size: int) -> None:
    assert as_bytes("memory_budget", text) == size


def test_a_size_that_is_recorded_already_is_not_recorded_again() -> None:
    step = captured()
    step.record(example(), sizes=[4])
    found = step.record(example(), sizes=[4, 2])
    assert [(size.seconds > 0, size.note) for size in found.sizes] == [(False, "recorded before"), (True, "")]
    assert step.report().recordings == 2


contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


class Picky(nn.Module):
    """Counts, and raises at two rows."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.error = 0, (error,)

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        self.calls += 1
        if x.shape[0] == 2:
            raise self.error[0]
        return x * 2


@contexts
@pytest.mark.parametrize("error", [ValueError("not two"), SystemExit(3)], ids=["ValueError", "SystemExit"])
def test_what_the_step_raises_at_a_size_is_raised_and_nothing_else_remains(error: BaseException, context: Any) -> None:
    model = Picky(error)
    step = graphs.capture(model, batch_dims={"x": 0})
    with context():
        with pytest.raises(type(error)) as raised:
            step.record((torch.ones(1, 4),), sizes=[4, 2, 1])
        assert raised.value is error and raised.value.__context__ is None and raised.value.__cause__ is None
        assert (model.steps.item(), model.calls) == (0, 0)
        assert torch.equal(step(torch.ones(4, 4)), torch.full((4, 4), 2.0)) and (model.steps.item(), model.calls) == (1, 1)
    assert [key.replays for key in step.report().keys] == [1]


def test_what_this_layer_raises_at_a_size_is_raised_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHS_RAISE_INTERNAL")
    fault = types.FunctionType((lambda *_: 1 / 0).__code__, {"__name__": "graphs.fault"})
    monkeypatch.setattr("graphs.observation.watching.finding", fault)
    step = captured()
    with pytest.raises(InternalError, match=r"internal-error.*ZeroDivisionError"):
        step.record(example(), sizes=[2])
    assert step.steps.item() == 0


def _with_a_file(x: Tensor) -> Tensor:
    with open(os.devnull):
        return x * 2


def _catching(x: Tensor) -> Tensor:
    try:
        return x[torch.tensor([9])]
    except IndexError:
        return x * 2


@contexts
@pytest.mark.parametrize(("model", "reason"), [(_with_a_file, "unguarded-read"), (_catching, "step-raises")])
def test_a_size_is_refused_for_the_reason_of_a_call(model: Callable[[Tensor], Tensor], reason: str, context: Any) -> None:
    step = graphs.capture(model, batch_dims={"x": 0})
    with context():
        with pytest.raises(graphs.Refusal) as raised:
            step.record((torch.ones(1, 4),), sizes=[4, 1])
        with warnings.catch_warnings(record=True):
            step(torch.ones(4, 4))
    (refusal,) = step.report().refusals
    assert raised.value.reason == refusal.reason == reason
    assert (raised.value.operator, raised.value.detail) == (refusal.operator, refusal.detail)


def test_a_size_that_cannot_be_recorded_raises_and_those_before_it_stay() -> None:
    def model(x: Tensor) -> Tensor:
        return x * x.sum().item() if len(x) == 2 else x * 2

    step = graphs.capture(model, batch_dims={"x": 0}, passes="off")
    with pytest.raises(graphs.Refusal, match="host-sync"):
        step.record((torch.ones(4, 2),), sizes=[4, 2, 1])
    assert [key.key for key in step.report().keys] == ["x[4, 2]"]


def test_recordings_made_ahead_are_the_last_to_make_room() -> None:
    step = captured(max_recordings=3)
    step.record(example(), sizes=[1, 2])
    with pytest.warns(UserWarning, match="recording used least recently"):
        for rows in (3, 4, 5):
            step(*example(rows))
    assert {key.key.partition(",")[0] for key in step.report().keys} == {"x[2", "x[1", "x[5"}


def test_the_report_is_plain_data_and_a_table_of_eighty_columns() -> None:
    found = captured().record(example(), sizes=[64, 1])
    assert max(map(len, str(found).splitlines())) <= 80
    assert str(found).startswith(
        "graphs: 2 of 2 sizes recorded on cpu\n      size     seconds         MiB     replay us\n        64 "
    )
    assert [size["size"] for size in json.loads(found.to_json())["sizes"]] == [64, 1]
    assert found.estimated_seconds > found.sizes[0].seconds * 0.5 and all(size.replay_us for size in found.sizes)
    assert found.estimated_bytes == found.sizes[0].bytes + found.sizes[0].bytes // 64


def test_the_estimate_is_told_after_the_first_and_before_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "graphs"):
        captured().record(example(), sizes=[8, 4, 2])
    lines = [text for text in (record.getMessage() for record in caplog.records) if text.startswith(("size", "graphs: "))]
    assert [line.partition(":")[0] for line in lines] == ["size 8", "graphs", "size 4", "size 2", "graphs"]
    assert "size 8 took" in lines[1] and "all 3 sizes will take about" in lines[1] and "estimate" in lines[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_sees_a_bar_and_the_table(progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    captured().record(example(), sizes=[2, 1], progress=progress)
    text = shown.getvalue()
    assert ("2/2" in text and "an estimate" in text and "2 of 2 sizes recorded on cpu" in text) == progress
    assert progress or not text


def test_smaller_recordings_of_a_device_use_the_pool_of_the_first() -> None:
    recording, contract = SimpleNamespace(pool_bytes=100), SimpleNamespace(nbytes=16)
    known: Any = SimpleNamespace(on_device=True, device_free_delta=110, memory_bytes=110, recording=recording, contract=contract)
    assert needed_bytes(4, known, 8, first=True) == 10 + 8, "what the driver took, and half the copies"
    assert needed_bytes(4, known, 8, first=False) == 110, "what was measured of one that found the pool there"
