"""Ranges and events of a step on a device: a replay is one launch inside its range."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
]


@pytest.fixture
def step() -> graphs.CapturedModule[..., torch.Tensor]:
    return graphs.capture(nn.Linear(64, 64, device="cuda"), name="decode")


def test_a_launch_lies_inside_the_range_of_its_replay(step: graphs.CapturedModule[..., torch.Tensor]) -> None:
    x = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        plain = step(x)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            assert torch.equal(step(x), plain)
            torch.cuda.synchronize()
    events = list(trace.events())
    (replay,) = [
        event for event in events if event.name == "graphs::replay decode input[4, 64]" and event.device_type.name == "CPU"
    ]
    (launch,) = [event for event in events if "GraphLaunch" in event.name]
    assert replay.time_range.start <= launch.time_range.start <= launch.time_range.end <= replay.time_range.end


def test_ranges_of_nvtx_change_nothing() -> None:
    model, told = nn.Linear(64, 64, device="cuda"), list[str]()
    step = graphs.capture(model, ranges=True)
    with torch.no_grad(), graphs.on_event(lambda event: told.append(event.kind)):
        for _ in range(3):
            x = torch.randn(4, 64, device="cuda")
            torch.testing.assert_close(step(x), model(x))
    assert told == ["recorded", "replayed", "replayed", "replayed"] and step.report().replays == 3
