"""What a benchmark run is told, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphs.config import choice
from graphs.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
EXPERIMENTS = ("all", "decode", "wo_a", "overhead", "compile")
MIN_RUNS = 20  # below this, quartiles say little


@dataclass(frozen=True)
class BenchSettings:
    """One run of the experiments.

    Attributes:
        device: where they run.
        runs: measured repetitions of everything.
        quick: fewer batch sizes and shorter sequences.
    """

    device: torch.device
    runs: int = MIN_RUNS
    quick: bool = False

    @classmethod
    def resolve(cls, device: str = "auto", runs: int = MIN_RUNS, quick: bool = False) -> BenchSettings:
        """Settings from command-line values.

        Raises:
            ConfigError: an unknown device, a GPU where there is none, or fewer than `MIN_RUNS` runs.
        """
        choice("--device", device, DEVICES)
        if runs < MIN_RUNS:
            raise ConfigError("--runs", runs, f"an integer of at least {MIN_RUNS}")
        has_gpu = torch.cuda.is_available()
        if device == "cuda" and not has_gpu:
            raise ConfigError("--device", device, "'auto' or 'cpu' here: torch sees no GPU")
        if device == "cpu" or not has_gpu:
            return cls(torch.device("cpu"), runs, quick)
        return cls(torch.device("cuda", torch.cuda.current_device()), runs, quick)
