from __future__ import annotations

import pytest
import torch

from graphs.bench.harness.sampling import Samples, Spread, Variant, host_microseconds, ratios, time_variants, wall_variants

CPU = torch.device("cpu")


def test_spread_holds_median_quartiles_and_count() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([4.0, 2.0], scale=0.5) == Spread(1.5, 1.25, 1.75, 2)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize("measure", [time_variants, wall_variants])
def test_variants_take_turns_and_the_warm_up_is_not_reported(measure) -> None:
    order: list[str] = []
    ticks: list[None] = []
    variants = {name: Variant(lambda name=name: order.append(name), lambda name=name: order.append(f"-{name}")) for name in "ab"}
    found = measure(variants, CPU, runs=2, warm_up=1, tick=lambda: ticks.append(None))
    assert order == ["-a", "a", "-b", "b"] * 3
    assert len(ticks) == 6
    lengths = [len(samples.host_us) if isinstance(samples, Samples) else len(samples) for samples in found.values()]
    assert lengths == [2, 2]


def test_a_call_takes_the_longer_of_host_and_device_time() -> None:
    assert Samples([3.0, 5.0], [4.0, 2.0]).call_us == [4.0, 5.0]
    assert Samples([3.0, 5.0], []).call_us == [3.0, 5.0]


def test_ratios_pair_runs() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_host_time_of_calls_in_a_row() -> None:
    calls: list[int] = []
    assert len(host_microseconds(lambda: calls.append(1), CPU, 5)) == len(calls) == 5
