"""Every corpus case on the CPU: outputs and final state equal eager, replays wait for nothing, refusals name the line."""

from __future__ import annotations

import pytest
import torch

from tests.corpus.case import Case
from tests.corpus.collection import CASES
from tests.corpus.running import check, outcomes, unexecuted_lines


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_equals_eager_and_is_recorded_or_refused_by_name(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)  # every kind is there; all of them take as long again
def test_a_case_equals_eager_under_inference_mode(case: Case) -> None:
    check(case, "cpu", torch.inference_mode, again=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_its_data_meets_every_outcome(case: Case) -> None:
    assert unexecuted_lines(case) == [], "both sides of every branch must run"
    assert case.steady or len(set(outcomes(case))) > 1, "nothing that the host sees changes between steps"


def test_names_are_unique_and_there_are_enough() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
