"""Every hazard on the CPU: equal to eager at every call, every eager call named, replayed where that is wanted."""

from __future__ import annotations

import pytest
import torch

from tests.hazards.case import HAZARDS, Hazard
from tests.hazards.collection import SECTIONS
from tests.hazards.running import check

PAIRS = [(hazard, context) for hazard in HAZARDS.values() if not hazard.cuda_only for context in hazard.contexts]


@pytest.mark.parametrize(("hazard", "context"), [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in PAIRS])
def test_a_hazard_equals_eager_at_every_call_and_names_each_eager_call(hazard: Hazard, context: str) -> None:
    if hazard.name.startswith("D/llama") or "transformers" in hazard.make.__code__.co_names:
        pytest.importorskip("transformers", reason="transformers is not installed")
    check(hazard, context, torch.device("cpu"))


def test_every_section_has_hazards() -> None:
    assert {name[0] for name in HAZARDS} == set(SECTIONS)
