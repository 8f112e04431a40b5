"""Composite operators that ask whether a mode is active compute, watched and recorded, what eager computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])

STEPS: dict[str, Callable[[Tensor], Any]] = {
    "svdvals": torch.linalg.svdvals,
    "norm of largest": lambda x: torch.linalg.matrix_norm(x, ord=2),
    "nuclear norm": lambda x: torch.linalg.matrix_norm(x, ord="nuc"),
    "norm": lambda x: torch.linalg.norm(x, ord=2),
    "old nuclear norm": lambda x: torch.norm(x, p="nuc"),
    "condition": torch.linalg.cond,
    "rank": torch.linalg.matrix_rank,
    "eigvalsh": lambda x: torch.linalg.eigvalsh(x + x.mT),
    "vectors are used": lambda x: torch.linalg.svd(x),
    "pinv": torch.linalg.pinv,
    "both": lambda x: (torch.linalg.svdvals(x), torch.linalg.svd(x).U),
}


@contexts
@pytest.mark.parametrize("step", STEPS.values(), ids=[name.replace(" ", "-") for name in STEPS])
def test_the_bits_are_those_of_eager(step: Callable[[Tensor], Any], context: Any) -> None:
    captured = graphs.capture(lambda x: step(x))
    with context():
        for seed in range(16):
            x = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed))
            output, wanted = captured(x), step(x)
            for a, b in zip(*(([t] if isinstance(t, Tensor) else [*t]) for t in (output, wanted)), strict=True):
                assert torch.equal(a, b), f"call {seed}"
    assert captured.report().replays >= 15, str(captured.report())


TRANSFORMED: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda step, x: torch.vmap(step)(x.expand(2, 3)),
    "jvp": lambda step, x: torch.func.jvp(step, (x,), (x * 3,)),
    "grad": lambda step, x: torch.func.grad(lambda y: step(y).sum())(x),
    "jacrev": lambda step, x: torch.func.jacrev(step)(x),
    "hessian": lambda step, x: torch.func.hessian(lambda y: step(y).sum())(x),
    "functionalize": lambda step, x: torch.func.functionalize(step)(x),
    "dual": lambda step, x: _tangent(step, x),
}


def _tangent(step: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        made = torch.autograd.forward_ad.unpack_dual(step(torch.autograd.forward_ad.make_dual(x, x * 3)))
        return made.primal.clone(), None if made.tangent is None else made.tangent.clone()


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_call_inside_a_transform_is_eager_by_name(name: str, warm: int, grad: bool) -> None:
    def step(x: Tensor) -> Tensor:
        return x * x

    captured, transformed = graphs.capture(step), TRANSFORMED[name]
    with torch.set_grad_enabled(grad):
        for call in range(warm):
            captured(torch.full((3,), float(call)))
        for call in range(2):
            x = torch.full((3,), 2.0 + call)
            torch.testing.assert_close(transformed(captured, x), transformed(step, x), rtol=0, atol=0)
    report = captured.report()
    assert {refusal.reason for refusal in report.refusals} == {"active-mode"}
    assert report.replays == warm
