"""What every test has in common: no settings from the environment, one thread, a fixed seed."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # the same examples on every machine: a change breaks a test, chance does not; `make fuzz` looks for new ones
    settings.register_profile("fixed", derandomize=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
torch.set_num_threads(1)  # toy sizes; the workers of pytest-xdist share the cores


@pytest.fixture(autouse=True)
def _fixed_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the person who runs the tests do not reach them; a fault of this project is raised and not survived."""
    for name in [name for name in os.environ if name.startswith("GRAPHS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRAPHS_RAISE_INTERNAL", "1")
    torch.manual_seed(0)
