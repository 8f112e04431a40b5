"""Run the kernel of ``skinny_linear`` in Triton's interpreter and print one JSON line of relative errors.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_skinny.py). Results are float32 here, since the interpreter truncates to bfloat16.
"""

from __future__ import annotations

import json
import sys

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphs.ops.skinny.kernel import launch_skinny
from graphs.ops.wo_a import tiles

CASES = ((1, (32,), 256), (5, (48, 16), 512), (8, (16, 32, 16), 1024), (13, (16, 16, 64), 2048), (2, (33, 7, 16), 768))
"""M, N of each weight, K."""


def run(m: int, sizes: tuple[int, ...], k: int, *, turned: bool) -> float:
    """The largest error against float64, over all weights; rows beyond M must not be written. Turned weights have biases."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).bfloat16()
    weights = [torch.randn(n, k, generator=generator).bfloat16() for n in sizes]
    held = [torch.full((m + 1, n), float("nan")) for n in sizes]
    fitting = tiles.skinny(m, sum(sizes), k, turned=turned)
    assert fitting is not None
    biases = [torch.randn(n, generator=generator).bfloat16() for n in sizes] if turned else []
    stored = [weight.t().contiguous().t() for weight in weights] if turned else weights
    launch_skinny(x, stored, [y[:m] for y in held], *fitting, biases)
    assert all(y[m].isnan().all() for y in held), "the kernel wrote beyond its rows"
    exact = [x.double() @ weight.double().t() for weight in weights]
    exact = [product + bias.double() for product, bias in zip(exact, biases, strict=True)] if turned else exact
    return max(float((y[:m] - e).abs().max() / e.abs().max()) for y, e in zip(held, exact, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(1, 16),
    sizes=st.lists(st.integers(2, 70), min_size=1, max_size=3),
    blocks=st.integers(1, 8),
    turned=st.booleans(),
)
def check(m: int, sizes: list[int], blocks: int, turned: bool) -> None:
    """Any shape that has a tile."""
    assert run(m, tuple(sizes), 256 * blocks, turned=turned) < 1e-5


if __name__ == "__main__":
    check()
    json.dump({f"{case} {turned}": run(*case, turned=turned) for case in CASES for turned in (False, True)}, sys.stdout)
