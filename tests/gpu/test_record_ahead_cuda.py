"""Sizes recorded ahead on a device: one pool, what they take, and a budget of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.captured_module import CapturedModule
from graphs.errors import ConfigError

if not torch.cuda.is_available():
    pytest.skip("no CUDA or HIP device on this machine", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())
SIZES = (1, 8, 64)


def captured(**settings: object) -> CapturedModule[nn.Module]:
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)]
    return graphs.capture(nn.Sequential(*layers).to(DEVICE), buckets=SIZES, batch_dims={"input": 0}, **settings)  # type: ignore[arg-type]


@torch.no_grad()
def test_sizes_share_a_pool_and_are_replayed() -> None:
    step = captured()
    found = step.record((torch.randn(1, 1024, device=DEVICE),), progress=False)
    assert [size.size for size in found.sizes] == [64, 8, 1] and all(size.recorded and size.replay_us for size in found.sizes)
    assert found.device == str(DEVICE) and found.memory_budget > found.bytes
    largest, *smaller = (key.pool_bytes for key in step.report().keys)  # `found.bytes` sees what other processes take meanwhile
    assert sum(smaller) <= largest, "the smaller sizes take the memory of the largest"
    for rows in (1, 5, 64):
        x = torch.randn(rows, 1024, device=DEVICE)
        torch.testing.assert_close(step(x), step._graphs_model(x))
    assert step.report().recordings == 3 and step.report().replays == 3


@torch.no_grad()
def test_a_budget_below_the_largest_refuses_it_and_the_device_can_be_used_on() -> None:
    step, x = captured(), torch.randn(64, 1024, device=DEVICE)
    with pytest.raises(ConfigError, match="memory_budget"):
        step.record((x,), memory_budget=x.nbytes // 2, progress=False)
    assert step.report().recordings == 0
    assert all(size.recorded for size in step.record((x,), memory_budget="4GiB", progress=False).sizes)


@torch.no_grad()
def test_a_cache_on_the_host_is_refused_before_anything_runs() -> None:
    class Cache:
        def __init__(self) -> None:
            self.rows = torch.zeros(64, 1024)

    cache = Cache()
    step = graphs.capture(lambda x, cache: x * 2, batch_dims={"x": 0})
    with pytest.raises(graphs.Refusal, match=r"mixed-devices.*cache\.rows is on cpu"):
        step.record((torch.randn(1, 1024, device=DEVICE), cache), sizes=[2], progress=False)
