"""Run the kernel of ``expert_linear`` in Triton's interpreter and print one JSON line of relative errors.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_experts.py). Results are float32 here, since the interpreter truncates to bfloat16.
"""

from __future__ import annotations

import json
import sys

import torch

from graphs.ops.experts.kernel import launch_experts

CASES = ((1, 1, 16, 64), (6, 4, 48, 100), (5, 3, 7, 1500), (3, 8, 40, 2048))  # rows, experts, outputs, features


def run(rows: int, experts: int, n: int, k: int, *, turned: bool) -> float:
    """The largest error against float64; rows behind the last must not be written, one of no expert is NaN."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=generator).bfloat16()
    weights = torch.randn(experts, n, k, generator=generator).bfloat16()
    chosen = torch.randint(-experts, experts, (rows,), generator=generator)
    held = torch.full((rows + 1, n), float("nan"))
    stored = weights.transpose(1, 2).contiguous().transpose(1, 2) if turned else weights
    launch_experts(x, stored, chosen, held[:rows])
    assert held[rows].isnan().all(), "the kernel wrote beyond its rows"
    none = torch.zeros(1, n)
    launch_experts(x[:1], stored, torch.tensor([experts]), none)
    assert none.isnan().all(), "an expert that there is not was taken for one"
    exact = torch.bmm(weights[chosen].double(), x.double().unsqueeze(-1)).squeeze(-1)
    return float((held[:rows] - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    json.dump({f"{case} {turned}": run(*case, turned=turned) for case in CASES for turned in (False, True)}, sys.stdout)
