"""Every hazard in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.hazards.case import HAZARDS, Hazard
from tests.hazards.collection import SECTIONS
from tests.hazards.running import check

assert SECTIONS
PAIRS = [(hazard, context) for hazard in HAZARDS.values() for context in hazard.contexts]


@pytest.mark.parametrize(("hazard", "context"), [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in PAIRS])
def test_a_hazard_equals_eager_at_every_call(hazard: Hazard, context: str, device: torch.device) -> None:
    check(hazard, context, device)
