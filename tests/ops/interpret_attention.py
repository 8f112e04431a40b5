"""Run the kernels of ``one_query_attention`` in Triton's interpreter and print one JSON line of relative errors.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_attention.py). Results are float32 here, since the interpreter truncates to bfloat16.
"""

from __future__ import annotations

import json
import sys

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphs.ops.attention.kernel import launch_attention

CASES = (
    (1, 2, 2, 20, 16, "no mask"),
    (2, 8, 2, 100, 32, "filled in part"),
    (1, 4, 1, 600, 64, "filled in part"),
    (2, 4, 4, 300, 128, "one row is empty"),
    (1, 16, 1, 300, 128, "each head another"),
    (1, 2, 1, 9000, 32, "each head another"),
    (1, 4, 1, 600, 64, "boolean, filled in part"),
    (2, 4, 4, 300, 128, "boolean, one row is empty"),
)
"""Batch, heads, heads of keys, positions, width, and what the mask hides."""


def mask_of(kind: str, batch: int, heads: int, length: int) -> torch.Tensor | None:
    """A bias that is 0 or ``-inf``, or the boolean mask that it stands for."""
    if kind.startswith("boolean, "):
        bias = mask_of(kind.removeprefix("boolean, "), batch, heads, length)
        return None if bias is None else bias == 0
    if kind == "no mask":
        return None
    if kind == "filled in part":
        return torch.where(torch.arange(length) < length // 5, 0.0, -torch.inf).expand(batch, 1, 1, length)
    if kind == "one row is empty":
        return torch.where(torch.arange(batch) > 0, 0.0, -torch.inf).view(batch, 1, 1, 1).expand(batch, 1, 1, length)
    return torch.where(torch.arange(heads)[:, None] + torch.arange(length) % 7 < 9, 0.0, -torch.inf)[None, :, None]


def run(batch: int, heads: int, groups: int, length: int, width: int, kind: str) -> float:
    """The largest error against float64; what the mask hides in whole parts is NaN, and must not be read."""
    torch.manual_seed(length)
    seen = mask_of(kind.removeprefix("boolean, "), batch, heads, length)
    query = torch.randn(batch, heads, 1, width).bfloat16()
    key = torch.randn(batch, length, groups, width).bfloat16().transpose(1, 2)
    value, mask = torch.randn(batch, groups, length, width).bfloat16(), mask_of(kind, batch, heads, length)
    shares = heads // groups
    scores = query.double() @ key.double().repeat_interleave(shares, 1).transpose(2, 3) * width**-0.5
    weights = torch.softmax(scores if seen is None else scores + seen.double(), -1).nan_to_num(0.0)
    exact = weights @ value.double().repeat_interleave(shares, 1)
    if kind.endswith("filled in part") and length > 512:  # the rest of the block that holds the last one is read
        key[:, :, 256:], value[:, :, 256:] = float("nan"), float("nan")
    held = torch.full((batch, heads, 1, width), float("nan"))
    launch_attention(query, key, value, mask, width**-0.5, held)
    return float((held - exact).abs().max() / exact.abs().max().clamp(min=1e-9))


def run_special(kind: str, length: int) -> float:
    """The largest error where numbers are none or have no end; 1 where the results are not of the same kind."""
    torch.manual_seed(length)
    query, key, value = (torch.randn(1, 2, size, 16).bfloat16() for size in (1, length, length))
    bias = torch.zeros(1, 1, 1, length)
    if kind == "an infinite value":
        value[0, 0, 3, 5], value[0, 1, 3, 5] = torch.inf, -torch.inf
    else:
        bias[..., :] = -torch.inf
        bias[..., 2] = torch.nan
    scores = query.double() @ key.double().transpose(2, 3) * 0.25 + bias.double()
    exact = torch.softmax(scores, -1) @ value.double()
    held = torch.zeros(1, 2, 1, 16)
    launch_attention(query, key, value, bias, 0.25, held)
    return float(torch.isclose(held.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True).logical_not().double().max())


SPECIAL = [(kind, length) for kind in ("an infinite value", "a bias that is no number") for length in (20, 3000)]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 16),
    length=st.integers(1, 700),
    width=st.sampled_from([16, 32, 64, 128, 256]),
    kind=st.sampled_from(
        [
            "no mask",
            *(way + kind for way in ("", "boolean, ") for kind in ("filled in part", "one row is empty", "each head another")),
        ]
    ),
)
def check(batch: int, groups: int, shared: int, length: int, width: int, kind: str) -> None:
    """Any shape that the kernel takes."""
    assert run(batch, groups * shared, groups, length, width, kind) < 1e-5


if __name__ == "__main__":
    check()
    found = {str(case): run(*case) for case in CASES}
    json.dump(found | {str(case): run_special(*case) for case in SPECIAL}, sys.stdout)
