from __future__ import annotations

import pytest
import torch

from graphs.bench.compile.compiled import _compile
from graphs.bench.decode.bare import OTHER_KERNELS, same_output
from graphs.bench.decode.llama import Decoding, LlamaSize, build_llama
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import WrongResult
from graphs.bench.overhead import measure_bars, small_arguments, small_step, tape_bar
from graphs.bench.settings import BenchSettings

CPU = torch.device("cpu")


def test_tape_bar_compares_two_sides(tiny: LlamaSize, settings: BenchSettings, progress: Progress) -> None:
    bar = tape_bar(settings, progress, tiny)
    assert set(bar.sides) == {"eager", "tape"}
    assert bar.measured.runs == settings.runs
    assert bar.at_least and bar.limit == 1.0 and "tiny Llama" in bar.name


def test_without_a_gpu_only_the_tape_is_measured(
    tiny: LlamaSize, settings: BenchSettings, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphs.bench.overhead.tape_bar", lambda settings, progress: "tape")
    assert measure_bars(settings, progress) == ["tape"]


def test_small_step_takes_four_tensors() -> None:
    arguments = small_arguments(CPU)
    assert len({argument.data_ptr() for argument in arguments}) == 4
    assert small_step(*arguments).shape == arguments[0].shape


def test_outputs_are_compared_by_their_largest_value() -> None:
    expected = torch.tensor([0.0, 100.0])
    same_output(expected + 0.009, expected, "x")
    with pytest.raises(WrongResult, match=r"x differs from its reference by 0\.05"):
        same_output(expected + 0.05, expected, "x")
    same_output(expected + 0.05, expected, "x", OTHER_KERNELS)
    with pytest.raises(WrongResult):
        same_output(torch.full((2,), float("nan")), expected, "x")


def test_a_compiled_model_that_computes_something_else_is_an_error(tiny: LlamaSize, progress: Progress) -> None:
    model = build_llama(tiny, CPU)
    other = build_llama(tiny, CPU)
    other.lm_head.weight.data.neg_()
    with pytest.raises(WrongResult, match="a stand-in differs"):
        _compile(other, model, Decoding(model, tiny, 1, CPU), progress, "a stand-in")
