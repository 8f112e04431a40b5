"""What every test has in common: no settings from the environment, one thread, a fixed seed."""

from __future__ import annotations

import gc
import importlib.util
import os
import zlib
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # the same examples on every machine: a change breaks a test, chance does not; `make fuzz` looks for new ones
    settings.register_profile("fixed", derandomize=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
gc.set_threshold(20_000, 20, 20)  # a full collection goes through all of torch and transformers
torch.set_num_threads(1)  # toy sizes; the workers of pytest-xdist share the cores


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is run."""
    parser.addoption(
        "--every-context",
        action="store_true",
        help="run each test under each of its contexts, and all that are marked one_in(n); without it on the CPU, every test "
        "runs under one, all contexts in turn, and of those that are marked one of n",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one context of each test that has several, and a share of some tests, by numbers made of names: always the same."""
    if config.getoption("--every-context"):
        return
    families: dict[Any, list[pytest.Item]] = {}
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if "context" in given and "gpu" not in item.path.parts:
            others = tuple((name, id(value)) for name, value in given.items() if name != "context")
            families.setdefault((item.path, getattr(item, "originalname", item.name), others), []).append(item)
    shares = [(item, marker.args[0]) for item in items if (marker := item.get_closest_marker("one_in")) is not None]
    left_out = {item for item, count in shares if zlib.crc32(item.nodeid.encode()) % count}
    for family in families.values():
        kept = zlib.crc32(family[0].nodeid.encode()) % len(family)
        left_out |= {item for index, item in enumerate(family) if index != kept}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    kept_items = [item for item in items if item not in left_out]
    items[:] = sorted(kept_items, key=lambda item: item.get_closest_marker("slow") is None)  # or they are waited for at the end


@pytest.fixture(autouse=True)
def _fixed_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the person who runs the tests do not reach them; a fault of this project is raised and not survived."""
    for name in [name for name in os.environ if name.startswith("GRAPHS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRAPHS_RAISE_INTERNAL", "1")
    torch.manual_seed(0)
