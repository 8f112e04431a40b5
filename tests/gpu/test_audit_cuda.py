"""An audit finds on a GPU what it finds on a CPU, but for what depends on where tensors are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphs import audit
from tests.corpus.case import Case
from tests.corpus.collection import CASES
from tests.corpus.running import arguments

OF_ONE_DEVICE = {
    "ALoopOverExpertsThatWereHit": "one_hot looks at the largest class on a CPU only",
    "a_host_copy_scales": "mixes devices",
    "random_numbers_decide": "the generators of the two draw other numbers, and so take other sides",
    "a_host_scalar_in_a_device_operator": "mixes devices",
}


def found(case: Case, device: torch.device | str) -> set[tuple[str, int]]:
    """Kinds and lines of a case's findings."""
    file, lines = case.lines()
    step: Any = case.build(device)
    findings = audit(step, *arguments(case, 3, device)).findings  # type: ignore[arg-type]
    return {(one.kind, one.line) for one in findings if one.file == file and one.line in lines}


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in OF_ONE_DEVICE], ids=lambda case: case.name)
def test_a_case_has_the_same_findings_on_both(case: Case, device: torch.device) -> None:
    assert found(case, device) == found(case, "cpu")
