"""Arguments of any layout, identity and bits, and arguments that a step writes, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
Make = Callable[..., Tensor]


def given_thrice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x, x


def complex_(x: Tensor) -> Tensor:
    return torch.complex(x, x + 1)


STEPS: dict[str, tuple[Callable[..., Any], Callable[[Make], tuple[Any, ...]]]] = {
    "a slice": (lambda x: (x @ x.mT).relu(), lambda r: (r(4, 9, 8)[:, -2:],)),
    "a transpose": (lambda x: x.softmax(0) * x.stride(0), lambda r: (r(8, 5).t(),)),
    "channels last": (lambda x: x.sum(1) * x.stride(1), lambda r: (r(2, 3, 8, 8).to(memory_format=torch.channels_last),)),
    "every other column": (lambda x: x.reshape(-1) * 2, lambda r: (r(4, 8)[:, ::2],)),
    "expanded": (lambda x: x.reshape(-1) * 2, lambda r: (r(1, 8).expand(5, 8),)),
    "expanded with holes": (lambda x: x.reshape(-1) * 2, lambda r: (r(4, 1, 16)[:, :, ::2].expand(4, 3, 8),)),
    "an odd address": (lambda x: x * 2, lambda r: (r(33).half()[1:],)),
    "one tensor three times": (lambda q, k, v: (q @ k.t()) @ v if k is v else q, lambda r: given_thrice(r(5, 8))),
    "conjugated": (lambda z: z * 2 if z.is_conj() else z * 3, lambda r: (complex_(r(3, 4)).conj(),)),
    "conjugated with holes": (lambda z: z * 2, lambda r: (complex_(r(3, 8))[:, ::2].conj(),)),
    "negated": (lambda x: x * 2, lambda r: (complex_(r(3, 4)).conj().imag,)),
    "large and transposed": (lambda x: x.sum(0) * x.stride(0), lambda r: (r(8200, 2100).t(),)),
    "a row and the argument": (lambda x: (x[1], x, x.t()), lambda r: (r(3, 4),)),
    "overlapping results": (lambda x: (lambda y: (y[:3], y[2:]))(x * 2), lambda r: (r(5, 4),)),
    "an expanded result": (lambda x: (x * 2).expand(4, 3), lambda r: (r(3),)),
    "a conjugated result": (lambda z: (z * 2).conj(), lambda r: (complex_(r(3)),)),
    "written": (lambda x: x.mul_(2), lambda r: (r(3, 4),)),
    "written and read": (lambda x, y: (x * 3, x.add_(y)[0]), lambda r: (r(4, 3).t(), r(4))),
    "written with holes": (lambda x, y: (x * 3, x.add_(y)[0]), lambda r: (r(3, 8)[:, ::2], r(4))),
    "written and conjugated": (lambda z: z.mul_(2), lambda r: (complex_(r(3)).conj(),)),
    "an LSTM": (nn.LSTM(8, 4), lambda r: (r(5, 2, 8),)),
    "attention": (nn.MultiheadAttention(8, 2).eval(), lambda r: given_thrice(r(5, 2, 8))),
}


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.filterwarnings("ignore::graphs.ledger.NotReplayed")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_gives_and_writes_what_eager_does(name: str, mode: str, device: torch.device) -> None:
    model, arguments = STEPS[name]
    if isinstance(model, nn.Module):
        model = model.to(device)
    step, alive = graphs.capture(model), []
    with MODES[mode]():
        for call in range(6):
            calls = []
            for _ in range(2):
                torch.manual_seed(call)
                calls.append(arguments(lambda *sizes: torch.randn(*sizes, device=device)))
            given, wanted = calls
            alive.append(given)  # so that no address comes back
            got, expected = step(*given), model(*wanted)
            torch.testing.assert_close(tensors(got), tensors(expected))
            torch.testing.assert_close(tensors(given), tensors(wanted))
            assert [t.stride() for t in tensors(got)] == [t.stride() for t in tensors(expected)]
    assert step.report().replays == 6, str(step.report())


def test_a_written_argument_survives_replays_that_are_not_waited_for(device: torch.device) -> None:
    step = graphs.capture(lambda x: x.mul_(2))
    with torch.no_grad():
        given = [torch.full((1 << 20,), float(call), device=device) for call in range(64)]
        for x in given:
            step(x)
        assert all(bool((x == 2 * call).all()) for call, x in enumerate(given))
