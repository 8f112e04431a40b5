"""What an argument answers for itself alone, asked by the step, makes the step eager by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.observation.host_reads import OF_THE_OBJECT

Tensor = torch.Tensor
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        yield


BIG = torch.arange(16.0)
ASKED: dict[str, tuple[Callable[[Tensor], Tensor], list[Callable[[], Tensor]]]] = {
    "offset": (lambda x: x * x.storage_offset(), [lambda: BIG[1:3], lambda: BIG[2:4]]),
    "offset of a view": (lambda x: x * x[1:].storage_offset(), [lambda: BIG[1:3], lambda: BIG[2:4]]),
    "size of the storage": (lambda x: x * x.untyped_storage().nbytes(), [lambda: BIG[1:3], lambda: BIG[:2].clone()]),
    "alignment": (lambda x: x * (x.data_ptr() % 16), [lambda: BIG[1:3], lambda: BIG[2:4]]),
    "base": (lambda x: x * 2 if x._base is None else x * 3, [lambda: BIG[1:3], lambda: BIG[:2].clone()]),
    "one memory": (lambda x: x * 2 if x.is_set_to(BIG) else x * 3, [lambda: BIG.view(16), lambda: BIG.clone()]),
    "shared": (lambda x: x * 2 if x.is_shared() else x * 3, [lambda: torch.ones(2).share_memory_(), lambda: torch.ones(2)]),
    "size of the typed storage": (lambda x: x * x.storage().size(), [lambda: BIG[1:3], lambda: BIG[:2].clone()]),
    "leaf": (lambda x: x * 2 if x.is_leaf else x * 3, [lambda: BIG[1:3], lambda: BIG[2:4]]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ASKED)
def test_a_property_of_an_argument_is_asked_at_every_call(name: str, mode: str) -> None:
    model, makers = ASKED[name]
    step = graphs.capture(model)
    with MODES[mode]():
        for _ in range(2):
            for make in makers:
                x = make()
                assert torch.equal(step(x), model(x))
    refusals = step.report().refusals
    assert {refusal.reason for refusal in refusals} == {"unsupported-argument"}
    assert refusals[0].operator.removeprefix("Tensor.") in OF_THE_OBJECT.values() and refusals[0].line


def test_the_version_of_an_argument_is_asked_at_every_call() -> None:
    def model(x: Tensor) -> Tensor:
        return x * x._version

    step, x = graphs.capture(model), torch.ones(2)
    with torch.no_grad():
        for _ in range(4):
            x.add_(1)
            assert torch.equal(step(x), model(x))


@pytest.mark.parametrize("model", [lambda x: (x * 2) * (1 + 0 * (x * 2).storage_offset()), lambda x: BIG[1].storage_offset() * x])
def test_properties_of_other_tensors_may_be_asked(model: Callable[[Tensor], Tensor]) -> None:
    step = graphs.capture(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(3)
            assert torch.equal(step(x), model(x))
    assert step.report().replays == 3


def test_what_libraries_ask_on_their_own_account_is_no_reason() -> None:
    step = graphs.capture(torch.nn.functional.scaled_dot_product_attention)
    with torch.no_grad():
        for _ in range(3):
            q = torch.randn(1, 2, 4, 8)
            torch.testing.assert_close(step(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert step.report().replays == 3
