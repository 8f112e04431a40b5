"""Run the kernel of ``skinny_linear`` in Triton's interpreter and print one JSON line of relative errors.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_skinny.py). Results are float32 here, since the interpreter truncates to bfloat16; what is rounded in
between, with a norm or an activation, is float16.
"""

from __future__ import annotations

import json
import sys

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphs.ops.skinny.around import Around
from graphs.ops.skinny.kernel import launch_skinny
from graphs.ops.skinny.operator import ACTIVATIONS, products
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
    launch_skinny(x, stored, [y[:m] for y in held], *fitting, biases, turned=turned)
    assert all(y[m].isnan().all() for y in held), "the kernel wrote beyond its rows"
    exact = [x.double() @ weight.double().t() for weight in weights]
    exact = [product + bias.double() for product, bias in zip(exact, biases, strict=True)] if turned else exact
    return max(float((y[:m] - e).abs().max() / e.abs().max()) for y, e in zip(held, exact, strict=True))


def run_around(m: int, n: int, k: int, norm: str, behind: str, gated: bool, dtype: torch.dtype) -> float:
    """The largest error of one launch with a norm and what is behind, against the meaning of the operator in float64."""
    generator = torch.Generator().manual_seed(m * n)

    def made(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(of)

    x = made(m, k) * 2 + (1 if norm == "layer" else 0)
    gain, shift = (None if norm == "none" else made(k)), (made(k) if norm == "layer" else None)
    residual = made(m, n) if behind == "residual" else None
    activation = behind if behind in ACTIVATIONS else "none"
    around = Around(norm, gain, shift, 1e-5, activation, residual)
    weights, biases = [made(n, k) / k**0.5 for _ in range(2 if gated else 1)], [made(n) for _ in range(2 if gated else 1)]
    held = torch.full((m + 1, n), float("nan"))
    fitting = tiles.skinny(m, n, k, gated=gated)
    assert fitting is not None
    launch_skinny(x, weights, [held[:m]], *fitting, biases, around, turned=False)
    assert held[m].isnan().all(), "the kernel wrote beyond its rows"
    wide = Around(*(one.double() if isinstance(one, torch.Tensor) else one for one in around))
    exact = products(x.double(), [one.double() for one in weights], [one.double() for one in biases], *wide)[0]
    return float((held[:m] - exact).abs().max() / exact.abs().max())


AROUND = [
    (norm, behind, gated, dtype)
    for norm in ("none", "rms", "layer")
    for behind in ("none", "residual", *ACTIVATIONS)
    for gated in (False, True)
    for dtype in (torch.float16, torch.bfloat16)
    if (not gated or behind in ACTIVATIONS) and (dtype is torch.float16 or norm == "rms")
]


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
    found = {f"{case} {turned}": run(*case, turned=turned) for case in CASES for turned in (False, True)}
    for index, (norm, behind, gated, dtype) in enumerate(AROUND):
        name = f"{dtype} {norm} {behind} {gated}"
        found[name] = run_around(1 + index % 13, 16 + 9 * (index % 3), 256 * (1 + index % 4), norm, behind, gated, dtype)
    json.dump(found, sys.stdout)
