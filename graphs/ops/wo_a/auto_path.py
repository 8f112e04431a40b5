"""Which path ``auto`` takes: a pure function of G and M and of rules that were measured, here or by the user.

Rules are looked for in this order: what ``python -m graphs tune wo_a`` left for this device and these versions
(`tuned_path`), the packaged :data:`TABLE`, the table of the nearest relative, and :data:`FALLBACK` alone. Only paths
that leave activations as they are take part: ``bmm`` and ``gloop`` are never faster here than the better of these two and cost
precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Limits = tuple[tuple[int, str], ...]
"""(Up to this many tokens, path), ascending; the last path also serves every larger number."""

Rules = Mapping[int, Limits]
"""Limits by measured number of groups."""

EXACT = ("einsum", "fused")  # paths that quantise no activation
FALLBACK = "einsum"  # the library GEMM: never wrong, on no device far behind
TABLE: dict[str, Rules] = {
    "sm_90": {  # H100, K = 4096, N = 1024, time in a graph over einsum's
        2: ((16, "fused"), (64, "einsum")),  # 0.51 at M = 1, 0.58 at 4, 0.72 at 16; 0.97 at 64, which an H200 may turn round
        8: ((64, "fused"), (256, "einsum")),  # 0.57 at M = 4, 0.58 at 16, 0.67 at 64
        16: ((64, "fused"), (256, "einsum")),  # 0.52 at M = 1, 0.56 at 16, 0.61 at 64
    },
}


def device_key(device: torch.device | str) -> str:
    """``cpu``, ``sm_90``, ``gfx950``, ...: the row of the table a device belongs to."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def packaged(key: str) -> Rules:
    """The rules in :data:`TABLE` for a device, or for what is most like it.

    NVIDIA's chips after sm_90 take its rules: they run the same kernels, and memory is likewise what decides at few tokens. No
    AMD chip has been measured, and none is like one that has.
    """
    if key in TABLE:
        return TABLE[key]
    generation = key.removeprefix("sm_")
    return TABLE["sm_90"] if generation != key and generation.isdecimal() and int(generation) > 90 else {}


def limits_for(rules: Rules, groups: int) -> Limits:
    """The rules of the nearest measured G, by ratio; of two equally near ones the smaller."""
    if not rules:
        return ((1, FALLBACK),)
    return rules[min(sorted(rules), key=lambda g: abs(math.log(g / groups)))]


def choose(limits: Limits, tokens: int) -> str:
    """The path for ``tokens`` rows. A number between two measured ones counts as the larger one."""
    for limit, path in limits:
        if tokens <= limit:
            return path
    return limits[-1][1]


def candidates(limits: Limits) -> tuple[str, ...]:
    """Every path :func:`choose` can return, the one for the most tokens last."""
    return tuple(dict.fromkeys(path for _, path in reversed(limits)))[::-1]
