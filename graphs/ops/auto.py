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
TABLE: dict[str, tuple[Rule, ...]] = {}  # device key -> rules, the first that fits decides; a device not here takes FALLBACK


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
