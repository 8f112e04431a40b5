"""Private interfaces of torch that `graphs` stands on: this torch has each, and only the adapters name them."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from graphs.compile.torch_dynamo import DYNAMO_SETTINGS, INTERFACES, private
from graphs.objects.torch_fast_paths import SAVES

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {"graphs/compile/torch_dynamo.py", "graphs/objects/torch_fast_paths.py"}
SETTINGS_OF_INDUCTOR = {"graphs/compiler_options.py"}  # below the adapter: it reads which settings there are
OUTSIDE = {
    "torch._C": 4,
    "torch._C.DisableTorchFunction": 2,
    "torch._C.DisableTorchFunctionSubclass": 1,
    "torch._C.DispatchKey": 4,
    "torch._C.DispatchKeySet": 1,
    "torch._C.TensorBase": 3,
    "torch._C._AutoDispatchBelowAutograd": 2,
    "torch._C._CUDAGraph": 1,
    "torch._C._DisableAutocast": 2,
    "torch._C._VariableFunctions": 1,
    "torch._C._cuda_beginAllocateCurrentThreadToPool": 1,
    "torch._C._cuda_endAllocateToPool": 1,
    "torch._C._cuda_getCurrentRawStream": 1,
    "torch._C._cuda_getDevice": 1,
    "torch._C._cuda_releasePool": 1,
    "torch._C._dispatch_has_kernel": 1,
    "torch._C._dispatch_has_kernel_for_dispatch_key": 2,
    "torch._C._dispatch_keys": 2,
    "torch._C._dispatch_tls_is_dispatch_key_excluded": 1,
    "torch._C._dispatch_tls_is_dispatch_key_included": 1,
    "torch._C._dispatch_tls_set_dispatch_key_excluded": 1,
    "torch._C._set_grad_enabled": 1,
    "torch._assert": 1,
    "torch._conj": 3,
    "torch._dynamo.config.patch": 1,
    "torch._foreach_copy_": 1,
    "torch._inductor.config": 1,
    "torch._library.custom_ops.CustomOpDef": 2,
    "torch._library.custom_ops.OPDEFS": 1,
    "torch._neg_view": 3,
    "torch._subclasses.fake_tensor.DataDependentOutputException": 1,
    "torch._subclasses.fake_tensor.DynamicOutputShapeException": 1,
    "torch._subclasses.fake_tensor.FakeTensor": 3,
    "torch._subclasses.fake_tensor.FakeTensorMode": 4,
    "torch._subclasses.fake_tensor.unset_fake_temporarily": 2,
    "torch.cuda._sleep": 1,
    "torch.overrides._get_current_function_mode": 2,
    "torch.overrides._get_current_function_mode_stack": 1,
    "torch.overrides._pop_mode": 1,
    "torch.overrides._pop_mode_temporarily": 1,
    "torch.overrides._push_mode": 1,
    "torch.utils._device.DeviceContext": 1,
    "torch.utils._python_dispatch._disable_current_modes": 6,
    "torch.utils._python_dispatch._get_current_dispatch_mode": 1,
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": 1,
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": 1,
    "torch.utils._sympy.functions": 3,
    "torch.utils._sympy.functions.Min": 1,
    "torch.utils._sympy.value_ranges.ValueRanges": 1,
    "torch.utils._sympy.value_ranges.bound_sympy": 1,
}
"""How many files beside the adapters name each private interface of torch. Numbers only get smaller."""
COMMON = ("torch._ops.", "torch.utils._pytree", "torch.utils._python_dispatch.TorchDispatchMode")
"""The classes of operators, trees of arguments and the class of modes, which whatever extends torch stands on: not counted."""
OUTSIDE_OF_ANY_BUILD = sorted(name for name in OUTSIDE if not name.startswith(("torch._C._cuda", "torch._C._CUDA")))
"""Those that a build without a GPU has too."""


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


def private_names(path: Path) -> set[str]:
    """Private names of torch that a file imports, or reads as attributes of ``torch``: as much of each as says what it is."""
    tree = ast.parse(path.read_text())
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            named += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and node not in inner:
            named.append(ast.unparse(node))
    found = (re.match(r"torch\.(?!ops\.)(?:_C(\.\w+)?|([a-z]\w*\.)*_(?!_)\w+(\.\w+){0,2})", name) for name in named)
    return {match[0] for match in found if match is not None}


def test_what_is_named_outside_of_the_adapters_gets_less() -> None:
    adapters = {*ADAPTERS, "passes/tracing/torch_symbols.py"}
    files = [path for package in ("graphs", "passes") for path in (ROOT / package).rglob("*.py")]
    outside = [path for path in files if path.relative_to(ROOT).as_posix() not in adapters]
    found = Counter(name for path in outside for name in private_names(path) if not name.startswith(COMMON))
    assert dict(found) == OUTSIDE


@pytest.mark.parametrize("name", OUTSIDE_OF_ANY_BUILD)
def test_torch_has_what_is_named_outside_of_the_adapters(name: str) -> None:
    owner, _, last = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        found: object = torch
        for part in owner.split(".")[1:]:
            found = getattr(found, part)
        assert hasattr(found, last)
