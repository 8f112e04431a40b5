"""The first way to write the decode step of DeepSeek-V4, in CUDA graphs."""

from __future__ import annotations

import torch

from tests.models.test_deepseek_v4_skeleton import REPLAYED, compare


def test_the_loop_over_sequences_equals_eager_when_captured(device: torch.device) -> None:
    report = compare(device)
    # it goes 110 ways, of which the first ones are recorded: the rest of the calls runs eagerly, and says why
    assert {refusal.reason for refusal in report.refusals} <= {"many-ways"}, str(report)
    assert report.replays >= REPLAYED, str(report)
