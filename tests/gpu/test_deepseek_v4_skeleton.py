"""The first way to write the decode step of DeepSeek-V4, in CUDA graphs."""

from __future__ import annotations

import torch

from tests.models.test_deepseek_v4_skeleton import check_report, compare


def test_the_loop_over_sequences_equals_eager_when_captured(device: torch.device) -> None:
    check_report(compare(device))
