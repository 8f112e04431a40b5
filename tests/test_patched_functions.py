"""Functions of torch that the program has wrapped: their wrapper runs as often as in eager, also while a step is watched."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphs

Tensor = torch.Tensor
Wrap = Callable[[Any], Any]
layer, norm = nn.Linear(3, 3), nn.LayerNorm(3)


def doubled(own: Any) -> Any:
    return lambda *args, **kwargs: own(*args, **kwargs) * 2


def wraps(own: Any) -> Any:
    return functools.wraps(own)(doubled(own))


def partial(own: Any) -> Any:
    return functools.partial(lambda function, *args, **kwargs: function(*args, **kwargs) * 2, own)


def narrower(own: Any) -> Any:
    return lambda input, inplace: own(input) * 2


def halves(own: Any) -> Any:
    return lambda *args: [part * 2 for part in own(*args)]


def computed(own: Any) -> Any:
    return property(lambda tensor: own.__get__(tensor) * 2)


PATCHES: dict[str, tuple[Any, str, Wrap, Callable[[Tensor], Tensor]]] = {
    "function": (F, "softmax", doubled, lambda x: F.softmax(x, -1)),
    "with its name": (F, "softmax", wraps, lambda x: F.softmax(x, -1)),
    "partial": (F, "softmax", partial, lambda x: F.softmax(x, -1)),
    "fewer arguments": (F, "relu", narrower, lambda x: nn.ReLU()(x)),
    "called by a module": (F, "layer_norm", doubled, lambda x: norm(x)),
    "method in C": (Tensor, "relu", doubled, lambda x: x.relu()),
    "index": (Tensor, "__getitem__", doubled, lambda x: x[1:]),
    "method in Python": (Tensor, "split", halves, lambda x: x.split(1)[0]),
    "methods of one code": (Tensor, "__rsub__", doubled, lambda x: 2 - x),
    "property": (Tensor, "T", computed, lambda x: x[None].T * 1),
    "handed over elsewhere": (torch, "max_pool2d", doubled, lambda x: F.max_pool2d(x.expand(1, 3, 3), 2)),
    "module in C": (torch._C._nn, "linear", doubled, lambda x: layer(x)),
    "rewritten": (F, "softmax", doubled, lambda x: F.softmax(x, -1) * x[0].item()),
    "branch": (Tensor, "relu", doubled, lambda x: x.relu() if x[0] > 2 else x - 1),
}


def _patch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrap: Wrap) -> None:
    own = getattr(owner, name)
    if name in vars(owner):
        monkeypatch.setattr(owner, name, wrap(own))
    else:
        monkeypatch.setitem(_Attributes(owner), name, wrap(own))  # type: ignore[arg-type]


class _Attributes:
    """Attributes as items: one that a class inherits is deleted afterwards, not set."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        return vars(self.owner)[name]

    def get(self, name: str, default: Any) -> Any:
        return vars(self.owner).get(name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.owner, name)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_wrapped_function_of_torch_is_wrapped_once(patch: str, grad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrap, step = PATCHES[patch]
    _patch(monkeypatch, owner, name, wrap)
    captured = graphs.capture(step)
    with grad():
        for call in range(3):
            x = torch.arange(1.0, 4.0) + call
            assert torch.equal(captured(x), step(x))
    report = captured.report()
    assert (report.eager_calls, report.refusals) == (0, ())


def test_a_wrapped_write_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    total, own = torch.zeros(3), Tensor.add_
    _patch(monkeypatch, Tensor, "add_", lambda own: lambda x, *args: own(own(x, *args), 1))
    captured = graphs.capture(lambda x: total.add_(x) * 1)
    with torch.no_grad():
        for _ in range(3):
            captured(torch.ones(3))
    assert total.tolist() == [6.0] * 3
    assert captured.report().replays == 3 and own is not Tensor.add_


def test_a_conversion_that_was_wrapped_before_the_import_is_seen() -> None:
    program = """
import torch
own = torch.Tensor.tolist
torch.Tensor.tolist = lambda x: own(x)
import graphs
step = lambda x: x * x.tolist()[0]
captured = graphs.capture(step)
with torch.no_grad():
    for call in range(3):
        x = torch.arange(1.0, 4.0) + call
        assert torch.equal(captured(x), step(x))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
