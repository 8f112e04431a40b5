from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from graphs.bench import run_bench
from graphs.bench.harness.progress import Progress, make_console
from graphs.bench.harness.rows import WrongResult
from graphs.bench.settings import BenchSettings
from graphs.bench.syncs import measure as syncs
from graphs.bench.syncs.measure import Constants, measure_syncs, predicted_factor, prepare
from graphs.bench.syncs.patterns import PATTERNS, TOY_SYNCS, Pattern, RingAttention

CPU = torch.device("cpu")


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.written.__name__)
def test_each_pattern_is_recorded_once_and_equals_the_original(pattern: Pattern, progress: Progress) -> None:
    steps = prepare(pattern, TOY_SYNCS, CPU, "none", progress)
    assert steps.written.report().replays == steps.by_hand.report().replays == syncs.CALLS


def test_every_pattern_makes_the_host_wait_and_no_twin_does() -> None:
    from graphs.observation.eager_trace import trace_eager

    generator = torch.Generator().manual_seed(0)
    for pattern in PATTERNS:
        arguments = pattern.arguments(TOY_SYNCS, generator, 0)
        for build, waits in ((pattern.written, True), (pattern.by_hand, False)):
            with torch.no_grad():
                _, trace = trace_eager(functools.partial(build(TOY_SYNCS), *arguments), arguments)
            assert bool(trace.findings) == waits, (pattern.name, trace.findings)


class Shifted(RingAttention):
    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return super().forward(*arguments) + 1


def test_a_version_that_computes_something_else_is_an_error(progress: Progress) -> None:
    wrong = Pattern("attention", RingAttention, Shifted, PATTERNS[0].arguments)
    with pytest.raises(WrongResult, match="attention, by hand, differs from the original"):
        prepare(wrong, TOY_SYNCS, CPU, "none", progress)


class Branching(RingAttention):
    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        made = super().forward(*arguments)
        return made + torch.rand(()) * 0 if int(arguments[-1]) % 2 else made  # random numbers: not both sides


def test_a_version_that_needs_several_recordings_is_an_error(progress: Progress) -> None:
    several = Pattern("attention", Branching, RingAttention, PATTERNS[0].arguments)
    with pytest.raises(WrongResult, match="was not recorded once and for all"):
        prepare(several, TOY_SYNCS, CPU, "none", progress)


def test_the_predicted_factor_is_launches_and_round_trips_over_one_call() -> None:
    constants = Constants(5.0, 25.0, 15.0)
    assert predicted_factor(100.0, 10, 3, constants) == (100 + 4 * 25) / 140  # the device is the longer
    assert predicted_factor(100.0, 100, 0, constants) == (500 + 25) / 140  # issuing is


def test_on_a_cpu_the_tapes_are_compared(settings: BenchSettings, out: Path) -> None:
    bars = measure_syncs(settings, Progress(make_console(quiet=True)))
    assert len(bars) == len(PATTERNS) and all(set(bar.sides) == {"rewritten", "by hand"} for bar in bars)
    assert all(bar.limit == 1.15 and not bar.at_least and "tape" in bar.name for bar in bars)


def test_the_experiment_writes_its_own_file(settings: BenchSettings, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syncs, "PATTERNS", PATTERNS[-1:])
    run_bench("syncs", settings, out, make_console(quiet=True))
    (bar,) = json.loads((out / "syncs.json").read_text())["bars"]
    assert "top-k above a threshold" in bar["name"] and [path.name for path in out.iterdir()] == ["syncs.json"]
