"""Copies of arguments have all that the step can see of the arguments: layout, identity, bits, attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.contract.slots import make_contract

Tensor = torch.Tensor
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


def complex_(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.complex64)


def thrice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x, x


def scaled(x: Tensor, scale: float) -> Tensor:
    x.scale = scale  # type: ignore[attr-defined]
    return x


def attention(**settings: Any) -> nn.Module:
    return nn.MultiheadAttention(8, 2, **settings).eval()


LINEAR, ATTENTION = nn.Linear(8, 4), attention()
STEPS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "a slice": (LINEAR, lambda: (random(2, 5, 8)[:, -1:],)),
    "a transpose": (lambda x: LINEAR(x).relu(), lambda: (random(8, 5).t(),)),
    "a transpose, reshaped": (lambda x: x.reshape(-1) * 2, lambda: (random(4, 8).t(),)),
    "every other column": (lambda x: x.reshape(-1) * 2, lambda: (random(4, 8)[:, ::2],)),
    "expanded": (lambda x: LINEAR(x).relu(), lambda: (random(1, 8).expand(5, 8),)),
    "expanded with holes": (lambda x: x.reshape(-1) * 2, lambda: (random(4, 1, 16)[:, :, ::2].expand(4, 3, 8),)),
    "overlapping windows": (lambda x: x.sum(-1), lambda: (random(10).unfold(0, 3, 1),)),
    "channels last": (nn.Conv2d(3, 4, 3), lambda: (random(2, 3, 8, 8).to(memory_format=torch.channels_last),)),
    "size one with a stride of its own": (lambda x: x * x.stride(0), lambda: (random(4, 8)[:1, :4],)),
    "no elements": (lambda x: x.sum(0) + x.stride(1), lambda: (random(0, 8)[:, ::2],)),
    "a branch on contiguity": (lambda x: x * 2 if x.is_contiguous() else x * 3, lambda: (random(8, 4).t(),)),
    "a stride as a number": (lambda x: x * x.stride(0), lambda: (random(8, 6)[:, ::2],)),
    "a column of a huge table": (LINEAR, lambda: (torch.zeros(65, 1, 1 << 18)[:, 0, :8].add_(random(65, 8)),)),
    "one tensor three times": (attention(batch_first=True), lambda: thrice(random(2, 5, 8))),
    "one tensor three times, sequence first": (attention(), lambda: thrice(random(5, 2, 8))),
    "one tensor twice": (attention(), lambda: (random(5, 2, 8), *thrice(random(6, 2, 8))[:2])),
    "self-attention": (lambda x: ATTENTION(x, x, x), lambda: (random(5, 2, 8),)),
    "a branch on identity": (lambda k, v: k * 2 if k is v else k * 3, lambda: thrice(random(3))[:2]),
    "equal tensors that are two": (lambda k, v: k * 2 if k is v else k * 3, lambda: (torch.ones(3), torch.ones(3))),
    "one tensor in two containers": (
        lambda a, b: a[0] * 2 if a[0] is b["x"] else a[0],
        lambda: (lambda x: ([x], {"x": x}))(random(3)),
    ),
    "a tensor and its row": (lambda k, v: k * 2 + v, lambda: (lambda x: (x, x[0]))(random(3, 3))),
    "conjugated": (lambda z: z * 2, lambda: (complex_(3, 4).conj(),)),
    "conjugated and transposed": (lambda z: z @ z.mH, lambda: (complex_(3, 4).mH,)),
    "conjugated with holes": (lambda z: z * 2, lambda: (complex_(3, 8)[:, ::2].conj(),)),
    "a branch on conjugation": (lambda z: z * 2 if z.is_conj() else z * 3, lambda: (complex_(3, 4).conj(),)),
    "negated": (lambda x: x * 2, lambda: (complex_(3, 4).conj().imag,)),
    "a branch on negation": (lambda x: x * 2 if x.is_neg() else x * 3, lambda: (complex_(3).conj().imag,)),
    "an attribute": (lambda x: x * getattr(x, "scale", 1.0), lambda: (scaled(random(3), 2.0),)),
    "a branch on requires_grad": (lambda x: x * 2 if x.requires_grad else x * 3, lambda: (random(3).requires_grad_(),)),
    "an LSTM": (nn.LSTM(8, 4), lambda: (random(5, 2, 8),)),
    "an LSTM of two layers with a state": (nn.LSTM(8, 4, 2), lambda: (random(5, 2, 8), (random(2, 2, 4), random(2, 2, 4)))),
    "a GRU": (nn.GRU(8, 4, batch_first=True), lambda: (random(2, 5, 8),)),
    "a decoder layer": (nn.TransformerDecoderLayer(8, 2, 16).eval(), lambda: (random(5, 2, 8), random(6, 2, 8))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_replays_what_eager_gives_at_every_call(name: str, mode: str) -> None:
    model, arguments = STEPS[name]
    step = graphs.capture(model)
    for _ in range(4):
        given = arguments()
        with MODES[mode]():
            torch.testing.assert_close(step(*given), model(*given), equal_nan=True)
    assert step.report().replays == 4, str(step.report())


ALTERNATING: dict[str, tuple[Callable[..., Tensor], list[Callable[[], tuple[Any, ...]]]]] = {
    "attributes": (
        lambda x: x * getattr(x, "scale", 1.0),
        [lambda: (scaled(random(3), 2.0),), lambda: (scaled(random(3), 3.0),), lambda: (random(3),)],
    ),
    "identity": (
        lambda k, v: k * 2 if k is v else k * 3,
        [lambda: thrice(torch.ones(3))[:2], lambda: (torch.ones(3), torch.ones(3))],
    ),
    "which are one": (
        lambda a, b, c: a * 2 if a is b else a * 3 if b is c else a * 5,
        [lambda: (lambda x, y: (x, x, y))(random(2), random(2)), lambda: (lambda x, y: (x, y, y))(random(2), random(2))],
    ),
    "conjugation": (lambda z: torch.view_as_real(z.resolve_conj()), [lambda: (complex_(3),), lambda: (complex_(3).conj(),)]),
    "negation": (lambda x: x * 1, [lambda: (complex_(3).imag,), lambda: (complex_(3).conj().imag,)]),
    "layout": (lambda x: x * 2 if x.is_contiguous() else x * 3, [lambda: (random(4, 4),), lambda: (random(4, 4).t(),)]),
    "requires_grad": (
        lambda x: x * 2 if x.requires_grad else x * 3,
        [lambda: (random(3).requires_grad_(),), lambda: (random(3),)],
    ),
    "inference": (lambda x: x * 2 if x.is_inference() else x * 3, [lambda: (inference(3),), lambda: (ordinary(3),)]),
}


def inference(size: int) -> Tensor:
    with torch.inference_mode():
        return torch.randn(size)


def ordinary(size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALTERNATING)
def test_what_tells_two_calls_apart_is_part_of_the_signature(name: str, mode: str) -> None:
    model, kinds = ALTERNATING[name]
    step = graphs.capture(model)
    for round_ in range(3):
        for arguments in kinds:
            for _ in range(2):  # the second is recognised by the one before
                given = arguments()
                with MODES[mode]():
                    assert torch.equal(step(*given), model(*given)), (round_, step.report())


def test_a_branch_on_contiguity_is_right_with_buckets() -> None:
    def model(x: Tensor) -> Tensor:
        return x * 2 if x.is_contiguous() else x * 3

    step = graphs.capture(model, buckets=[4, 8], batch_dims={"x": 0})
    with torch.no_grad():
        for rows in (3, 4, 7, 3):
            for x in (random(rows, 5), random(5, rows).t(), random(rows, 10)[:, ::2]):
                assert torch.equal(step(x), model(x))


def test_an_object_on_an_argument_is_a_reason_by_name() -> None:
    step = graphs.capture(lambda x: x * x.mask)
    with torch.no_grad():
        for _ in range(3):
            x, mask = random(3), random(3)
            x.mask = mask  # type: ignore[attr-defined]
            assert torch.equal(step(x), x * mask)
    refusal = step.report().refusals[0]
    assert refusal.reason == "unsupported-argument" and "mask" in refusal.detail


def test_an_attribute_that_the_step_sets_on_an_argument_is_a_reason_by_name() -> None:
    def model(x: Tensor) -> Tensor:
        x.seen = True  # type: ignore[attr-defined]
        return x * 2

    step = graphs.capture(model)
    with torch.no_grad():
        for _ in range(6):
            x = random(3)
            assert torch.equal(step(x), x * 2) and x.seen  # type: ignore[attr-defined]
    assert "seen" in step.report().refusals[0].detail


def reading_around(x: Tensor) -> Tensor:
    return torch.as_strided(x, (3,), (1,), 1) * 1


def reading_between(x: Tensor) -> Tensor:
    return torch.as_strided(x, (3,), (1,)) * 1


@pytest.mark.parametrize(("model", "start", "every"), [(reading_around, 2, 1), (reading_between, 0, 2)])
def test_memory_around_an_argument_is_not_read_from_a_copy(model: Callable[[Tensor], Tensor], start: int, every: int) -> None:
    step = graphs.capture(model)
    with torch.no_grad():
        for _ in range(3):
            x = random(12)[start::every]
            assert torch.equal(step(x), model(x))
    assert [refusal.reason for refusal in step.report().refusals] == ["unsupported-operator"]


def test_a_contiguous_argument_is_its_buffer_and_costs_no_copy() -> None:
    tensors = [random(3, 4), random(4, 3).t(), random(1, 4).expand(3, 4), random(3, 8)[:, ::2]]
    contract = make_contract("abcd", tensors, (), {}, (None,) * 4, None)
    buffers = contract.filled(tensors)
    arranged = contract.arrange(buffers, tensors)
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(arranged, buffers, strict=True)] == [True, True, True, False]
    assert arranged[0] is buffers[0] and buffers[2].numel() == 4
    assert [a.stride() for a in arranged] == [t.stride() for t in tensors]
    assert all(torch.equal(a, t) for a, t in zip(arranged, tensors, strict=True))
