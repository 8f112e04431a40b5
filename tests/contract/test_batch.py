"""Buckets: padding is proved for every content that a later call may have, and cut off every output."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from tests.parity import assert_same, batches, parity


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        yield


def padded(model: Any, calls: list[tuple[Any, ...]], *names: str, **settings: Any) -> graphs.CapturedModule[..., Any]:
    return parity(lambda: model, calls, buckets=[4], batch_dims=dict.fromkeys(names, 0), **settings)


def test_a_constant_in_the_output_that_is_the_batch_size_is_this_calls() -> None:
    padded(lambda x: {"y": x * 2, "rows": x.shape[0]}, batches((3, 2), (2, 2), (4, 2), (1, 2)), "x")


def test_an_output_with_one_part_per_row_is_as_long_as_the_batch() -> None:
    padded(lambda x: list((x * 2).unbind(0)), batches((3, 2), (2, 2), (4, 2), (1, 2)), "x")


def test_an_empty_batch_is_served() -> None:
    padded(lambda x: x * 2, batches((2, 2), (0, 2), (3, 2)), "x")


def test_a_count_over_a_mask_is_seen_even_if_the_first_padding_does_not_change_it() -> None:
    x, first, later = torch.randn(3, 2), torch.tensor([True, True, False]), torch.tensor([True, True, True])
    padded(lambda x, active: x / active.sum(), [(x, first), (x, later)], "x", "active")


def test_a_count_of_comparisons_is_seen_even_if_the_first_padding_does_not_change_it() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    padded(lambda x: x * (x > 0).sum(), [(rows * torch.tensor([[1], [1], [-1]]),), (rows,)], "x")


def test_a_batch_wide_selection_over_integers_is_seen() -> None:
    x = torch.randn(3, 2)
    calls = [(x, torch.tensor([9, 5, 1])), (x, torch.tensor([1, 5, 9]))]
    padded(lambda x, lengths: x * lengths.topk(2).values[1], calls, "x", "lengths")


class Statistic(nn.Module):
    def __init__(self, statistic: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.statistic = statistic
        self.register_buffer("value", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.value.copy_(self.statistic(x))
        return x * 2


@pytest.mark.parametrize("policy", ["repeat", "zero"])
@pytest.mark.parametrize("statistic", [lambda x: x.min(), lambda x: (x > 0).sum()], ids=["min", "count"])
def test_padding_that_reaches_only_the_state_is_seen(statistic: Callable[[torch.Tensor], torch.Tensor], policy: str) -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    calls = [(rows * torch.tensor([[-1], [1], [-1]]),), (rows,)]
    parity(lambda: Statistic(statistic), calls, buckets=[4], batch_dims={"x": 0}, padding={"x": policy})


class Slots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(6, 2))

    def forward(self, x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        self.k.index_copy_(0, slot, x)
        return self.k[slot] * 2


@pytest.mark.parametrize("verify", ["capture", "always", "off"])
def test_padded_rows_write_to_the_sentinel_row_only(verify: str) -> None:
    model, eager = Slots(), Slots()
    step = graphs.capture(model, buckets=[4], batch_dims={"x": 0, "slot": 0}, padding={"slot": graphs.sentinel(5)}, verify=verify)
    for slots in ([0, 1, 2], [3, 4], [1, 2, 4], [0]):
        arguments = torch.randn(len(slots), 2), torch.tensor(slots)
        assert_same(eager(*arguments), step(*arguments), "output")
        assert_same(eager.k[:5], model.k[:5], "cache")
    assert step.report().recordings == 1 and step.report().replays == 4
