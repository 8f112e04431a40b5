"""``torch.compile(backend="graphs")`` and ``graphs.capture(compiler=)`` on a device: kernels of Inductor inside the graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.dynamo.backend import backend_report, graphs_backend
from graphs.observation.launches import count_launches

pytestmark = pytest.mark.gpu
Tensor = torch.Tensor


class Step(nn.Module):
    """Layers around a buffer that the step writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("cache", torch.zeros(4, 64))

    def forward(self, x: Tensor) -> Any:
        self.cache.add_(x)
        y = nn.functional.silu(self.first(x)) * self.cache
        return self.second(y) + 1, self.cache, x.t()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    gc.collect()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def pair(device: torch.device) -> tuple[Step, Step]:
    model, twin = Step().to(device), Step().to(device)
    twin.load_state_dict(model.state_dict())
    return model, twin


def same(step: Callable[..., Any], model: Step, twin: Step, calls: int = 4) -> None:
    for _ in range(calls):
        x = torch.randn(4, 64, device=model.cache.device)
        torch.testing.assert_close(step(x), twin(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.cache, twin.cache)


@pytest.mark.parametrize("compiler", ["aten", "inductor"])
def test_the_backend_replays_and_agrees_with_eager(compiler: str, device: torch.device) -> None:
    model, twin = pair(device)
    step = torch.compile(model, backend=graphs_backend, options={"compiler": compiler})
    same(step, model, twin)
    piece = backend_report().pieces[-1]
    assert (piece.replays, piece.compiled_calls, piece.refusals) == (4, 0, ())
    x = torch.randn(4, 64, device=device)
    assert count_launches(lambda: step(x), device) == 1


def test_many_calls_in_a_row_keep_their_outputs(device: torch.device) -> None:
    step = torch.compile(lambda x: torch.nn.functional.silu(x) * 2, backend=graphs_backend)
    inputs = [torch.full((64,), float(value), device=device) for value in range(600)]  # more than the ring of addresses
    outputs = [step(x) for x in inputs]
    for x, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(output, torch.nn.functional.silu(x) * 2)


def test_strides_that_dynamo_guarded_are_kept(device: torch.device) -> None:
    model, twin = pair(device)
    step = torch.compile(model, backend=graphs_backend, dynamic=False)
    for arrange in (lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(4, 64)):
        for _ in range(3):
            x = arrange(torch.randn(4, 64, device=device))
            torch.testing.assert_close(step(x), twin(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_weights_that_move_are_never_read_where_they_were(device: torch.device) -> None:
    model, twin = pair(device)
    step = torch.compile(model, backend=graphs_backend)
    same(step, model, twin)
    old = model.first.weight.data
    model.first.weight.data = old * 2
    old.fill_(float("nan"))
    twin.first.weight.data.mul_(2)
    same(step, model, twin)


def test_a_constant_of_the_host_is_uploaded_once(device: torch.device) -> None:
    def step_of(x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0], device=x.device)

    step = torch.compile(step_of, backend=graphs_backend, options={"compiler": "aten"})
    for _ in range(3):
        torch.testing.assert_close(step(torch.ones(3, device=device)), torch.tensor([2.0, 3.0, 4.0], device=device))
    piece = backend_report().pieces[-1]
    assert piece.replays == 3 and piece.rewrites


def test_a_copy_to_the_host_is_refused_at_its_line(device: torch.device) -> None:
    def step_of(x: Tensor) -> Tensor:
        return (x.to("cpu", non_blocking=True) + 1).to(x.device)  # here

    step = torch.compile(step_of, backend=graphs_backend, options={"compiler": "aten"})
    x = torch.ones(3, device=device)
    with pytest.warns(NotReplayed, match="host-sync"):
        step(x)
    refusal = backend_report().pieces[-1].refusals[0]
    assert refusal.file == __file__


def test_other_graphs_do_not_disturb_a_piece(device: torch.device) -> None:
    model, twin = pair(device)
    step = torch.compile(model, backend=graphs_backend)
    same(step, model, twin)
    reduced = torch.compile(lambda x: x @ x.t(), mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        reduced(torch.randn(32, 32, device=device))
    same(step, model, twin)


@pytest.mark.parametrize("compiler", ["inductor", "auto"])
def test_a_captured_step_is_compiled_and_agrees_with_eager(compiler: str, device: torch.device) -> None:
    model, twin = pair(device)
    step = graphs.capture(model, compiler=compiler)
    same(step, model, twin)
    (key,) = step.report().keys
    assert key.compiler == ("inductor" if compiler == "inductor" else min(key.compiler_us, key=key.compiler_us.__getitem__))
    assert step.report().refusals == ()
    torch.compiler.reset()  # the recording keeps what it replays
    gc.collect()
    torch.cuda.empty_cache()
    same(step, model, twin)


def test_a_captured_step_may_break_into_several_compiled_graphs(device: torch.device) -> None:
    class Broken(Step):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            torch._dynamo.graph_break()
            return (self.second(y.relu()) * 2,)

    model, twin = Broken().to(device), Broken().to(device)
    twin.load_state_dict(model.state_dict())
    step = graphs.capture(model, compiler="inductor")
    same(step, model, twin)
    assert step.report().keys[0].compiler == "inductor" and step.report().refusals == ()


def test_buckets_of_compiled_steps(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(device)
    step = graphs.capture(model, compiler="inductor", buckets=[2, 4], batch_dims={"input": 0})
    for rows in (3, 1, 4, 2, 3):
        x = torch.randn(rows, 64, device=device)
        torch.testing.assert_close(step(x), model(x), rtol=1e-3, atol=1e-4)
    assert {key.rows for key in step.report().keys} == {2, 4}
    assert {key.compiler for key in step.report().keys} == {"inductor"}
