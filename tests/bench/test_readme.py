"""The README is run and compared with the code, so that it stays true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from graphs.errors import Refusal

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_example_runs_and_its_report_reads_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    program, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    with torch.no_grad():
        exec(program, {})
    printed = capsys.readouterr().out
    shown = re.search(r"```\n(graphs: .*?)```", README, flags=re.DOTALL)
    assert shown is not None
    numbers = re.compile(r"[\d.]+ (s|us|MiB|calls)\b|never pays|pays after")
    assert numbers.sub("_", printed).split() == numbers.sub("_", shown[1]).split()


def test_every_refusal_reason_is_in_the_table() -> None:
    def reasons(kind: type[Refusal]) -> set[str]:
        return {kind.reason}.union(*map(reasons, kind.__subclasses__())) - {"refused"}

    assert reasons(Refusal) <= set(re.findall(r"^\| `([a-z-]+)` \|", README, flags=re.MULTILINE))
