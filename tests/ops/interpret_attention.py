"""Run the kernels of ``one_query_attention`` in Triton's interpreter and print one JSON line of relative errors.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_attention.py). Results are float32 here, since the interpreter truncates to bfloat16.
"""

from __future__ import annotations

import json
import sys

import torch

from graphs.ops.attention.kernel import launch_attention

CASES = (
    (1, 2, 2, 20, 16, "no mask"),
    (2, 8, 2, 100, 32, "filled in part"),
    (1, 4, 1, 600, 64, "filled in part"),
    (2, 4, 4, 300, 128, "one row is empty"),
    (1, 16, 1, 300, 128, "each head another"),
    (1, 2, 1, 9000, 32, "each head another"),
)
"""Batch, heads, heads of keys, positions, width, and what the mask hides."""


def mask_of(kind: str, batch: int, heads: int, length: int) -> torch.Tensor | None:
    """A bias that is 0 or ``-inf``."""
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
    query = torch.randn(batch, heads, 1, width).bfloat16()
    key = torch.randn(batch, length, groups, width).bfloat16().transpose(1, 2)
    value, mask = torch.randn(batch, groups, length, width).bfloat16(), mask_of(kind, batch, heads, length)
    shares = heads // groups
    scores = query.double() @ key.double().repeat_interleave(shares, 1).transpose(2, 3) * width**-0.5
    weights = torch.softmax(scores if mask is None else scores + mask.double(), -1).nan_to_num(0.0)
    exact = weights @ value.double().repeat_interleave(shares, 1)
    if kind == "filled in part" and length > 512:  # the rest of the block that holds the last one is read
        key[:, :, 256:], value[:, :, 256:] = float("nan"), float("nan")
    held = torch.full((batch, heads, 1, width), float("nan"))
    launch_attention(query, key, value, mask, width**-0.5, held)
    return float((held - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    json.dump({str(case): run(*case) for case in CASES}, sys.stdout)
