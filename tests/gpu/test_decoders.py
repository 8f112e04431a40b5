"""Unmodified decoders of transformers in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[bench]'")

from tests.models.decoders import DECODERS
from tests.test_decoders import CASES, compare, expected


@pytest.mark.parametrize(("name", "experts"), CASES, ids=[f"{name}-{experts or 'default'}" for name, experts in CASES])
def test_a_decode_step_is_recorded_and_equals_eager(name: str, experts: str | None, device: torch.device) -> None:
    expected(name, compare(DECODERS[name], experts, device))
