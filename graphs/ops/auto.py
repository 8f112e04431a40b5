"""Which path ``auto`` takes: a pure function of the device, G and M, read from a small table of measurements."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rule(NamedTuple):
    """For up to ``max_tokens`` tokens and up to ``max_groups`` groups, ``path`` is the fastest of those measured."""

    max_groups: int
    max_tokens: int
    path: str


FALLBACK = "einsum"  # the library GEMM: never wrong, on no device far behind
TABLE: dict[str, tuple[Rule, ...]] = {  # device key -> rules, the first that fits decides; a device not here takes FALLBACK
    "sm_90": (  # H200, K = 4096, N = 1024, time in a graph over einsum's
        Rule(max_groups=2, max_tokens=16, path="fused"),  # G = 2: 0.56 at M = 1, 0.57 at 4, 0.72 at 16; 2.1 at 64
        Rule(max_groups=7, max_tokens=2**31, path="einsum"),  # not measured between 2 and 8 groups
        Rule(max_groups=16, max_tokens=16, path="fused"),  # G = 8: 0.86 at M = 4; G = 16: 0.65 at M = 1 and 16
    ),
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


def choose(key: str, groups: int, tokens: int) -> str:
    """The path for ``tokens`` rows of ``groups`` groups on the device ``key``."""
    for rule in TABLE.get(key, ()):
        if groups <= rule.max_groups and tokens <= rule.max_tokens:
            return rule.path
    return FALLBACK


def candidates(key: str, groups: int) -> tuple[str, ...]:
    """Every path :func:`choose` can return for this device and G: the weights to keep, the widest-ranging one last."""
    paths = [rule.path for rule in TABLE.get(key, ()) if groups <= rule.max_groups]
    return tuple(dict.fromkeys([*paths, FALLBACK]))
