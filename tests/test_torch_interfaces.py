"""Private interfaces of torch that `graphs` stands on: this torch has each, and only the adapters name them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from graphs.compile.torch_dynamo import DYNAMO_SETTINGS, INTERFACES, private
from graphs.objects.torch_fast_paths import SAVES

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {"graphs/compile/torch_dynamo.py", "graphs/objects/torch_fast_paths.py"}
SETTINGS_OF_INDUCTOR = {"graphs/compiler_options.py"}  # below the adapter: it reads which settings there are


@pytest.mark.parametrize("name", INTERFACES)
def test_torch_has_what_compiling_stands_on(name: str) -> None:
    assert private(name) is not None


@pytest.mark.parametrize("name", DYNAMO_SETTINGS)
def test_dynamo_has_the_settings_that_are_patched(name: str) -> None:
    assert hasattr(importlib.import_module("torch._dynamo").config, name)


@pytest.mark.parametrize("name", SAVES)
def test_torch_has_what_saves_time(name: str) -> None:
    saved, for_devices = SAVES[name]
    if for_devices and not (torch.version.cuda or torch.version.hip):
        pytest.skip(f"only builds for a GPU have {name}: {saved}")
    owner, _, last = name.rpartition(".")
    found: object = torch
    for part in owner.split(".")[1:]:
        found = getattr(found, part)
    assert hasattr(found, last), f"gone: {saved}"


def test_only_the_adapters_name_dynamo_and_inductor() -> None:
    private_module = r"torch\._(?:dynamo|inductor|functorch)"
    named = re.compile(rf"(?:from|import) {private_module}|{private_module}\.\w+\(|torch\._C\._dynamo")
    files = [path for path in (ROOT / "graphs").rglob("*.py") if "bench" not in path.parts]
    found = {path.relative_to(ROOT).as_posix() for path in files if named.search(path.read_text())}
    assert found <= ADAPTERS | SETTINGS_OF_INDUCTOR
