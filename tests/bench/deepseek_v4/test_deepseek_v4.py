"""A step of DeepSeek-V4 in its forms: checked, timed, and its kernels by kind, told in 80 columns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from graphs.bench import run_bench
from graphs.bench.choices import COMPILED_STEP_FORMS, STEP_FORMS
from graphs.bench.deepseek_v4 import measure
from graphs.bench.deepseek_v4.kinds import KINDS, by_kind, kind_of
from graphs.bench.deepseek_v4.measure import ADDED, chosen_step_forms, options_of
from graphs.bench.harness.rows import BenchRow, Results
from graphs.bench.harness.sampling import Spread
from graphs.bench.settings import BenchSettings
from graphs.compiler_options import REWRITES
from graphs.errors import ConfigError

CPU = torch.device("cpu")
SETTINGS = BenchSettings(CPU, runs=2)


@pytest.mark.slow
def test_each_form_is_checked_timed_and_counted(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_bench("deepseek_v4", SETTINGS, out)
    printed = capsys.readouterr().out
    rows = {row.mode: row for row in results.rows}
    assert list(rows) == ["eager", "recorded", "recorded+mhc"]
    assert all(row.equal_tokens == 1 and row.host_us.median > 0 and row.operations == 2 for row in rows.values())
    assert rows["eager"].recordings == 0 < rows["recorded"].recordings
    kernels = {mode: row.kernels for mode, row in rows.items()}
    assert kernels["eager"]["mhc"] == kernels["recorded"]["mhc"] == 0 < kernels["recorded+mhc"]["mhc"]
    assert sum(kernels["recorded+mhc"].values()) < 0.6 * sum(kernels["recorded"].values())
    assert [path.name for path in out.iterdir()] == ["deepseek_v4.json"] and not results.bars
    read = Results.from_json((out / "deepseek_v4.json").read_text())
    assert read == results and json.loads((out / "deepseek_v4.json").read_text())["rows"][2]["kernels"]["mhc"] > 0
    assert max(len(line) for line in printed.splitlines() if not line.startswith("Written to")) <= 80
    assert "Kernels per layer by kind" in printed and "1.00x" in printed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mhc_sums_kernel", "mhc"),
        ("expert_linear_kernel", "experts"),
        ("attend_part_kernel", "attention"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "products"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("skinny_linear_kernel", "products"),
        ("aten.mm.default", "products"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "sums"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "sums"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::CatArrayBatchedCopy", "copies"),
        ("triton_poi_fused_add_7", "pointwise"),
        ("aten.mul.Tensor", "pointwise"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_kind_is_counted_once() -> None:
    assert by_kind({"aten.mul.Tensor": 3, "aten.add.Tensor": 2, "mhc_mix_kernel": 1}) == {
        **dict.fromkeys((kind for kind, _ in KINDS), 0), "pointwise": 5, "mhc": 1,
    }  # fmt: skip


def test_forms_add_rewrites_one_after_the_other() -> None:
    added = [options_of(form)["compiler_options"] for form in ADDED]
    assert [sum(options.values()) for options in added] == [0, 2, 4, 5, 7] and set(added[-1]) == set(REWRITES)
    assert options_of("recorded") == {"compiler_options": {"hyper_connections": False}}
    assert tuple(ADDED) == COMPILED_STEP_FORMS


@pytest.mark.parametrize("form", ["inductor", "+around", "dynamic"])
def test_forms_that_cannot_be_measured_are_named(form: str) -> None:
    with pytest.raises(ConfigError, match=r"one of eager, recorded, recorded\+mhc on a cpu"):
        chosen_step_forms(dataclasses.replace(SETTINGS, forms=(form,)))
    assert chosen_step_forms(dataclasses.replace(SETTINGS, device=torch.device("cuda"))) == STEP_FORMS


def test_the_fastest_recorded_form_is_held_against_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [BenchRow("deepseek_v4", "case", 4, mode, 8, Spread(us, us, us, 3), None, Spread(1, 1, 1, 3), kernels={"sums": 600})
            for mode, us in (("eager", 2000.0), ("recorded", 9000.0), ("+mhc", 3000.0))]  # fmt: skip
    monkeypatch.setattr(measure, "describe_machine", lambda device: type("M", (), {"device": "a device"}))
    step, kernels = measure._bars(made, torch.device("cuda"))
    assert (step.measured.median, step.unit, step.met) == (3.0, "ms", True) and "+mhc" in step.name
    assert (kernels.measured.median, kernels.met) == (75.0, True)
    assert measure._bars(made, CPU) == []
