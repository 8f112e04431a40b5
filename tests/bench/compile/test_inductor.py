from __future__ import annotations

import dataclasses

import pytest

from graphs.bench.compile import inductor
from graphs.bench.compile.inductor import BACKEND, BARE, CAPTURED, NARROW, OURS, REDUCED, SEARCHED, measure_compilers
from graphs.bench.decode.llama import WIDE, LlamaSize
from graphs.bench.harness.progress import Progress
from graphs.bench.settings import BenchSettings
from graphs.errors import ConfigError

TIMES = {BARE: [1.0, 1.0], OURS: [0.9, 0.9], CAPTURED: [1.02, 1.02], BACKEND: [1.1, 1.1], REDUCED: [1.2, 1.2]}


@pytest.mark.parametrize(("size", "met"), [(WIDE, [True, False, False, True]), (NARROW, [False, False])])
def test_bars_are_ratios_of_the_times_with_limits_by_width(size: LlamaSize, met: list[bool], settings: BenchSettings) -> None:
    bars = inductor._bars(size, TIMES, settings)
    assert [bar.met for bar in bars] == met
    assert bars[-1].measured.median == pytest.approx(1.2 / 1.1) and bars[-1].at_least
    assert bars[-1].sides[REDUCED].median == pytest.approx(1.2e6 / inductor.STEPS)


def test_a_search_of_inductors_is_compared_with_where_it_was_measured(settings: BenchSettings) -> None:
    searched = [bar for bar in inductor._bars(NARROW, {**TIMES, SEARCHED: [1.3, 1.3]}, settings) if SEARCHED in bar.sides]
    assert [bar.met for bar in searched] == [True]


def test_a_cpu_is_refused(settings: BenchSettings, progress: Progress) -> None:
    with pytest.raises(ConfigError, match="'cuda' for this experiment"):
        measure_compilers(settings, progress, (dataclasses.replace(NARROW, layers=1),))
