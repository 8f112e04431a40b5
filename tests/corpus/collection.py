"""All cases, in the order of their files."""

from __future__ import annotations

from tests.corpus import (
    addressing,
    arithmetic,
    bounded,
    combined,
    constants,
    control_flow,
    experts,
    own_state,
    refusals,
    selection,
    sides,
)
from tests.corpus.case import Case

MODULES = (addressing, arithmetic, bounded, selection, control_flow, sides, constants, experts, combined, own_state, refusals)
CASES = [entry for module in MODULES for entry in vars(module).values() if isinstance(entry, Case)]
