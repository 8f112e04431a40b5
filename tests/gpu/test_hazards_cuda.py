"""Every hazard in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.hazards.case import HAZARDS, Hazard
from tests.hazards.collection import SECTIONS
from tests.hazards.expected import FAILING
from tests.hazards.running import check

assert SECTIONS


@pytest.mark.parametrize("context", ["grad", "no_grad", "inference_mode", "autocast+no_grad", "autocast+inference_mode"])
@pytest.mark.parametrize("hazard", HAZARDS.values(), ids=lambda hazard: hazard.name)
def test_a_hazard_equals_eager_at_every_call(
    hazard: Hazard, context: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if context not in hazard.contexts:
        pytest.skip("not tried under this context")
    if hazard.name in FAILING:
        request.applymarker(pytest.mark.xfail(strict=False, reason=FAILING[hazard.name]))
    check(hazard, context, device)
