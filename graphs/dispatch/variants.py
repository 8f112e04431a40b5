"""Recordings of one key for different outcomes of what the step decides by host values."""

from __future__ import annotations

from graphs.errors import ManyWays, Site
from graphs.first_call.recorded_step import RecordedStep, Variants

MAX_VARIANTS = 16
"""Recordings of one key."""
_PATIENCE = 4 * MAX_VARIANTS  # calls that none of them could serve, before a step that mostly goes other ways is given up
_SHOWN = 4  # lines that a refusal for too many variants names


def many_variants(variants: list[RecordedStep]) -> ManyWays:
    """The refusal for a call that takes none of the recorded variants; it names the lines that decide."""
    lines = list(dict.fromkeys(line for variant in variants for line in getattr(variant.candidate, "decided_at", ())))
    also = ", ".join(f"{file.rpartition('/')[2]}:{line}" for file, line in lines[1:_SHOWN])
    detail = f"{len(variants)} ways through the step are recorded, and this call takes another"
    detail += f"; {also} and others decide too" if len(lines) > _SHOWN else f"; {also} decides too" if also else ""
    return ManyWays(detail, operator="branch", site=Site.at(lines[0]) if lines else None)


def is_hopeless(group: Variants) -> bool:
    """Whether most calls of a key are served by none of its variants."""
    return group.broken > _PATIENCE and 2 * group.broken > sum(variant.replays for variant in group.variants)
