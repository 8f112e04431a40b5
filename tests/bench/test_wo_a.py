from __future__ import annotations

import pytest
import torch

import graphs
from graphs.bench import wo_a
from graphs.bench.progress import Progress
from graphs.bench.rows import WrongResult
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a import (
    PATHS,
    ProjectionSize,
    ProjectionStack,
    activations,
    compare_with_float64,
    make_weights,
    measure_wo_a,
)

TINY = ProjectionSize("tiny", 2, 2, 128, 128, (1, 3))
CPU = torch.device("cpu")


def test_every_path_at_every_number_of_tokens(settings: BenchSettings, progress: Progress) -> None:
    cases = measure_wo_a(settings, progress, TINY)
    assert [(case.rows[0].case, case.rows[0].rows) for case in cases] == [(path, m) for path in PATHS for m in TINY.tokens]
    for case in cases:
        eager, graph = case.rows
        assert (eager.mode, graph.mode, eager.operations) == ("eager", "graph", TINY.layers)
        assert eager.error is not None and eager.error == graph.error < 0.05
        assert graph.capture_seconds > 0


def test_a_wrong_projection_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_weights(TINY, CPU)
    stack = ProjectionStack(loaded, "einsum")
    stack.projections[0].weight.mul_(1.5)
    with torch.no_grad(), pytest.raises(WrongResult, match=r"path einsum, M=3: relative error 0\.5"):
        compare_with_float64(stack, graphs.capture(stack), loaded, activations(3, TINY, CPU), "einsum")


def test_quick_runs_measure_fewer_sizes_and_the_cpu_smaller_ones() -> None:
    full = wo_a.projection_size_for(BenchSettings(CPU))
    quick = wo_a.projection_size_for(BenchSettings(CPU, quick=True))
    assert full == wo_a.SMALL and "reduced" in full.describe()
    assert quick.tokens == full.tokens[:2]
    assert (wo_a.V4.groups, wo_a.V4.k, wo_a.V4.n, wo_a.V4.tokens) == (2, 4096, 1024, (1, 4, 16, 64, 256))
