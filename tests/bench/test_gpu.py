"""The parts of the benchmarks that exist on a GPU only, at sizes of a test."""

from __future__ import annotations

import pytest
import torch

import graphs
from graphs.bench.compile.compiled import host_bar, wall_bar
from graphs.bench.compile.inductor import BACKEND, CAPTURED, REDUCED, measure_compilers
from graphs.bench.decode.bare import bare_step
from graphs.bench.decode.llama import Decoding, LlamaSize, build_llama
from graphs.bench.decode.measure import compare_tokens
from graphs.bench.harness.progress import Progress
from graphs.bench.overhead import call_bar, device_bar, small_arguments, small_step
from graphs.bench.settings import BenchSettings
from graphs.observation.launches import count_launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no CUDA or HIP device"),
]
SIZE = LlamaSize("small Llama", 2, 256, 512, 4, 2, 512, torch.bfloat16, cache_len=64, prompt=8)


@pytest.fixture
def on_gpu() -> BenchSettings:
    return BenchSettings(torch.device("cuda", torch.cuda.current_device()), runs=3, quick=True, search=False)


def test_call_bar_measures_both_sides(on_gpu: BenchSettings, progress: Progress) -> None:
    bar = call_bar(on_gpu, progress)
    assert set(bar.sides) == {"captured", "bare"} and bar.measured.runs >= 200


def test_device_bar_measures_the_same_work(on_gpu: BenchSettings, progress: Progress) -> None:
    model = build_llama(SIZE, on_gpu.device)
    bar = device_bar(model, Decoding(model, SIZE, 2, on_gpu.device), on_gpu, progress)
    assert bar.measured.runs == on_gpu.runs and bar.sides["bare"].median > 0


def test_a_bare_step_leaves_the_cache_as_it_was(on_gpu: BenchSettings) -> None:
    model = build_llama(SIZE, on_gpu.device)
    decoding = Decoding(model, SIZE, 2, on_gpu.device)
    expected = decoding.first_step(model)
    bare_step(model, decoding)
    assert torch.equal(decoding.first_step(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [wall_bar, host_bar])
def test_bars_with_a_compiler(measure, on_gpu: BenchSettings, progress: Progress) -> None:
    torch.compiler.reset()
    model = build_llama(SIZE, on_gpu.device)
    bar = measure(model, Decoding(model, SIZE, 2, on_gpu.device), on_gpu, progress)
    assert bar.measured.runs == on_gpu.runs


@pytest.mark.slow
def test_bars_of_the_compiler_integration(on_gpu: BenchSettings, progress: Progress) -> None:
    captured, backend = measure_compilers(on_gpu, progress, (SIZE,))
    assert set(captured.sides) == {CAPTURED, REDUCED} and set(backend.sides) == {REDUCED, BACKEND}
    assert captured.measured.runs == on_gpu.runs


def test_tokens_are_equal_on_the_device(on_gpu: BenchSettings) -> None:
    model = build_llama(SIZE, on_gpu.device)
    compare_tokens(Decoding(model, SIZE, 3, on_gpu.device), graphs.capture(model), 8)


def test_a_replay_is_one_launch_and_eager_is_one_per_kernel(on_gpu: BenchSettings) -> None:
    arguments = small_arguments(on_gpu.device)
    step = graphs.capture(small_step)
    step(*arguments)
    assert count_launches(lambda: step(*arguments), on_gpu.device) == 1
    assert count_launches(lambda: small_step(*arguments), on_gpu.device) == 5
