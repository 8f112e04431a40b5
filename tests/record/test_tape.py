"""The tape: replays compute every operator's results anew, whatever its schema writes."""

import torch
from torch import nn

import graphs
from tests.parity import batches, parity


@torch.library.custom_op("tape_tests::push", mutates_args=("cache",))
def push(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    cache.add_(x)
    return cache * 2


class Push(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return push(self.cache, x)


def test_an_operator_that_writes_and_returns_gives_a_new_result_each_replay() -> None:
    step = parity(Push, batches(*[(3,)] * 4))
    assert step.report().replays == 4


def test_an_operator_that_writes_its_noise_and_returns_gives_a_new_result_each_replay() -> None:
    parity(lambda: lambda x: nn.functional.rrelu(x, training=True), batches(*[(3,)] * 4))


def test_an_operator_with_an_undefined_output_is_replayed_or_refused() -> None:
    parity(lambda: nn.LSTM(4, 4), batches(*[(3, 2, 4)] * 4))


def test_a_borrowed_constant_is_written_anew_by_each_call() -> None:
    step = graphs.capture(lambda x: (x * 2, torch.ones(2) + 1), outputs="borrowed")
    for _ in range(3):
        constant = step(torch.ones(2))[1]
        assert constant.tolist() == [2, 2]
        constant.zero_()
