"""``graphs.capture(compiler=)``: the compiled step is what is replayed, agrees with eager, and its failures are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.errors import CompileFailed, ConfigError
from graphs.first_call import candidates
from tests.parity import parity

Tensor = torch.Tensor


class Step(nn.Module):
    """Two layers around a buffer that the step writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("cache", torch.zeros(4, 16))

    def forward(self, x: Tensor) -> Any:
        self.cache.add_(x)
        y = nn.functional.silu(self.first(x)) * self.cache
        return {"y": self.second(y) + 1, "cache": self.cache}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def pair() -> tuple[Step, Step]:
    model, twin = Step(), Step()
    twin.load_state_dict(model.state_dict())
    return model, twin


def operators(step: Any) -> list[str]:
    """What a replay of the only recording runs."""
    (entry,) = step._graphs_recordings.routes.entries.values()
    return list(entry.recording.operators)


def same(step: Any, twin: Step, calls: int = 3) -> None:
    for _ in range(calls):
        x = torch.randn(4, 16)
        torch.testing.assert_close(step(x), twin(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step.cache, twin.cache)


@pytest.mark.slow
def test_a_compiled_step_is_recorded_as_one_compiled_graph_and_agrees_with_eager() -> None:
    model, twin = pair()
    step = graphs.capture(model, compiler="inductor")
    same(step, twin, 4)
    assert operators(step) == ["graphs.compiled.default"]
    (key,) = step.report().keys
    assert (key.compiler, step.report().replays) == ("inductor", 4)
    assert 0 < key.compile_seconds < key.capture_seconds
    torch.compiler.reset()  # the recording keeps what it replays
    same(step, twin)


@pytest.mark.slow
def test_auto_measures_both_and_keeps_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = pair()
    step = graphs.capture(model, compiler="auto")
    same(step, twin)
    (key,) = step.report().keys
    assert set(key.compiler_us) == {"none", "inductor"} and all(us > 0 for us in key.compiler_us.values())
    assert key.compiler == min(key.compiler_us, key=key.compiler_us.__getitem__)
    assert "us with none" in str(step.report()) and "us with inductor" in str(step.report())


@pytest.mark.slow
def test_each_key_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    original = candidates.CompiledModel

    def counted(*args: Any, **kwargs: Any) -> Any:
        built.append(original(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(candidates, "CompiledModel", counted)
    step = graphs.capture(lambda x: (x * 2 + 1).relu(), compiler="inductor")
    for rows in (1, 2, 1, 2, 3):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(step(x), (x * 2 + 1).relu())
    assert [len(model._graphs) for model in built] == [1, 1, 1]
    assert step.report().recordings == 3


@pytest.mark.slow
def test_buckets_are_compiled_at_their_size() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    step = graphs.capture(model, compiler="inductor", buckets=[4], batch_dims={"input": 0})
    for rows in (3, 2, 4):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(step(x), model(x), rtol=1e-4, atol=1e-5)
    (key,) = step.report().keys
    assert (key.rows, key.compiler, step.report().refusals) == (4, "inductor", ())


@pytest.mark.slow
def test_a_step_that_is_rewritten_is_compiled_as_rewritten() -> None:
    def step_of(x: Tensor, position: Tensor) -> Tensor:
        return (x[int(position)] * 2 + 1).relu()

    step = graphs.capture(step_of, compiler="inductor")
    x = torch.randn(4, 3)
    for row in (1, 3, 0):
        torch.testing.assert_close(step(x, torch.tensor(row)), (x[row] * 2 + 1).relu())
    assert step.report().replays == 3 and step.report().keys[0].compiler == "inductor"
    assert "graphs.compiled.default" in operators(step)


@pytest.mark.slow
def test_random_numbers_are_those_that_eager_draws() -> None:
    step = parity(lambda: lambda x: x * torch.rand(3), [(torch.ones(3),)] * 3, compiler="inductor")
    assert step.report().keys[0].compiler == "inductor"


def test_what_the_compiler_raises_is_named_and_the_step_recorded_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such compiler here")

    monkeypatch.setattr("graphs.compile.compiled_graph.compile_graph", broken)
    model, twin = pair()
    step = graphs.capture(model, compiler="inductor")
    with pytest.warns(NotReplayed, match=r"recorded uncompiled: compile-failed(.|\n)*no such compiler here(.|\n)*Remedy"):
        same(step, twin)
    report = step.report()
    assert (report.replays, report.eager_calls, report.keys[0].compiler) == (3, 0, "none")
    assert [(refusal.reason, refusal.count, refusal.recorded) for refusal in report.refusals] == [("compile-failed", 0, 1)]


def test_a_line_that_dynamo_cannot_trace_is_named() -> None:
    def step_of(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # here
        return x * 2

    step = graphs.capture(step_of, compiler="inductor")
    with pytest.warns(NotReplayed, match="recorded uncompiled"):
        torch.testing.assert_close(step(torch.ones(3)), torch.full((3,), 2.0))
    (refusal,) = step.report().refusals
    assert Path(refusal.file) == Path(__file__)
    assert Path(__file__).read_text().splitlines()[refusal.line - 1].endswith("# here")


def test_a_step_without_operators_is_recorded_uncompiled() -> None:
    step = graphs.capture(lambda x: (x, 1), compiler="auto")
    with pytest.warns(NotReplayed, match="recorded uncompiled: compile-failed"):
        assert step(torch.ones(3))[1] == 1
    assert step.report().replays == 1


@pytest.mark.parametrize("worse", ["output", "state"])
def test_a_compiled_step_that_differs_from_eager_is_not_used(worse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        seconds = 0.0

        def __init__(self, model: Any, *_: Any, **__: Any) -> None:
            self.model = model

        def __call__(self, x: Tensor) -> Any:
            output = self.model(x)
            if worse == "state":
                self.model.cache.mul_(1.01)
                return output
            return {**output, "y": output["y"] * 1.01}

    monkeypatch.setattr(candidates, "CompiledModel", Wrong)
    model, twin = pair()
    step = graphs.capture(model, compiler="inductor")
    with pytest.warns(NotReplayed, match="recorded uncompiled: verify-mismatch"):
        same(step, twin)
    assert step.report().keys[0].compiler == "none"


def test_the_setting_comes_from_the_environment_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHS_COMPILER", "auto")
    assert graphs.capture(nn.Linear(2, 2))._graphs_recordings.config.compiler == "auto"
    assert graphs.capture(nn.Linear(2, 2), compiler="none")._graphs_recordings.config.compiler == "none"
    monkeypatch.setenv("GRAPHS_COMPILER", "nvcc")
    with pytest.raises(ConfigError, match="GRAPHS_COMPILER = 'nvcc' is not legal; it must be one of 'none', 'inductor', 'auto'"):
        graphs.capture(nn.Linear(2, 2))


def test_a_failure_ends_in_what_to_do() -> None:
    assert "compiler='none'" in str(CompileFailed("it raised", operator="torch.compile"))
