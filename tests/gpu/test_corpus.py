"""Every corpus case in CUDA graphs: outputs and final state equal eager, and the driver sees no replay wait."""

from __future__ import annotations

import pytest
import torch

from tests.corpus.case import Case
from tests.corpus.collection import CASES
from tests.corpus.running import check, watching


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_equals_eager_and_is_recorded_or_refused_by_name(case: Case, device: torch.device) -> None:
    check(case, device)


def test_the_driver_reports_waiting(device: torch.device) -> None:
    x = torch.ones(4, device=device)
    with watching() as seen:
        x.sum() + 1
    assert seen.waits == []
    with watching() as seen:
        x.sum().item()
    assert any("synchronizing" in wait for wait in seen.waits), seen.waits
