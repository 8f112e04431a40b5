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
