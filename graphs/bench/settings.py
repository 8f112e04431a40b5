"""What a benchmark run is told, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphs.bench.wo_a.paths import PATHS
from graphs.config import choice
from graphs.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
EXPERIMENTS = ("all", "decode", "wo_a", "overhead", "compile", "syncs")
MIN_RUNS = 20  # below this, quartiles say little


@dataclass(frozen=True)
class BenchSettings:
    """One run of the experiments.

    Attributes:
        device: where they run.
        runs: measured repetitions of everything.
        quick: fewer batch sizes and shorter sequences.
        search: ``compile``: measure ``mode="max-autotune"`` too, which compiles for a minute and more.
        groups, tokens, paths: G, M and paths of the grouped projection; empty: those of the table.
    """

    device: torch.device
    runs: int = MIN_RUNS
    quick: bool = False
    search: bool = True
    groups: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls,
        device: str = "auto",
        runs: int = MIN_RUNS,
        quick: bool = False,
        *,
        search: bool = True,
        groups: str = "",
        tokens: str = "",
        paths: str = "",
    ) -> BenchSettings:
        """Settings from command-line values; the last three are lists separated by commas.

        Raises:
            ConfigError: an unknown device or path, a GPU where there is none, fewer than `MIN_RUNS` runs, or sizes that are no
                positive integers.
        """
        sizes = (_sizes("--groups", groups), _sizes("--tokens", tokens))
        names = tuple(choice("--paths", name.strip(), PATHS) for name in paths.split(",") if name.strip())
        choice("--device", device, DEVICES)
        if runs < MIN_RUNS:
            raise ConfigError("--runs", runs, f"an integer of at least {MIN_RUNS}")
        has_gpu = torch.cuda.is_available()
        if device == "cuda" and not has_gpu:
            raise ConfigError("--device", device, "'auto' or 'cpu' here: torch sees no GPU")
        if device == "cpu" or not has_gpu:
            return cls(torch.device("cpu"), runs, quick, search, *sizes, names)
        return cls(torch.device("cuda", torch.cuda.current_device()), runs, quick, search, *sizes, names)


def _sizes(name: str, text: str) -> tuple[int, ...]:
    """Positive integers separated by commas, ascending."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(name, text, "positive integers separated by commas, for example 1,4,16")
    return tuple(sorted({int(part) for part in parts}))
