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


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
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


def ids(device: torch.device) -> Tensor:
    return torch.randint(0, 9, (3, 8), device=device)


def scaled_or_lowered(x: Tensor, t: Tensor) -> Tensor:
    return x / t if t > 0 else x - 1


HOST: dict[str, tuple[Callable[..., Any], Callable[[int, torch.device], tuple[Any, ...]]]] = {
    "temperature": (lambda x, t: (x / t).softmax(-1), lambda i, d: (torch.randn(4, 8, device=d), torch.tensor(i + 0.5))),
    "temperature first": (lambda t, x: x / t, lambda i, d: (torch.tensor(i + 0.5), torch.randn(4, 8, device=d))),
    "temperature, 16 bits": (lambda x, t: x * t, lambda i, d: (torch.randn(8, device=d).bfloat16(), torch.tensor(i + 0.3))),
    "lengths": (
        lambda x, n: x * (torch.arange(8, device=x.device) < n.to(x.device)[:, None]),
        lambda i, d: (torch.randn(3, 8, device=d), torch.tensor([i % 8, 1, 7])),
    ),
    "lengths, cast": (
        lambda x, n: x.sum(1) / n.to(x.device, torch.float32),
        lambda i, d: (torch.randn(3, 8, device=d), torch.tensor([i + 1, 1, 7])),
    ),
    "arithmetic on the host": (lambda x, t: x * (t * 2 + 1), lambda i, d: (torch.randn(8, device=d), torch.tensor(i + 0.5))),
    "an index": (lambda x, n: x[n], lambda i, d: (ids(d), torch.tensor([i % 3, 0]))),
    "a branch": (scaled_or_lowered, lambda i, d: (torch.randn(8, device=d), torch.tensor(float(i % 3 - 1)))),
    "item": (lambda x, t: x * t.item(), lambda i, d: (torch.randn(8, device=d), torch.tensor(i + 0.5))),
    "handed through": (lambda x, t: (x + t, t), lambda i, d: (torch.randn(8, device=d), torch.tensor(float(i)))),
    "pinned": (lambda x, t: x * t.to(x.device), lambda i, d: (torch.randn(8, device=d), torch.tensor(i + 0.5).pin_memory())),
    "much to copy": (lambda x, t: x * t, lambda i, d: (torch.randn(1 << 16, device=d), torch.tensor(i + 0.5))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HOST)
def test_host_tensors_are_refreshed_at_each_call(name: str, mode: str, device: torch.device) -> None:
    model, arguments = HOST[name]
    step = graphs.capture(model)
    with MODES[mode]():
        for call in range(8):
            given = arguments(call, device)
            torch.testing.assert_close(tensors(step(*given)), tensors(model(*given)))
    assert step.report().replays == 8, str(step.report())


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_an_output_made_of_host_tensors_alone_stays_on_the_host(device: torch.device) -> None:
    step = graphs.capture(lambda x, t: (x * t, t * 2))
    with torch.no_grad():
        for call in range(3):
            assert step(torch.ones(4, device=device), torch.tensor(float(call)))[1].device.type == "cpu"
    assert {refusal.reason for refusal in step.report().refusals} == {"unsupported-output"}


def test_pending_replays_keep_the_host_values_of_their_calls(device: torch.device) -> None:
    step, t = graphs.capture(lambda x, t: (x @ x) * 0 + t), torch.tensor(0.0)
    x, results = torch.ones(1024, 1024, device=device), []
    with torch.no_grad():
        step(x, t)
        for call in range(1200):  # beyond the end of the ring, twice
            t.fill_(call)  # while replays that were given this very tensor are still to run
            results.append(step(x, t)[0, 0].clone())
        assert torch.stack(results).tolist() == list(range(1200))
    assert step.report().replays == 1201


def test_host_values_follow_the_stream_that_a_call_is_made_on(device: torch.device) -> None:
    step, streams = graphs.capture(lambda x, t: x + t), [torch.cuda.Stream(device) for _ in range(2)]
    x = torch.zeros(1 << 20, device=device)
    with torch.no_grad():
        step(x, torch.tensor(0.0))
        torch.cuda.synchronize(device)
        results = []
        for call in range(1200):
            with torch.cuda.stream(streams[call % 2]):
                results.append(step(x, torch.tensor(float(call)))[0].clone())
        torch.cuda.synchronize(device)
    assert [result.item() for result in results] == list(range(1200))
