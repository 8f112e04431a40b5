"""``graphs bench --compare``: two results files side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from graphs.__main__ import main
from graphs.bench.harness.compare import compare, comparison_table, print_comparison
from graphs.bench.harness.progress import make_console
from graphs.bench.harness.rows import BarRow, BenchRow, Machine, Results, UnreadableResults, read_results
from graphs.bench.harness.sampling import Spread

MACHINE = Machine("a GPU", "580", "2.11", "3.6", "5.17", "3.12", "Linux", 1, "2026-01-01", "CUDA 13.0")


def row(batch: int, mode: str, host: Spread, device: Spread | None = None) -> BenchRow:
    return BenchRow("decode", "Llama", batch, mode, 1, host, device, Spread(1.0, 1.0, 1.0, 20))


def bar(name: str, median: float, where: str = "") -> BarRow:
    measured = Spread(median, median - 1, median + 1, 20)
    return BarRow(name, "at most 20us", "us", measured, 20.0, False, {"bare": measured}, "a GPU", where)


FIRST = Results(
    MACHINE,
    20,
    False,
    rows=(row(1, "eager", Spread(100.0, 90.0, 110.0, 20)), row(4, "eager", Spread(100.0, 90.0, 110.0, 20))),
    bars=(bar("over bare", 8.0), bar("near nothing", 0.5)),
)
SECOND = Results(
    MACHINE,
    20,
    False,
    rows=(
        row(1, "eager", Spread(10.0, 9.0, 11.0, 20), Spread(50.0, 45.0, 55.0, 20)),
        row(1, "graph", Spread(10.0, 9.0, 11.0, 20)),
    ),
    bars=(bar("over bare", 4.0), bar("near nothing", 0.5), bar("over bare", 4.0, "G=2 M=1")),
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(FIRST.to_json())
    second.write_text(SECOND.to_json())
    return first, second


def test_what_both_have_is_compared_by_the_longer_of_host_and_device() -> None:
    found = compare(FIRST, SECOND)
    decode, over, nothing = found.changes
    assert decode.name == "decode Llama batch=1 eager" and decode.ratio == 0.5
    assert decode.spread == (45.0 / 110.0, 55.0 / 90.0)
    assert over.ratio == 0.5 and over.spread == (3.0 / 9.0, 5.0 / 7.0)
    assert nothing.ratio == 1.0 and nothing.spread is None  # its quartiles straddle zero
    assert found.only_first == ("decode Llama batch=4 eager",)
    assert found.only_second == ("decode Llama batch=1 graph", "over bare G=2 M=1")


def test_it_is_printed_at_80_columns(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "--compare", *map(str, files)])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("Compared") :].splitlines()
    assert max(len(line.rstrip()) for line in table) <= 80 and "…" not in printed
    line = next(line for line in table if line.startswith("decode Llama batch=1 eager"))
    assert line.split()[4:] == ["100", "us", "50.0", "us", "0.500x", "0.409-0.611"]
    assert "Only in A: decode Llama batch=4 eager" in printed
    assert "Only in B: decode Llama batch=1 graph; over bare G=2 M=1" in printed


def test_nothing_in_common_is_said(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files[0].write_text(dataclasses.replace(FIRST, rows=FIRST.rows[1:], bars=()).to_json())
    print_comparison(*files, make_console())
    assert "Nothing was measured in both." in capsys.readouterr().out
    assert comparison_table(compare(FIRST, SECOND)).row_count == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({**json.loads(FIRST.to_json()), "schema": 2}), "its schema is 2, and this version reads 1"),
        ('{"rows": []}', "holds no results"),
        ("[]", "holds no results"),
        ("no json", "holds no results"),
        ('{"schema": 1, "rows": []}', "incomplete"),
        ('{"schema": 1, "machine": {}, "rows": [{}], "bars": [], "notes": []}', "incomplete"),
        (None, "holds no results"),
    ],
)
def test_a_file_of_another_kind_is_named(
    content: str | None, message: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = files[1]
    other.unlink()
    if content is not None:
        other.write_text(content)
    with pytest.raises(UnreadableResults) as raised:
        read_results(other)
    assert raised.value.path == other
    with pytest.raises(SystemExit) as done:
        main(["bench", "--compare", *map(str, files)])
    said = capsys.readouterr().err
    assert done.value.code == 2 and f"cannot compare {other}: " in said and message in said and "Traceback" not in said
