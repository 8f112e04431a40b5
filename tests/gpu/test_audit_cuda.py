"""An audit finds on a GPU what it finds on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from graphs import audit
from tests.corpus.case import Case
from tests.corpus.collection import CASES
from tests.corpus.running import arguments


def found(case: Case, device: torch.device | str) -> set[tuple[str, int]]:
    """Kinds and lines of a case's findings."""
    file, lines = case.lines()
    step: Any = case.build(device)
    findings = audit(step, *arguments(case, 3, device)).findings  # type: ignore[arg-type]
    return {(one.kind, one.line) for one in findings if one.file == file and one.line in lines}


def test_every_case_of_the_corpus_has_the_same_findings(device: torch.device) -> None:
    differing = {}
    for case in CASES:
        there, here = found(case, device), found(case, "cpu")
        if there != here:
            differing[case.name] = {"GPU only": sorted(there - here), "CPU only": sorted(here - there)}
    assert differing == {}
