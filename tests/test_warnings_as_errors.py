"""Filters that make exceptions of warnings (``-W error``): the caller gets the warning, once, of a call that ran once."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import graphs
from graphs.compile.fused_region import CompiledRegion
from graphs.dispatch.call_log import CallLog, NotReplayed
from graphs.dynamo.backend import graphs_backend
from graphs.errors import CompileFailed, OverBudget

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


@pytest.fixture(autouse=True)
def _errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warnings are errors, and the layer is as users run it: what goes wrong inside is survived."""
    monkeypatch.delenv("GRAPHS_RAISE_INTERNAL")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=DeprecationWarning)  # torch warns of itself
        yield


class Counting(nn.Module):
    """Counts its calls in a tensor and in Python, and does ``also`` in each."""

    def __init__(self, also: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))
        self.calls, self.also, self.scale = 0, also, 2.0

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        self.calls += 1
        return x * self.scale if self.also is None else x * self.also(x)


def _reads_a_file(_: Tensor) -> float:
    with open("/dev/null"):
        return 2.0


def _prints(_: Tensor) -> float:
    print("ran")
    return 2.0


def _reads_on_the_host(x: Tensor) -> float:
    return float(x.numpy().sum())


def _outcomes(step: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Any]:
    """The result of each call, or the first words of the warning it raises."""
    found: list[Any] = []
    for x in inputs:
        try:
            found.append(step(x).tolist())
        except NotReplayed as raised:
            found.append(str(raised).partition(" at ")[0].partition(" [")[0])
    return found


@contexts
@pytest.mark.parametrize(
    ("also", "reason"),
    [(_reads_a_file, "unguarded-read"), (_prints, "side-effect"), (_reads_on_the_host, "host-sync")],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_refused_call_runs_once_and_raises_its_reason_once(also: Any, reason: str, context: Any) -> None:
    model = Counting(also)
    step = graphs.capture(model)
    with context():
        for call in range(1, 6):
            found = _outcomes(step, [torch.ones(2)])
            assert found == ([f"graphs: this call runs eagerly: {reason}"] if call == 1 else [[2.0, 2.0]])
            assert (model.n.item(), model.calls) == (call, call)
    report = step.report()
    assert [(refusal.reason, refusal.count) for refusal in report.refusals] == [(reason, 5)]
    assert (report.eager_calls, report.replays) == (5, 0)


@contexts
def test_a_call_that_is_refused_before_it_runs_runs_once(context: Any) -> None:
    model = Counting()
    step = graphs.capture(model)
    x = torch.ones(2).to_sparse()
    with context():
        with pytest.raises(NotReplayed, match="unsupported-argument"):
            step(x)
        assert model.n.item() == 1
        step(x)
    assert model.n.item() == 2 and step.report().eager_calls == 2


@contexts
def test_a_failure_of_this_layer_is_told_once_and_is_no_other_one(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    fault = types.FunctionType(fails.__code__, {"__name__": "graphs.fault"})
    model = Counting()
    step = graphs.capture(model)
    monkeypatch.setattr("graphs.dispatch.key_recorder.device_of", fault)
    with context():
        found = _outcomes(step, [torch.ones(2)] * 4)
    assert found == ["graphs: this call runs eagerly: internal-error", *[[2.0, 2.0]] * 3]
    assert model.n.item() == 4
    (refusal,) = step.report().refusals
    assert (refusal.detail, refusal.count) == ("ZeroDivisionError: a fault", 4)


@contexts
def test_a_step_that_is_recorded_anew_is_replayed_and_tells(context: Any) -> None:
    model = Counting()
    step = graphs.capture(model)
    with context():
        assert _outcomes(step, [torch.ones(1)] * 3) == [[2.0]] * 3
        model.scale = 3.0
        with pytest.raises(NotReplayed, match="the step is recorded anew: changing-value"):
            step(torch.ones(1))
        assert model.n.item() == 4
        assert _outcomes(step, [torch.ones(1)] * 3) == [[3.0]] * 3
    report = step.report()
    assert (model.n.item(), report.replays, report.eager_calls) == (7, 7, 0)
    assert [(refusal.reason, refusal.recorded) for refusal in report.refusals] == [("changing-value", 1)]


@contexts
def test_a_bucket_that_cannot_be_padded_is_recorded_at_its_size_and_tells(context: Any) -> None:
    step = graphs.capture(lambda x: x + x.sum(0), buckets=[4], batch_dims={"x": 0})
    with context():
        with pytest.raises(NotReplayed, match="rows-interact"):
            step(torch.ones(3, 1))
        assert step(torch.ones(3, 1)).tolist() == [[4.0]] * 3
    assert step.report().replays == 2


@contexts
def test_a_recording_that_is_dropped_for_another_is_told_once(context: Any) -> None:
    step = graphs.capture(Counting(), max_recordings=1)
    with context():
        found = _outcomes(step, [torch.ones(size) for size in (1, 2, 3, 3)])
    assert [one for one in found if isinstance(one, str)] == [
        "graphs: the recording used least recently was dropped to make room for another: too-many-keys"
    ]
    report = step.report()
    assert step.n.item() == 4 and report.evictions == 2 and report.replays == 4


def test_what_the_step_raises_goes_before() -> None:
    def picky(x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("not three")
        return x * _reads_on_the_host(x)

    step = graphs.capture(picky)
    with torch.no_grad():
        with pytest.raises(ValueError, match="not three") as raised:
            step(torch.ones(3).to_sparse())
        assert raised.value.__context__ is None
        with pytest.raises(NotReplayed, match="host-sync"):
            step(torch.ones(2))
        assert step(torch.ones(2)).tolist() == [2.0, 2.0]
    assert {refusal.reason for refusal in step.report().refusals} == {"unsupported-argument", "host-sync"}


def test_warnings_of_one_call_are_all_noted_and_the_first_is_raised_once() -> None:
    log = CallLog()
    log.refused(OverBudget("one"))
    log.refused(CompileFailed("two"))
    with pytest.raises(NotReplayed, match="one"):
        log.warn_now()
    log.warn_now()
    assert [refusal.count for refusal in log.refusals] == [1, 1]


def test_a_size_that_does_not_fit_is_told_after_the_others_were_recorded() -> None:
    given: Any = {"example": (torch.ones(1, 64),), "sizes": [8, 4, 1]}
    with torch.no_grad():
        whole = graphs.capture(Counting(), batch_dims={"x": 0}).record(**given)
        model = Counting()
        step = graphs.capture(model, batch_dims={"x": 0})
        with pytest.raises(NotReplayed, match="size 4 is not recorded: memory-budget"):
            step.record(**given, memory_budget=whole.sizes[0].bytes + whole.sizes[2].bytes + 64)
    assert [key.key for key in step.report().keys] == ["x[8, 64]", "x[1, 64]"] and model.n.item() == 0


def test_a_graph_of_dynamo_runs_once_and_raises_its_reason_once() -> None:
    torch.compiler.reset()
    calls = torch.zeros(())

    @torch.compile(backend=graphs_backend, options={"compiler": "aten", "max_recordings": 1}, dynamic=True)
    def step(x: Tensor, calls: Tensor) -> Tensor:
        calls.add_(1)
        return x * 2

    with torch.no_grad():
        found = _outcomes(lambda x: step(x, calls), [torch.ones(size) for size in (2, 3, 3, 2)])
    assert [one for one in found if isinstance(one, str)] == [
        "graphs: this graph runs compiled and is not recorded: too-many-keys"
    ]
    assert calls.item() == 4
    reasons = {refusal.reason for piece in graphs.backend_report().pieces for refusal in piece.refusals}
    assert "too-many-keys" in reasons


def test_the_step_that_a_hook_warns_beside_raises_its_own() -> None:
    ran: list[str] = []

    def fails(*_: Any) -> None:
        ran.append("hook")
        raise RuntimeError("a hook")

    def broken(x: Tensor) -> Tensor:
        raise ValueError("the step")

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return broken(x)

    step = graphs.capture(Broken())
    for _ in range(2):
        step.register_forward_hook(fails, always_call=True)
    with torch.no_grad(), pytest.raises(ValueError, match="the step"):
        step(torch.ones(2))
    assert ran == ["hook", "hook"], "each ran"


def test_a_region_that_cannot_be_compiled_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    body: GraphModule = make_fx(lambda n: ((n * 7 - 3).remainder(5),))(torch.arange(5))
    with caplog.at_level("WARNING", "graphs"):
        (made,) = CompiledRegion(body)(torch.arange(5))
    assert torch.equal(made, (torch.arange(5) * 7 - 3).remainder(5))
    assert "run unfused: no compiler found" in caplog.text
