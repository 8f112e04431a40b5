"""What a step changes of a tensor besides its values (layout, memory, gradient): once a call, as eager does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


def requires(x: Tensor) -> Tensor:
    x.requires_grad_(True)
    return x * 2


def returned_requiring(x: Tensor) -> Tensor:
    return x.requires_grad_(True)


def other_memory(x: Tensor) -> Tensor:
    x.data = x * 2
    return x + 1


def other_size(x: Tensor) -> Tensor:
    x.data = torch.ones(5)
    return x * 2


def gradient(x: Tensor) -> Tensor:
    x.grad = torch.ones(3)
    return x * 1


def one_more_dimension(x: Tensor) -> Tensor:
    x.unsqueeze_(0)
    return x * 2


def transposed(x: Tensor) -> Tensor:
    x.unsqueeze_(0)
    x.t_()
    return x * 2


def resized(x: Tensor) -> Tensor:
    x.resize_(2)
    return x * 2


def exchanged(x: Tensor) -> Tensor:
    x.set_(torch.ones(4))  # type: ignore[call-overload]
    return x * 2


def detached(x: Tensor) -> Tensor:
    x.detach_()
    return x * 1


def own_is_laid_out_anew(x: Tensor) -> Tensor:
    y = x.outer(x)
    y.transpose_(0, 1)
    y.unsqueeze_(0)
    return y.squeeze_(0) @ x


def own_gets_other_memory(x: Tensor) -> Tensor:
    y = x * 2
    y.data = x * 5
    return y * 1


STEPS = [
    *(requires, returned_requiring, other_memory, other_size, gradient, one_more_dimension, transposed),
    *(resized, exchanged, detached, own_is_laid_out_anew, own_gets_other_memory),
]


def form(tensor: Tensor) -> tuple[Any, ...]:
    gradient = tensor.grad if tensor.is_leaf else None
    kept = gradient.tolist() if gradient is not None else None
    return tensor.tolist(), tuple(tensor.shape), tensor.stride(), tensor.requires_grad, kept


@contexts
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_an_argument_is_left_as_eager_leaves_it(step: Callable[[Tensor], Tensor], context: Any) -> None:
    captured = graphs.capture(step)
    for call in range(4):
        seen = []
        for fn in (step, captured):
            x = torch.full((3,), call + 1.0, requires_grad=step is detached) * 1
            with context():
                try:
                    seen.append((form(fn(x)), form(x)))
                except RuntimeError as error:
                    seen.append((type(error), form(x)))  # type: ignore[arg-type]
        assert seen[0] == seen[1], f"call {call}"


class Weighted(nn.Module):
    """A layer, and what its step does with the weight."""

    def __init__(self, apply: Callable[[nn.Parameter, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.apply_to = nn.Linear(3, 1, bias=False), apply

    def forward(self, x: Tensor) -> Tensor:
        made = self.apply_to(self.layer.weight, x)
        return made if isinstance(made, Tensor) else x * 1


def backward(w: nn.Parameter, x: Tensor) -> None:
    with torch.enable_grad():
        (x @ w.t()).sum().backward()  # type: ignore[no-untyped-call]


def optimised(w: nn.Parameter, x: Tensor) -> None:
    w.data.add_(w.grad if w.grad is not None else x, alpha=-0.1)


def set_in_the_step(w: nn.Parameter, x: Tensor) -> None:
    w.grad = x * 2


def taken_away(w: nn.Parameter, x: Tensor) -> None:
    w.grad = None


def asked(w: nn.Parameter, x: Tensor) -> Tensor:
    return x if w.grad is None else x * w.grad


def asked_whether_it_requires(w: nn.Parameter, x: Tensor) -> Tensor:
    return x * 2 if w.requires_grad else x * 3


def frozen(w: nn.Parameter, x: Tensor) -> None:
    w.requires_grad_(False)


BETWEEN: dict[str, Callable[[nn.Module, int], Any]] = {
    "nothing": lambda model, call: None,
    "zero_grad": lambda model, call: model.zero_grad() if call in (2, 4) else None,
    "zeroed in place": lambda model, call: model.zero_grad(set_to_none=False) if call in (2, 4) else None,
    "another gradient": lambda model, call: setattr(
        model.layer.weight, "grad", torch.full((1, 3), float(call)) if call != 1 else None
    ),
    "frozen and thawed": lambda model, call: model.requires_grad_(call not in (2, 3)),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(
    "apply",
    [backward, optimised, set_in_the_step, taken_away, asked, asked_whether_it_requires, frozen],
    ids=lambda apply: apply.__name__,
)
def test_a_weight_and_its_gradient_are_left_as_eager_leaves_them(apply: Any, between: str) -> None:
    model, twin = Weighted(apply), Weighted(apply)
    step = graphs.capture(model)
    for call in range(7):
        x = torch.full((1, 3), call + 1.0)
        seen: list[Any] = []
        for module, fn in ((twin, twin), (model, step)):
            BETWEEN[between](module, call)
            with torch.no_grad():
                try:
                    seen.append((form(fn(x)), form(module.layer.weight)))  # type: ignore[operator, arg-type]
                except RuntimeError as error:
                    seen.append((type(error), form(module.layer.weight)))  # type: ignore[arg-type]
        assert seen[0] == seen[1], f"call {call}"


def test_a_weight_can_be_swapped() -> None:
    layer = nn.Linear(4, 4)
    step = graphs.capture(layer)
    with torch.no_grad():
        step(torch.ones(2, 4))
        step(torch.ones(2, 4))
        torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.zeros(4, 4)))
        assert torch.equal(step(torch.ones(2, 4)), layer.bias.expand(2, 4))


def test_memory_is_counted_from_where_an_argument_begins() -> None:
    def step(x: Tensor) -> Tensor:
        return x.as_strided((2,), (1,), 0) * 1

    captured, base = graphs.capture(step), torch.arange(12.0)
    with torch.no_grad():
        for start in range(4):
            assert torch.equal(captured(base[start : start + 3]), base[:2])
    assert captured.report().refusals[0].reason == "unsupported-operator"
