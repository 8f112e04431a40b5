"""What a benchmark run is told, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphs.bench.choices import DEVICES, MIN_RUNS, as_forms, as_models, as_paths, as_sizes
from graphs.environment import choice
from graphs.errors import ConfigError


@dataclass(frozen=True)
class BenchSettings:
    """One run of the experiments.

    Attributes:
        device: where they run.
        runs: measured repetitions of everything.
        quick: fewer batch sizes and shorter sequences.
        search: ``compile``: measure ``mode="max-autotune"`` too, which compiles for a minute and more.
        groups, tokens, paths: G, M and paths of the grouped projection; empty: those of the table.
        models, forms: ``generate``: which models, and in which forms; ``deepseek_v4``: which forms; empty: all of them.
    """

    device: torch.device
    runs: int = MIN_RUNS
    quick: bool = False
    search: bool = True
    groups: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()

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
        models: str = "",
        forms: str = "",
    ) -> BenchSettings:
        """Settings from command-line values; the last five are lists separated by commas.

        Raises:
            ConfigError: an unknown device, path, model or form, a GPU where there is none, fewer than `MIN_RUNS` runs, or sizes
                that are no positive integers.
        """
        sizes = (as_sizes("--groups", groups), as_sizes("--tokens", tokens))
        names = as_paths("--paths", paths), as_models("--model", models), as_forms("--forms", forms)
        choice("--device", device, DEVICES)
        if runs < MIN_RUNS:
            raise ConfigError("--runs", runs, f"an integer of at least {MIN_RUNS}")
        has_gpu = torch.cuda.is_available()
        if device == "cuda" and not has_gpu:
            raise ConfigError("--device", device, "'auto' or 'cpu' here: torch sees no GPU")
        if device == "cpu" or not has_gpu:
            return cls(torch.device("cpu"), runs, quick, search, *sizes, *names)
        return cls(torch.device("cuda", torch.cuda.current_device()), runs, quick, search, *sizes, *names)
