"""Which traces a step costs: no round is made whose outcome is known, and none is left out that proves something."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable

import pytest
import torch

import graphs
from passes.core.facts import Facts
from passes.tracing.fake_kernels import StepFakes
from passes.tracing.hints import HintedShapes
from passes.tracing.trace import TraceRequest, trace_once
from tests.parity import assert_same

Tensor = torch.Tensor
trace_step = importlib.import_module("passes.trace_step")  # the package has a function of this name


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[TraceRequest]:
    """The traces that are made, in order."""
    made: list[TraceRequest] = []

    def traced(request: TraceRequest) -> object:
        made.append(request)
        return trace_once(request)

    monkeypatch.setattr(trace_step, "trace_once", traced)
    return made


def either(x: Tensor) -> Tensor:
    return (x * 2 if x.sum() > 0 else x - 1) + 1


def of_one_dtype(x: Tensor) -> Tensor:
    return (x.float() * 2 if x.sum() > 0 else x - 1) + 1


def looping(x: Tensor) -> Tensor:
    out = torch.zeros(4)
    for row in (x > 0).nonzero():
        out.index_add_(0, row, x[row])
    return out * 2 if x.sum() > 0 else out - 1


def same_for_both_outcomes(step: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], like: Tensor) -> None:
    for sign in (1, -1, 1):
        x = sign * (like + 1)
        assert_same(step(x), eager(x), "result")


def test_what_was_merged_for_one_key_is_merged_at_once_for_the_next(rounds: list[TraceRequest]) -> None:
    step = graphs.capture(either)
    for rows in (2, 3):
        same_for_both_outcomes(step, either, torch.arange(rows) * 1.0)
    assert [bool(request.plan) for request in rounds] == [False, True, True]
    assert step.report().recordings == 2 and step.report().eager_calls == 0


def test_branches_of_functions_that_the_collector_leaves_alone_are_merged(rounds: list[TraceRequest]) -> None:
    gc.freeze()
    try:
        same_for_both_outcomes(graphs.capture(either), either, torch.arange(2.0))
    finally:
        gc.unfreeze()
    assert [bool(request.plan) for request in rounds] == [False, True]


def test_a_branch_that_cannot_be_merged_for_the_next_key_is_traced_as_it_goes(rounds: list[TraceRequest]) -> None:
    step = graphs.capture(of_one_dtype)
    same_for_both_outcomes(step, of_one_dtype, torch.arange(3, dtype=torch.float32))
    assert [bool(request.plan) for request in rounds] == [False, True]
    same_for_both_outcomes(step, of_one_dtype, torch.arange(3, dtype=torch.float64))  # the sides leave different dtypes
    assert [bool(request.plan) for request in rounds[2:]] == [True, False, False]
    assert step.report().recordings == 3 and step.report().eager_calls == 0  # one for each side, of the second key


def test_a_loop_is_proved_of_the_graph_that_is_kept(rounds: list[TraceRequest]) -> None:
    step = graphs.capture(looping)
    same_for_both_outcomes(step, looping, torch.arange(4.0))
    assert [(bool(r.plan), r.unroll) for r in rounds] == [(False, "bound"), (True, "bound"), (True, "hint")]
    assert step.report().recordings == 1


def test_results_of_symbolic_sizes_are_made_anew_and_others_remembered() -> None:
    shapes = HintedShapes(allow_scalar_outputs=True)
    with StepFakes(shape_env=shapes) as mode:
        shapes.facts = Facts(mode)
        rows = shapes.create_unbacked_symint()
        torch.neg(torch.empty(rows, 3))
        assert not shapes.fake_tensor_cache
        before = mode.cache_info().hits
        for _ in range(2):
            torch.neg(torch.empty(7, 3))
        assert mode.cache_info().hits > before
