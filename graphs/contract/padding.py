"""What the rows beyond the real batch of a copied slot hold."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from graphs.errors import ConfigError

Policy = Literal["repeat", "zero", "keep"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Padding:
    """Padding policy of one slot.

    Attributes:
        kind: ``"repeat"`` (the last real row again, the default: always a legal row), ``"zero"``, ``"keep"`` (whatever
            the slot held), or ``"sentinel"``.
        value: the sentinel's value, for example the index of a cache slot that no sequence owns.
    """

    kind: Policy | Literal["sentinel"] = "repeat"
    value: int | float = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for an unknown kind."""
        if self.kind not in (*POLICIES, "sentinel"):
            raise ConfigError("kind", self.kind, (*POLICIES, "sentinel"))

    def fill_bits(self, dtype: torch.dtype) -> int:
        """The pad value as the bits of one element of ``dtype``, repeated to fill a signed 64-bit word.

        Raises:
            ConfigError: a sentinel other than zero for elements wider than a word (complex128).
        """
        if self.kind == "sentinel" and self.value != 0 and dtype.itemsize > 8:
            raise ConfigError("sentinel", self.value, f"0 for {dtype}")
        element = torch.tensor([self.value if self.kind == "sentinel" else 0], dtype=dtype)
        raw = bytes(element.view(torch.uint8).tolist())
        return int(struct.unpack("<q", (raw * 8)[:8])[0])


def sentinel(value: int | float) -> Padding:
    """Pad with ``value``: for index inputs, a row that no sequence reads."""
    return Padding("sentinel", value)


def as_padding(name: str, policy: Padding | Policy) -> Padding:
    """Accept a policy by name."""
    if isinstance(policy, Padding):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ConfigError(f"padding[{name!r}]", policy, f"one of {POLICIES} or graphs.sentinel(value)")
    return Padding(policy)


def pad_rows(x: torch.Tensor, dim: int, rows: int, policy: Padding, out: torch.Tensor) -> torch.Tensor:
    """Copy the rows of ``x`` along ``dim`` into ``out`` (``rows`` long there) and fill the rest by ``policy``."""
    real = x.shape[dim]
    out.narrow(dim, 0, real).copy_(x)
    if real == rows or policy.kind == "keep":
        return out
    rest = out.narrow(dim, real, rows - real)
    if policy.kind == "repeat":
        rest.copy_(x.narrow(dim, real - 1, 1).expand_as(rest))
    else:
        rest.fill_(policy.value if policy.kind == "sentinel" else 0)
    return out
