"""Names that a module, a tensor or the table of modules lacks when a step is recorded, and that are there at a later call."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
settings = types.ModuleType("settings_of_a_test")
weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)


def default_of_getattr(x: Tensor) -> Tensor:
    return x * getattr(settings, "scale", 2.0)


def hasattr_of_a_module(x: Tensor) -> Tensor:
    return x * 3 if hasattr(settings, "debug") else x


def caught_attribute_error(x: Tensor) -> Tensor:
    try:
        return x * settings.factor
    except AttributeError:
        return x


def optional_import(x: Tensor) -> Tensor:
    try:
        import optional_of_a_test
    except ImportError:
        return x
    return x * optional_of_a_test.factor


def table_of_modules(x: Tensor) -> Tensor:
    return x * 5 if "optional_of_a_test" in sys.modules else x


def attribute_of_a_parameter(x: Tensor) -> Tensor:
    return x * getattr(weight, "multiplier", 2.0)


def _imported() -> None:
    module = sys.modules["optional_of_a_test"] = types.ModuleType("optional_of_a_test")
    setattr(module, "factor", 7.0)  # noqa: B010


APPEARS: dict[Callable[[Tensor], Tensor], Callable[[], None]] = {
    default_of_getattr: lambda: setattr(settings, "scale", 5.0),
    hasattr_of_a_module: lambda: setattr(settings, "debug", True),
    caught_attribute_error: lambda: setattr(settings, "factor", 4.0),
    optional_import: _imported,
    table_of_modules: _imported,
    attribute_of_a_parameter: lambda: setattr(weight, "multiplier", 9.0),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Nothing of it is there before and after each test."""
    yield
    for name in ("scale", "debug", "factor"):
        vars(settings).pop(name, None)
    vars(weight).pop("multiplier", None)
    sys.modules.pop("optional_of_a_test", None)


@pytest.mark.parametrize("step", APPEARS, ids=lambda step: step.__name__)
def test_a_name_that_appears_is_seen_at_the_next_call(step: Callable[[Tensor], Tensor]) -> None:
    captured, x = graphs.capture(step), torch.ones(3)
    for _ in range(3):
        assert torch.equal(captured(x), step(x))
    assert captured.report().replays == 3
    APPEARS[step]()
    assert torch.equal(captured(x), step(x))
