"""How launch overhead amortises: the sentence, its figures, and the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from graphs.bench.decode.amortise import Amortisation
from graphs.bench.decode.plot import draw_amortisation
from graphs.bench.harness.rows import read_results

ROOT = Path(__file__).resolve().parents[3]
ON_GPU = Amortisation(
    batches=(1, 64),
    host_us=(11_866.0, 11_439.0),
    device_us=(3_045.0, 6_477.0),
    eager_us=(11_866.0, 11_439.0),
    replay_us=(2_381.0, 5_659.0),
    capture_seconds=(1.29, 0.95),
    break_even=(136, 164),
)
ON_CPU = dataclasses.replace(ON_GPU, host_us=(1734.0, 2500.0), device_us=(), eager_us=(1734.0, 2500.0), replay_us=(942.0, 2000.0))


def test_the_sentence_names_host_device_replay_gain_and_break_even() -> None:
    assert ON_GPU.sentence() == (
        "At batch 1 the host needs 11.9 ms to submit a decode step that takes the device 3.04 ms; replayed, it takes 2.38 ms "
        "(4.98x as fast, 2.02x at batch 64), and the 1.3 s of recording are paid back after 136 calls."
    )


def test_on_a_cpu_it_is_eager_and_tape() -> None:
    assert ON_CPU.sentence() == (
        "At batch 1 a decode step takes 1.73 ms eager and 0.942 ms from the operator tape (1.84x as fast, 1.25x at batch 64), "
        "and the 1.3 s of recording are paid back after 136 calls."
    )


def test_a_recording_that_does_not_pay_is_said_not_to() -> None:
    slower = dataclasses.replace(ON_CPU, batches=(4,), eager_us=(900.0,), replay_us=(1000.0,), break_even=(None,))
    assert "At batch 4 " in slower.sentence() and "(0.90x as fast)" in slower.sentence()
    assert slower.sentence().endswith("are never paid back.")


def test_it_is_taken_from_the_decode_rows_in_order_of_batch() -> None:
    results = read_results(ROOT / "benchmarks" / "results" / "h200_bench.json")
    found = Amortisation.of(dataclasses.replace(results, rows=results.rows[::-1]))
    assert found is not None and found.batches == (1, 4, 16, 64) and found.break_even == (136, 71, 75, 164)
    assert found.sentence() == ON_GPU.sentence()
    for host, device, eager in zip(found.host_us, found.device_us, found.eager_us, strict=True):
        assert eager == max(host, device)
    assert Amortisation.of(dataclasses.replace(results, rows=())) is None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that are drawn, left open to be looked at."""
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'stepgraphs[bench]'")
    matplotlib.use("Agg")
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    return figures


@pytest.mark.parametrize(
    ("found", "lines"), [(ON_GPU, ["eager, host", "eager, device", "replay"]), (ON_CPU, ["eager", "operator tape"])]
)
def test_the_figure_has_both_panels_with_units_and_nothing_overlaps(
    found: Amortisation, lines: list[str], drawn: list[Any], tmp_path: Path
) -> None:
    machine = read_results(ROOT / "benchmarks" / "results" / "h200_bench.json").machine
    draw_amortisation(found, machine, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    steps, calls = figure.axes
    assert [text.get_text() for text in steps.get_legend().get_texts()] == lines
    assert [text.get_text() for text in calls.get_legend().get_texts()] == ["eager", "recording, then replays"]
    labels = [axis.get_label_text() for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    assert labels == ["batch size (sequences)", "time per step (ms)", "calls", "time since the first call (s)"]
    assert [text.get_text() for text in calls.texts] == ["break-even:\n136 calls"]
    said = figure.get_suptitle().replace("\n", " ").replace("\u00a0", " ")
    assert said == found.sentence()
    boxes = [panel.get_tightbbox() for panel in figure.axes] + [figure._suptitle.get_window_extent()]
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
    for panel in figure.axes:
        legend = panel.get_legend().get_window_extent()
        points = [panel.transData.transform(point) for line in panel.get_lines() for point in line.get_xydata()]
        assert not any(legend.contains(*point) for point in points)
        assert legend.width <= panel.bbox.width


def test_without_a_break_even_the_figure_says_so(drawn: list[Any], tmp_path: Path) -> None:
    machine = read_results(ROOT / "benchmarks" / "results" / "h200_bench.json").machine
    draw_amortisation(dataclasses.replace(ON_CPU, break_even=(None, None)), machine, tmp_path / "figure.png")
    assert [text.get_text() for text in drawn[0].axes[1].texts] == ["no break-even"]
