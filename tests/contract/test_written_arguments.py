"""What an operator writes: as its schema declares, and where the schema says too little."""

from __future__ import annotations

import pytest
import torch

from graphs.observation.eager_trace import trace_eager
from graphs.state.storage import storage_id, written_tensors
from passes.core.schema import written_arguments

aten = torch.ops.aten


def test_a_schema_names_the_arguments_that_are_written() -> None:
    assert written_arguments(aten.add_.Tensor) == {"self"}
    assert written_arguments(aten.add.out) == {"out"}
    assert written_arguments(aten.add.Tensor) == set()


def test_the_tensors_in_a_written_list_are_written() -> None:
    first, second = torch.zeros(1), torch.ones(1)
    assert written_tensors(aten._foreach_add_.Scalar, ([first, second], 1.0), {}) == [first, second]


def test_a_traced_operator_tells_which_tensors_it_wrote() -> None:
    first, second, mean, variance = torch.zeros(1), torch.ones(1), torch.zeros(3), torch.ones(3)

    def step() -> None:
        torch._foreach_add_([first, second], 1.0)
        aten.native_batch_norm(torch.ones(4, 3), None, None, mean, variance, True, 0.1, 1e-5)
        first.add(second)

    _, trace = trace_eager(step, [])
    foreach, norm = ([o for o in trace.operations if name in str(o.func)] for name in ("_foreach_add_", "batch_norm"))
    assert [use.origin for use in foreach[0].written()] == [("external", storage_id(t)) for t in (first, second)]
    assert [use.origin for use in norm[0].written()] == [("external", storage_id(t)) for t in (mean, variance)]
    assert trace.operations[-1].written() == []


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_writes_its_statistics_in_training_though_its_schema_does_not_say_so(training: bool) -> None:
    x, mean, variance = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    written = written_tensors(aten.native_batch_norm.default, (x, None, None, mean, variance, training, 0.1, 1e-5), {})
    aten.native_batch_norm.default(x, None, None, mean, variance, training, 0.1, 1e-5)
    assert bool(mean.any()) is training
    assert [id(tensor) for tensor in written] == ([id(mean), id(variance)] if training else [])


def test_statistics_that_are_updated_alone_are_written_too() -> None:
    x, mean, variance = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    written = written_tensors(aten.batch_norm_update_stats.default, (x, mean, variance, 0.1), {})
    aten.batch_norm_update_stats.default(x, mean, variance, 0.1)
    assert mean.any() and [id(tensor) for tensor in written] == [id(mean), id(variance)]
