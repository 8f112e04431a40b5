"""What an operator writes: as its schema declares, and where the schema says too little."""

from __future__ import annotations

import pytest
import torch

from graphs.state.storage import written_arguments, written_tensors

aten = torch.ops.aten


def test_a_schema_names_the_arguments_that_are_written() -> None:
    assert written_arguments(aten.add_.Tensor) == {"self"}
    assert written_arguments(aten.add.out) == {"out"}
    assert written_arguments(aten.add.Tensor) == set()


def test_the_tensors_in_a_written_list_are_written() -> None:
    first, second = torch.zeros(1), torch.ones(1)
    assert written_tensors(aten._foreach_add_.Scalar, ([first, second], 1.0), {}) == [first, second]


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
