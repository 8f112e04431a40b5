from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[bench]'")

from graphs.bench.decode.llama import LlamaSize
from graphs.bench.harness.progress import Progress, make_console
from graphs.bench.settings import BenchSettings

TINY = LlamaSize("tiny Llama", 1, 32, 64, 2, 1, 256, torch.float32, cache_len=24, prompt=4)


@pytest.fixture
def tiny() -> LlamaSize:
    return TINY


@pytest.fixture
def settings() -> BenchSettings:
    return BenchSettings(torch.device("cpu"), runs=2, quick=True)


@pytest.fixture
def progress() -> Progress:
    return Progress(make_console(quiet=True))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results"
