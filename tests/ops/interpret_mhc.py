"""Run the kernels of ``graphs::mhc_*`` in Triton's interpreter, for sizes that Hypothesis draws, and print the largest errors.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_mhc.py). Streams are float32, since the interpreter truncates to bfloat16; weights are of any dtype.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphs.ops.mhc import kernel, reference, tiles

Tensor = torch.Tensor
NUMBERS = (1e-6, 1e-6)
errors: defaultdict[str, float] = defaultdict(float)


def compare(name: str, made: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Note the largest error of ``made``, as a part of the largest value of each tensor."""
    for one, wanted in zip(made, exact, strict=True):
        assert not one.isnan().any(), f"{name} left something out"
        errors[name] = max(errors[name], float((one - wanted).abs().max() / wanted.abs().max()))


def layer(outputs: int, scales: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A linear layer whose results are about 1."""
    return (
        (torch.randn(outputs, features) / features**0.5).to(dtype),
        torch.randn(outputs).to(dtype),
        torch.randn(scales).to(dtype),
    )


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    m=st.sampled_from([1, 2, 3, 5, 8]),
    hc=st.sampled_from(tiles.STREAMS),
    width=st.sampled_from([32, 96, 160, 256]),
    iterations=st.sampled_from([1, 2, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 100),
)
def check(m: int, hc: int, width: int, iterations: int, dtype: torch.dtype, rows: int, seed: int) -> None:
    """All four operators at one size; a row more than there are must not be written."""
    torch.manual_seed(seed)
    tile = tiles.few(m, hc, width)
    assert tile is not None
    tile = tile._replace(rows=rows)
    streams, out = torch.randn(m, hc, width), torch.randn(m, width)
    post, comb = torch.rand(m, hc), torch.rand(m, hc, hc)
    weights = layer((2 + hc) * hc, 3, hc * width, dtype)

    def held(*shape: int) -> Tensor:
        return torch.full((m + 1, *shape), float("nan"))

    def results() -> list[Tensor]:
        return [held(width), held(hc), held(hc, hc)]

    spread = held(hc, width)
    kernel.launch_spread(out, streams, post, comb, spread[:m], tile)
    wanted = reference.post(out.double(), streams.double(), post.double(), comb.double())
    compare("post", (spread[:m],), (wanted,))

    made = results()
    kernel.launch_mix(None, streams, weights, (*NUMBERS, iterations), tuple(one[:m] for one in made), tile)
    compare("pre", tuple(one[:m] for one in made), in_float64(streams, weights, iterations))

    both, after = results(), held(hc, width)
    behind = (out, streams, post, comb)
    kernel.launch_mix(behind, after[:m], weights, (*NUMBERS, iterations), tuple(one[:m] for one in both), tile)
    compare("post_pre", tuple(one[:m] for one in (after, *both)), (wanted, *in_float64(wanted, weights, iterations)))

    fn, base, scale = layer(hc, 1, hc * width, dtype)
    summed = held(width)
    kernel.launch_mix(None, streams, (fn, base, scale), (*NUMBERS, 0), (summed[:m],), tile)
    compare("head", (summed[:m],), in_float64(streams, (fn, base, scale), 0))
    assert all(bool(one[m].isnan().all()) for one in (spread, after, summed, *made, *both)), "written beyond the rows"


def in_float64(streams: Tensor, weights: tuple[Tensor, Tensor, Tensor], iterations: int) -> tuple[Tensor, ...]:
    """The input of a block, ``post`` and ``comb``; without iterations that of the head."""
    hc, x = streams.shape[1], streams.double()
    (fn, base, scale), (norm_eps, eps) = (weight.double() for weight in weights), NUMBERS
    flat = x.flatten(1)
    mixes = (flat / (flat.square().mean(1, keepdim=True) + norm_eps).sqrt()) @ fn.t()
    pre = torch.sigmoid(mixes[:, :hc] * scale[0] + base[:hc]) + eps
    mixed = torch.einsum("th,thd->td", pre, x)
    if not iterations:
        return (mixed,)
    post = 2 * torch.sigmoid(mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    logits = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).view(-1, hc, hc)
    return mixed, post, reference.sinkhorn(torch.softmax(logits, -1) + eps, eps, iterations)


if __name__ == "__main__":
    check()
    json.dump(errors, sys.stdout)
