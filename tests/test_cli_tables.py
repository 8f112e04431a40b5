"""The tables of ``audit`` and ``parity`` in a terminal of 80 columns: no line is longer, and nothing is cut."""

from __future__ import annotations

import pytest

from graphs.auditing.finding import Finding, finding
from graphs.auditing.remedies import CLASSES
from graphs.auditing.report import Audit
from graphs.errors import Site
from graphs.parity.report import ParityReport
from graphs.parity.rows import ParityDifference, ParityRow

LONG = "/usr/lib/python3/site-packages/transformers/models/a_family_of_models/modeling_of_a_family_of_models.py"


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def held(text: str, first: str, second: str, *whole: str) -> None:
    """All lines of ``text`` fit, and between the headings ``first`` and ``second`` each of ``whole`` is there, if wrapped."""
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert "…" not in text
    heading = next(line for line in lines if first in line and second in line)
    left, right = heading.index(first), heading.index(second)
    column = "".join("".join(line[left:right].split()) for line in lines)
    for cell in whole:
        assert "".join(cell.split()) in column, cell


def long_finding(why: str = "", function: str = "", cost_us: float | None = None) -> Finding:
    site = Site(LONG, 12345, "values = self.projection(x)[positions.tolist(), : int(lengths.max())]")
    operator, seen = "aten._local_scalar_dense", "[1024, 2048, 4096]"
    return finding(
        "data-dependent-branch", operator, site, seen, CLASSES, calls=12_345, why=why, function=function, cost_us=cost_us
    )


def test_an_audit_with_every_class_at_one_line() -> None:
    one = long_finding(cost_us=123_456.7, function="__getitem__")
    other = long_finding(why="keep the value on the device, or pass what the host already knows as an argument")
    text = str(Audit("cuda:0", 123_456, 3, "host waits", (one, other)))
    held(text, "found", "class", LONG.rpartition("site-packages/")[2], one.source, one.detail, other.cure)
    held(text, "class", "passes", *CLASSES)
    held(text, "passes", "calls", *one.passes, "none")
    assert {"12345", "123,456.7"} <= set(text.split())


def test_a_parity_report_with_long_reasons() -> None:
    reasons = ("data-dependent-branch modeling_of_a_family_of_models_with_experts_and_a_long_name.py:12345", "host-sync a.py:1")
    counts = (12_345, 67_890, 123_456, 100_000, 23_456)
    row = ParityRow("autocast+inference_mode", "elements of lists and dicts", *counts, reasons, 999)
    text = str(ParityReport("mymodels.llama:decode_step", "cuda:0", (row,), None))
    held(text, "variation", "tried", row.context, row.variation, *reasons)
    assert {"12345/67890", "123456", "100000", "23456", "999"} <= set(text.split())


def test_the_first_difference_is_shown_below_it() -> None:
    row = ParityRow("no_grad", "new data", 0, 0, 64, 60, 4, (), 1)
    first = ParityDifference("no_grad", "new data", 7, "output[0]", "largest difference 0.5", file="step.py", line=3, source="x")
    text = str(ParityReport("a:b", "cpu", (row,), first))
    held(text, "variation", "tried", row.context, row.variation)
    assert "First difference: no_grad, new data, call 7: output[0]" in text and "step.py:3" in text
