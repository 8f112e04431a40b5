"""Private interfaces of torch that tracing stands on: this torch has each of them, and nothing else in the folder names one."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

TRACING = Path(__file__).resolve().parents[1] / "passes" / "tracing"
ADAPTER = TRACING / "torch_symbols.py"  # read as text: a name that is missing must not keep the others from being told
PRIVATE = (
    "torch._dispatch",
    "torch._subclasses",
    "torch.fx.experimental",
    "torch.utils._sympy",
    "torch.utils._python_dispatch",
    "torch._inductor",
)


def imported(path: Path) -> list[str]:
    """What a file imports of torch's private modules, as dotted names."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return [f"{node.module}.{alias.name}" for node in found if str(node.module).startswith(PRIVATE) for alias in node.names]


def methods() -> list[str]:
    """What the adapter says is used of classes and modules, as dotted names."""
    tree = ast.parse(ADAPTER.read_text())
    tables = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "METHODS"]
    namespace: dict[str, Any] = eval(compile(ast.Expression(tables[0]), str(ADAPTER), "eval"), {})
    return [f"{owner}.{name}" for owner, names in namespace.items() for name in names]


def missing(dotted: str) -> str:
    """The first part of a dotted name that this torch does not have, or an empty string."""
    owner, found = None, ""
    for part in dotted.split("."):
        found = f"{found}.{part}".removeprefix(".")
        nested = getattr(owner, part, None) if owner is not None else None
        if nested is None:
            try:
                nested = importlib.import_module(found)
            except ImportError:
                return found
        owner = nested
    return ""


@pytest.mark.parametrize("name", [*imported(ADAPTER), *methods()])
def test_torch_has_what_tracing_stands_on(name: str) -> None:
    if name.endswith(".FakeTensorMode.shape_env"):  # of its instances
        assert "shape_env" in inspect.signature(importlib.import_module(name.rsplit(".", 2)[0]).FakeTensorMode).parameters
    else:
        assert missing(name) == ""


@pytest.mark.parametrize("option", ["tracing_mode", "_allow_non_fake_inputs", "_error_on_data_dependent_ops"])
def test_the_tracer_of_torch_has_the_options_that_are_given(option: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    assert option in inspect.signature(make_fx).parameters


def test_a_question_of_torch_names_its_way_out() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    assert "fallback_value" in inspect.signature(ShapeEnv.evaluate_expr).parameters


def test_what_another_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.fx.experimental.proxy_tensor, "get_proxy_slot")
    monkeypatch.delattr(torch.fx.experimental.symbolic_shapes.ShapeEnv, "_maybe_evaluate_static")
    found = [missing(name) for name in [*imported(ADAPTER), *methods()] if not name.endswith("FakeTensorMode.shape_env")]
    assert [name for name in found if name] == [
        "torch.fx.experimental.proxy_tensor.get_proxy_slot",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv._maybe_evaluate_static",
    ]


@pytest.mark.parametrize("path", sorted(TRACING.glob("*.py")), ids=lambda path: path.stem)
def test_only_the_adapter_names_private_modules(path: Path) -> None:
    assert path == ADAPTER or imported(path) == []
