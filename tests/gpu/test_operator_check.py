"""`graphs.capture_check` and `graphs.register_op` on a device: a Triton kernel passes, what the driver refuses is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphs
from graphs import errors

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")


@triton.jit
def _scale(x, y, n, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, place < n) * factor, place < n)


def scale(x: Tensor, factor: float) -> Tensor:
    y = torch.empty_like(x)
    _scale[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), factor, BLOCK=256)
    return y


def scale_in_place(x: Tensor, factor: float) -> None:
    _scale[(triton.cdiv(x.numel(), 256),)](x, x, x.numel(), factor, BLOCK=256)


def waiting(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x * 2


def reading(x: Tensor) -> Tensor:
    return x * x.sum().item()


def drawing(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def operator(fn: Any, **settings: Any) -> Any:
    return graphs.register_op(fn, name=f"gpu_operator_check::{fn.__name__}", **settings)


def test_a_triton_kernel_passes_and_is_recorded(device: torch.device) -> None:
    op = operator(scale, fake=lambda x, factor: torch.empty_like(x))
    graphs.capture_check(op, (torch.randn(1000, device=device), 3.0))
    step = graphs.capture(lambda x: op(x, 2.0) + 1, strict=True)
    for _ in range(4):
        x = torch.randn(1000, device=device)
        assert torch.equal(step(x), x * 2 + 1)
    assert step.report().replays == 4


def test_writes_of_a_triton_kernel_are_compared_with_what_is_declared(device: torch.device) -> None:
    x = torch.randn(1000, device=device)
    graphs.capture_check(operator(scale_in_place, mutates_args=("x",)), (x, 3.0))
    undeclared = graphs.register_op(scale_in_place, name="gpu_operator_check::undeclared")
    with pytest.raises(errors.UndeclaredWrite, match="'x'"):
        graphs.capture_check(undeclared, (x, 3.0))


def test_what_the_driver_refuses_is_named(device: torch.device) -> None:
    x = torch.randn(4, device=device)
    with pytest.raises(errors.CaptureFailed, match=r"gpu_operator_check\.waiting"):
        graphs.capture_check(operator(waiting), (x,))
    with pytest.raises(errors.HostSync, match=r"gpu_operator_check\.reading"):
        graphs.capture_check(operator(reading), (x,))
    assert torch.equal(x + 0, x)  # the stream is usable afterwards


def test_random_numbers_advance_in_replays(device: torch.device) -> None:
    x = torch.randn(4, device=device)
    graphs.capture_check(operator(drawing, tags=(torch.Tag.nondeterministic_seeded,)), (x,))
    with pytest.raises(errors.HiddenState, match="draws random numbers"):
        graphs.capture_check(graphs.register_op(drawing, name="gpu_operator_check::unannounced"), (x,))
