"""Every hazard on the CPU: equal to eager at every call, every eager call named, replayed where that is wanted."""

from __future__ import annotations

import pytest
import torch

from tests.hazards.case import HAZARDS, Hazard
from tests.hazards.collection import SECTIONS
from tests.hazards.expected import FAILING
from tests.hazards.running import check


def _parameters() -> list[object]:
    made = []
    for hazard in HAZARDS.values():
        for context in hazard.contexts:
            reason = FAILING.get(hazard.name)
            marks = [pytest.mark.xfail(strict=False, reason=reason)] if reason else []
            if not hazard.cuda_only:
                made.append(pytest.param(hazard, context, id=f"{hazard.name}-{context}", marks=marks))
    return made


@pytest.mark.parametrize(("hazard", "context"), _parameters())
def test_a_hazard_equals_eager_at_every_call_and_names_each_eager_call(hazard: Hazard, context: str) -> None:
    if hazard.name.startswith("D/llama") or "transformers" in hazard.make.__code__.co_names:
        pytest.importorskip("transformers", reason="transformers is not installed")
    check(hazard, context, torch.device("cpu"))


def test_every_section_has_hazards_and_the_list_of_failures_names_some() -> None:
    assert {name[0] for name in HAZARDS} == set(SECTIONS)
    assert set(FAILING) <= set(HAZARDS)
