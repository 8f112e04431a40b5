"""Whole models in CUDA graphs: decoders of transformers, and the first way to write the decode step of DeepSeek-V4."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_deepseek_v4_skeleton import REPLAYED
from tests.models.test_deepseek_v4_skeleton import compare as compare_skeleton

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[bench]'")

from tests.models.decoders import DECODERS, TOKENS
from tests.test_decoders import CASES, compare


@pytest.mark.parametrize(("name", "experts"), CASES, ids=[f"{name}-{experts or 'default'}" for name, experts in CASES])
def test_a_decode_step_is_recorded_and_equals_eager(name: str, experts: str | None, device: torch.device) -> None:
    report = compare(DECODERS[name], experts, device)
    assert report.refusals == (), report
    assert report.replays >= TOKENS - DECODERS[name].eager_calls, report


def test_the_loop_over_sequences_equals_eager_when_captured(device: torch.device) -> None:
    report = compare_skeleton(device)
    assert report.refusals == (), report
    assert report.replays >= REPLAYED, report
