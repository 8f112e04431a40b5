"""The first way to write the decode step of DeepSeek-V4, captured: 200 steps of fresh and running sequences."""

from __future__ import annotations

import copy
import warnings

import torch

import graphs
from graphs.dispatch.call_log import NotReplayed
from tests.models.deepseek_v4_skeleton import DeepseekV4Skeleton, Sizes, schedule
from tests.parity import assert_same

SEQUENCES, STEPS = 3, 200


def skeleton(device: torch.device | str = "cpu") -> DeepseekV4Skeleton:
    torch.manual_seed(0)
    return DeepseekV4Skeleton(Sizes()).eval().to(device)


def capture(model: DeepseekV4Skeleton) -> graphs.CapturedModule[..., tuple[torch.Tensor, ...]]:
    return graphs.capture(model)


def compare(device: torch.device | str) -> graphs.CaptureReport:
    """Run the schedule eagerly and captured; logits of each step and the state at the end must be the same."""
    reference = skeleton(device)
    step = capture(copy.deepcopy(reference))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        for index, call in enumerate(schedule(Sizes(), SEQUENCES, STEPS)):
            given = [tensor.to(device) for tensor in call]
            assert_same(reference(*given), step(*given), f"logits of step {index}")
    assert_same(dict(reference.named_buffers()), dict(step.named_buffers()), "state")
    return step.report()


def check_report(report: graphs.CaptureReport) -> None:
    """Eagerly the step goes 110 ways; as both sides of its branches are recorded, one recording serves every call."""
    assert (report.recordings, report.replays, report.eager_calls) == (1, STEPS, 0), str(report)
    assert report.refusals == (), str(report)


def test_the_schedule_mixes_fresh_and_running_sequences() -> None:
    positions = torch.stack([call[1] for call in schedule(Sizes(), SEQUENCES, STEPS)])
    slots = torch.stack([call[3] for call in schedule(Sizes(), SEQUENCES, STEPS)])
    fresh = (positions == 0).sum(1)
    assert int(((fresh > 0) & (fresh < SEQUENCES)).sum()) >= 10, "some start while others run"
    assert positions.max() > 40 and len(set(slots.flatten().tolist())) == Sizes().slots
    assert all(len(set(row)) == SEQUENCES for row in slots.tolist()), "no two sequences share a slot"


def test_the_loop_over_sequences_equals_eager_when_captured() -> None:
    report = compare("cpu")
    check_report(report)
