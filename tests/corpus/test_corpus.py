"""Every corpus case on the CPU: outputs and final state equal eager, replays wait for nothing, refusals name the line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.corpus.case import Case
from tests.corpus.collection import CASES
from tests.corpus.running import check, outcomes, unexecuted_lines


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_equals_eager_and_is_recorded_or_refused_by_name(case: Case, context: Any) -> None:
    check(case, "cpu", context, again=context is torch.no_grad)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_its_data_meets_every_outcome(case: Case) -> None:
    assert unexecuted_lines(case) == [], "both sides of every branch must run"
    assert case.steady or len(set(outcomes(case))) > 1, "nothing that the host sees changes between steps"


def test_names_are_unique_and_there_are_enough() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
